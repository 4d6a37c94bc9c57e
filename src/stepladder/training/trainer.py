"""SFTTrainer with the few differences that the promises need."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTTrainer

from stepladder.data.render import IGNORED
from stepladder.data.stream import Stream
from stepladder.recipe.batch import Layout
from stepladder.training import gradients
from stepladder.training.order import Order, StepStream, with_empty_row

LENGTH_GROUP = 50  # steps whose rows are sorted by length together, as Transformers does


class Trainer(SFTTrainer):
    """TRL's trainer on rows that are tokenized already.

    It differs in what the same curve on every strategy needs: the adapter is in fp32, the rows
    come in `Order`, the gradient norm is exact, and the evaluation loss is the mean over all
    tokens, each row counted once.
    """

    def __init__(self, model: Any, layout: Layout, **kwargs: Any):
        self.layout = layout
        adapter = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        super().__init__(model=model, **kwargs)
        # TRL casts the adapter of a quantized model to bf16 (`sft_trainer.py`, after
        # `_is_quantized_model`), where small updates round to nothing, and ZeRO keeps an fp32 copy
        # of it while DDP and FSDP do not, so that their curves part by 1e-3. It is put back here.
        if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
            for name, parameter in model.named_parameters():
                if name in adapter:
                    parameter.data = adapter[name].to(torch.float32)
        for callback in (ProgressCallback, PrinterCallback):  # training/progress.py takes their place
            self.remove_callback(callback)
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # summed loss and trained tokens of this rank

    def get_train_dataloader(self) -> DataLoader:
        args, rows, pad_token_id = self.args, self.train_dataset, self.processing_class.pad_token_id
        if not hasattr(rows, "__len__"):
            return self._loader(StepStream(rows, self.layout, pad_token_id), self.layout, self.padding_free)
        lengths = [len(ids) for ids in rows["input_ids"]] if args.train_sampling_strategy == "group_by_length" else None
        seed = args.seed if args.data_seed is None else args.data_seed
        order = Order(len(rows), self.layout, seed, args.train_sampling_strategy, lengths, group=LENGTH_GROUP)
        return self._loader(with_empty_row(rows, pad_token_id), self.layout, self.padding_free, order)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        micro, ranks = self.args.per_device_eval_batch_size, self.args.world_size
        layout = Layout(micro * ranks, micro, ranks, accumulation=1)
        order = Order(len(rows), layout, seed=0, strategy="sequential")
        # `eval_packing` is apart from `packing`, by which alone TRL chooses its collator.
        flat = self.args.padding_free or "seq_lengths" in rows.column_names
        return self._loader(with_empty_row(rows, self.processing_class.pad_token_id), layout, flat, order)

    def _loader(self, rows: Any, layout: Layout, padding_free: bool, order: Order | None = None) -> DataLoader:
        args = self.args
        loader = DataLoader(
            rows,
            batch_size=layout.micro,
            sampler=order,
            collate_fn=dataclasses.replace(self.data_collator, padding_free=padding_free),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def _clip_grad_norm(self, model: Any) -> Any:
        if not self._norm_on_cpu:
            return super()._clip_grad_norm(model)
        return gradients.clip(gradients.of(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._norm_on_cpu:  # max_grad_norm: 0 clips nothing
            grad_norm = gradients.norm(gradients.of(model))
        return super()._get_grad_norm(model, grad_norm)

    @property
    def _norm_on_cpu(self) -> bool:
        """DeepSpeed has a norm of its own, which is exact."""
        return self.args.device.type == "cpu" and not self.is_deepspeed_enabled

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
        self._evaluated += torch.tensor([float(result[0]) * tokens, tokens], dtype=torch.float64)
        return result

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Transformers averages the batches' means; the mean over tokens does not depend on how rows are batched."""
        self._evaluated.zero_()
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self.accelerator.reduce(self._evaluated.to(self.args.device, torch.float32)).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
        return output

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card at every checkpoint: one is written at the end, from what the run has shown."""


class StreamEpoch(TrainerCallback):
    """Tells a stream whose epoch's order comes next."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stream.epoch = int(state.epoch or 0)
