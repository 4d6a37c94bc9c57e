"""SFTTrainer with the few differences that the promises need."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTTrainer

from stepladder.data.render import IGNORED
from stepladder.data.stream import Stream
from stepladder.training.order import Order, pad_rows

LENGTH_GROUP = 50  # global batches that are sorted by length together, as Transformers does


class Trainer(SFTTrainer):
    """TRL's trainer on rows that are tokenized already.

    It differs in what the same curve on every strategy needs: the adapter is in fp32, the rows
    come in `Order`, and the evaluation loss is the mean over all tokens, each row counted once.
    """

    def __init__(self, model: Any, **kwargs: Any):
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

    @property
    def global_batch_size(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        if not hasattr(self.train_dataset, "__len__"):  # a stream comes in its own order
            return super().get_train_dataloader()
        rows = len(self.train_dataset)
        dataset = pad_rows(self.train_dataset, self.global_batch_size, self.processing_class.pad_token_id)
        lengths = None
        if args.train_sampling_strategy == "group_by_length":
            lengths = [len(ids) for ids in dataset["input_ids"]]
        seed = args.seed if args.data_seed is None else args.data_seed
        order = Order(
            rows, len(dataset), seed, args.train_sampling_strategy, lengths, LENGTH_GROUP * self.global_batch_size
        )
        return self._loader(dataset, args.per_device_train_batch_size, order)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        batch = self.args.per_device_eval_batch_size
        dataset = pad_rows(dataset, batch * self.args.world_size, self.processing_class.pad_token_id)
        return self._loader(dataset, batch, None)

    def _loader(self, dataset: Any, batch_size: int, order: Order | None) -> DataLoader:
        args = self.args
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=order,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

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
