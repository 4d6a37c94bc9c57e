"""SFTTrainer with the few differences that the promises need."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from stepladder.console import say
from stepladder.data import prepare
from stepladder.data.render import IGNORED
from stepladder.errors import TrainingError
from stepladder.model.cpu.speed_up import speed_up
from stepladder.recipe.recipe import Layout
from stepladder.training import gradients
from stepladder.training.checkpoint import saving
from stepladder.training.checkpoint.resume import of_step
from stepladder.training.guard.rank_sync import Agreement, EvaluationLeftError
from stepladder.training.launch import launcher
from stepladder.training.order import Order, StepStream, with_empty_row
from stepladder.training.rows import Rows, WithRows
from stepladder.training.watch.telemetry import Telemetry

LENGTH_GROUP = 50  # steps whose rows are sorted by length together, as Transformers does


def has_experts(config: Any) -> bool:
    """Whether a model sends each token through some of its weights only."""
    return any(getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))


class Trainer(SFTTrainer):
    """TRL's trainer on rows that are tokenized already.

    It differs in what the same curve on every strategy needs: the adapter is in fp32, the rows
    come in `Order`, the gradient norm is exact, and the evaluation loss is the mean over all
    tokens, each row counted once. Its checkpoints are those of `checkpoint/saving.py`.

    Args:
        flat: whether the rows of a batch lie end to end.
        own_kernels: whether loss and attention are those of `model/cpu`.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        meter: Telemetry,
        on_nan: str = "stop",
        flat: bool = False,
        own_kernels: bool = False,
        **kwargs: Any,
    ):
        self.layout, self.flat = layout, flat
        quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
        adapter = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if quantized and parameter.requires_grad
        }
        args = kwargs["args"]
        if args.ddp_find_unused_parameters is None:
            # Transformers lets DDP look for weights without a gradient in each step; only experts can be such.
            args.ddp_find_unused_parameters = has_experts(model.config)
        super().__init__(model=model, **kwargs)
        # TRL casts the adapter of a quantized model to bf16 (`sft_trainer.py`, after
        # `_is_quantized_model`), where small updates round to nothing, and ZeRO keeps an fp32 copy
        # of it while DDP and FSDP do not, so that their curves part by 1e-3. It is put back here.
        for name, parameter in model.named_parameters():
            if name in adapter:
                parameter.data = adapter[name].to(torch.float32)
        gradients.reduce_in_fp32(self.accelerator)
        if own_kernels:
            speed_up(self.model, IGNORED)
        for callback in (ProgressCallback, PrinterCallback):  # watch/progress.py takes their place
            self.remove_callback(callback)
        self.meter, self.rows = meter, Rows()
        self.agreement = Agreement(self, on_nan)
        for own in (meter, self.agreement):
            self.add_callback(own)
        # Transformers would delete checkpoints by it before the other ranks are known to be done.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._order: Order | None = None
        self._bad_losses = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self._norm: Any = 0.0
        self._best_before: tuple[float | None, int | None] = (None, None)  # metric and step before the best ones
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # summed loss and trained tokens of this rank
        self.owes_evaluation = False  # of the step that is saved: it was left for a stop

    def get_train_dataloader(self) -> DataLoader:
        args, rows, pad_token_id = self.args, self.train_dataset, self.processing_class.pad_token_id
        if not hasattr(rows, "__len__"):
            return self._loader(StepStream(rows, self.layout, pad_token_id), self.layout, self.flat)
        seed = args.seed if args.data_seed is None else args.data_seed
        group = LENGTH_GROUP * self.layout.rows
        order = Order(len(rows), self.layout, seed, args.train_sampling_strategy, prepare.lengths(rows), group)
        self._order = order
        return self._loader(with_empty_row(rows, pad_token_id), self.layout, self.flat, order)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        micro, ranks = self.args.per_device_eval_batch_size, self.args.world_size
        layout = Layout(micro * ranks, micro, ranks, accumulation=1)
        # The mean over all tokens is the same in any order: rows of alike length side by side are padded least.
        order = Order(len(rows), layout, 0, "group_by_length", prepare.lengths(rows), group=len(rows))
        # `eval_packing` is apart from `packing`, by which alone TRL chooses its collator.
        flat = self.flat or "seq_lengths" in rows.column_names
        return self._loader(with_empty_row(rows, self.processing_class.pad_token_id), layout, flat, order)

    def _loader(self, rows: Any, layout: Layout, padding_free: bool, order: Order | None = None) -> DataLoader:
        args = self.args
        loader = DataLoader(
            rows,
            batch_size=layout.micro,
            sampler=order,
            collate_fn=WithRows(dataclasses.replace(self.data_collator, padding_free=padding_free)),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.rows.add(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._bad_losses |= ~torch.isfinite(loss)
        return loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        return super().get_batch_samples(self.meter.batches(epoch_iterator), num_batches, device)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self.meter.forward(self.args.device) if model.training else contextlib.nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """All that watch the run (metrics.jsonl, the trackers, the terminal) are told the same figures."""
        if "loss" in logs:
            logs |= self.meter.figures(self.args.device)
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: Any) -> Any:
        if not self._norm_on_cpu:
            return super()._clip_grad_norm(model)
        return gradients.clip(gradients.of(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._norm_on_cpu:  # max_grad_norm: 0 clips nothing
            grad_norm = gradients.norm(gradients.of(model))
        self._norm = super()._get_grad_norm(model, grad_norm)
        return self._norm

    @property
    def _norm_on_cpu(self) -> bool:
        """DeepSpeed has a norm of its own, which is exact."""
        return self.args.device.type == "cpu" and not self.is_deepspeed_enabled

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        if self.agreement.stop_asked():
            raise EvaluationLeftError
        inputs.pop("rows", None)
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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loaders draw random numbers: kept apart, so that how often a run is evaluated leaves its curve alone."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Leave the evaluation at the next batch where a stop is asked for. The next start makes it before it trains.

        Transformers asks for that one by `eval_on_start`, which `saving.load` sets, and without what follows from
        an evaluation: the schedule's step and the best metric.
        """
        owed = skip_scheduler and self.state.global_step > 0
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not owed)
        except EvaluationLeftError:
            self.agreement.preempted = self.owes_evaluation = True
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            return {}
        if owed:
            self._determine_best_metric(metrics, trial)
        return metrics

    def not_finite(self) -> tuple[bool, bool]:
        """Whether this rank saw a loss, or a gradient norm, that is no finite number since it was last asked."""
        loss = bool(self._bad_losses)
        self._bad_losses.zero_()
        # fp16 finds its loss scale by gradients that overflow, and leaves those steps out by itself
        gradient = not self.args.fp16 and not math.isfinite(float(self._norm))
        return loss, gradient

    def leave_out_step(self) -> None:
        """Before the optimizer step: let it change nothing. The step's loss is not logged."""
        self.optimizer.zero_grad()  # no effect under DeepSpeed, which has left the step out by itself
        self._tr_loss.copy_(self.agreement.loss_before)
        self._globalstep_last_logged += 1

    # ---- checkpoints

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save the best step, whatever `save_steps` says, and the step that a signal stops at, whatever its metric."""
        before = self.state.best_metric, self.state.best_global_step
        if better := bool(metrics) and super()._determine_best_metric(metrics, trial):  # none of one that was left
            self._best_before = before
            self.control.should_save |= self.args.load_best_model_at_end
        return better or self.agreement.preempted

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.meter.saving():
            saved = saving.save(self)
        if saved:
            return
        if self.agreement.preempted:
            raise TrainingError("no checkpoint could be written before the stop", help="mend that, and start again")
        if self.state.best_global_step == self.state.global_step:  # the best one is chosen among those that stand
            self.state.best_metric, self.state.best_global_step = self._best_before

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: weights and optimizer are put back together, once the strategy has sharded them."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        launcher.assert_no_mismatch(self)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        launcher.assert_set_up(self, self.meter.run.manifest)
        if resume_from_checkpoint is not None:
            # Transformers takes `logging_steps`, `eval_steps` and `save_steps` from the checkpoint.
            self.state.compute_steps(self.args, max_steps)
            saving.load(self, Path(resume_from_checkpoint))
            saving.compare_rates(self)
            if self.meter.run.forgets_best:
                self.state.best_metric = self.state.best_global_step = None
            # On several ranks `set_epoch` does not reach a loader that skips batches (accelerate#4071).
            if self._order is not None:
                self._order.set_epoch(self.state.global_step // self._order.steps)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Transformers would train one step more where a run died after its last step, or a start stops before any."""
        if self.state.global_step < self.state.max_steps and not self.agreement.preempted:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        """Transformers calls it as the last thing before the first step."""
        if checkpoint_folder is not None:
            saving.load_position(self, Path(checkpoint_folder))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers calls `_load_best_model` where its own `_save_checkpoint` has named the folder."""
        best, chooses = self.state.best_global_step, self.args.load_best_model_at_end and not self.agreement.preempted
        self.state.best_model_checkpoint = str(of_step(Path(self.args.output_dir), best)) if chooses and best else None
        if chooses and not best and self.args.process_index == 0:
            since = " since the metric or the evaluation rows changed" * self.meter.run.forgets_best
            say(f"⚠ load_best_model_at_end: no evaluation gave a finite loss{since}, so the result is the last step's")
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        saving.load_weights(self, Path(self.state.best_model_checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card at every checkpoint: one is written at the end, from what the run has shown."""
