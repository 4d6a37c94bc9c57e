"""TRL's SFTTrainer with the differences that the same curve on every strategy needs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from stepladder import generators, hardware
from stepladder.console import say
from stepladder.data import prepare
from stepladder.data.render import IGNORED
from stepladder.errors import TrainingError
from stepladder.model import fixed_values, new_tokens
from stepladder.model.cpu_kernels import speed_up
from stepladder.model.flops import count_experts
from stepladder.recipe.recipe import StepLayout
from stepladder.training import gradients, loraplus
from stepladder.training.batches import Order, RowLosses, RowNumberCollator, StepRows, StepStream, with_padding_row
from stepladder.training.checkpoint import loading, saving
from stepladder.training.checkpoint.resume import of_step
from stepladder.training.guard.early_stopping import EarlyStopping
from stepladder.training.guard.interruptions import EvaluationLeftError, RankSync, Watchdog
from stepladder.training.launch import launcher, weight_sending
from stepladder.training.watch.telemetry import Telemetry

LENGTH_GROUP = 50  # steps whose rows are sorted by length together, as Transformers does


class Trainer(SFTTrainer):
    """TRL's trainer on tokenized rows.

    It differs where the same curve on every strategy requires it: the adapter is in fp32, the rows
    come in `Order`, the gradient norm is exact, and the evaluation loss is the mean over all
    tokens, each row counted once. It writes the checkpoints of `checkpoint/saving.py`.

    Args:
        layout: how an optimizer step is cut into micro-batches.
        meter: measures the run.
        watchdog: ends a run that does not move.
        on_nan: `stop` or `skip`, for a NaN loss or gradient norm.
        stop_at: the step after which the run evaluates, saves and ends; None for its last one.
        early_stopping: patience and threshold of `guard/early_stopping.py`; no patience counts nothing.
        padding_free: whether the rows of a batch are concatenated (padding-free).
        own_kernels: whether loss and attention are those of `model/cpu_kernels.py`.
        loraplus_lr_ratio: LoRA+'s (`loraplus.create_optimizer`); None for one learning rate.
    """

    def __init__(
        self,
        model: Any,
        layout: StepLayout,
        meter: Telemetry,
        watchdog: Watchdog,
        on_nan: str = "stop",
        stop_at: int | None = None,
        early_stopping: tuple[int | None, float] = (None, 0.0),
        padding_free: bool = False,
        own_kernels: bool = False,
        loraplus_lr_ratio: float | None = None,
        **kwargs: Any,
    ):
        self.layout, self.rows_end_to_end, self.loraplus_lr_ratio = layout, padding_free, loraplus_lr_ratio
        quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
        adapter = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if quantized and parameter.requires_grad
        }
        args = kwargs["args"]
        if args.ddp_find_unused_parameters is None:
            # Transformers lets DDP search for unused weights in each step; only experts can be unused.
            args.ddp_find_unused_parameters = count_experts(model.config) > 0
        super().__init__(model=model, **kwargs)
        # TRL casts the adapter of a quantized model to bf16 (`sft_trainer.py`, after
        # `_is_quantized_model`), where small updates round to zero, and ZeRO keeps an fp32 copy
        # of it while DDP and FSDP do not: their curves would differ by 1e-3. Here it is restored.
        for name, parameter in model.named_parameters():
            if name in adapter:
                parameter.data = adapter[name].to(torch.float32)
        gradients.sum_in_fp32(self.accelerator)
        if own_kernels:
            speed_up(self.model, IGNORED)
        if self.accelerator.is_fsdp2 and hasattr(self.model, "peft_config"):
            new_tokens.unshard_before_loss(self.model.get_base_model())
        for callback in (ProgressCallback, PrinterCallback):  # terminal.ProgressLine takes their place
            self.remove_callback(callback)
        self.meter, self.rows = meter, StepRows()
        self.rank_sync = RankSync(self, on_nan, stop_at)
        self.early_stopping = EarlyStopping(self, *early_stopping)
        self.watchdog = watchdog
        self._pending_save: saving.Save | None = None  # that is being written
        self._complete_step: int | None = None  # of the newest complete checkpoint; each rank's disk may show it later
        for own in (meter, self.rank_sync, watchdog):
            self.add_callback(own)
        # By it Transformers would delete checkpoints before the other ranks are known to be done.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._order: Order | None = None
        self._bad_losses = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self._norm: Any = 0.0
        self._best_before: tuple[float | None, int | None] = (None, None)  # the previous best metric and its step
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # summed loss and loss tokens of this rank
        self._row_losses = RowLosses()
        self.owes_evaluation = False  # whether the saved step's evaluation was interrupted by a stop

    def get_train_dataloader(self) -> DataLoader:
        args, rows, pad_token_id = self.args, self.train_dataset, self.processing_class.pad_token_id
        if not hasattr(rows, "__len__"):
            return self._loader(StepStream(rows, self.layout, pad_token_id), self.layout, self.rows_end_to_end)
        seed = args.seed if args.data_seed is None else args.data_seed
        group = LENGTH_GROUP * self.layout.rows
        order = Order(len(rows), self.layout, seed, args.train_sampling_strategy, prepare.lengths(rows), group)
        self._order = order
        return self._loader(with_padding_row(rows, pad_token_id), self.layout, self.rows_end_to_end, order)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        micro, ranks = self.args.per_device_eval_batch_size, self.args.world_size
        layout = StepLayout(micro * ranks, micro, ranks, accumulation=1)
        # The mean over all tokens does not depend on the order: by length, rows need the least padding.
        order = Order(len(rows), layout, 0, "group_by_length", prepare.lengths(rows), group=len(rows))
        # TRL chooses its collator by `packing` alone, and `eval_packing` may differ.
        padding_free = self.rows_end_to_end or "seq_lengths" in rows.column_names
        return self._loader(with_padding_row(rows, self.processing_class.pad_token_id), layout, padding_free, order)

    def _loader(self, rows: Any, layout: StepLayout, padding_free: bool, order: Order | None = None) -> DataLoader:
        args = self.args
        loader = DataLoader(
            rows,
            batch_size=layout.micro,
            sampler=order,
            collate_fn=RowNumberCollator(dataclasses.replace(self.data_collator, padding_free=padding_free)),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.loraplus_lr_ratio and getattr(self, "optimizer", None) is None:
            self.optimizer: Any = loraplus.create_optimizer(self, self.loraplus_lr_ratio)
        return super().create_optimizer(model)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.rows.add(inputs)
        if launcher.has_replicas(self.accelerator):  # they add their sums once a step, with its last micro-batch
            model.set_requires_all_reduce(self.accelerator.sync_gradients)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._bad_losses |= ~torch.isfinite(loss)
        if self.args.logging_strategy == "no":  # TRL would keep its metrics of every micro-batch for the next log
            self._metrics["train"].clear()
        return loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        return super().get_batch_samples(self.meter.batches(epoch_iterator), num_batches, device)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self.meter.forward(self.args.device) if model.training else contextlib.nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Let metrics.jsonl, the trackers and the terminal receive the same metrics."""
        if "loss" in logs:
            logs |= self.meter.step_metrics(self.args.device)
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: Any) -> Any:
        if not self._norm_on_cpu:
            return super()._clip_grad_norm(model)
        return gradients.clip_gradients(gradients.list_gradients(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._norm_on_cpu:  # max_grad_norm: 0 clips nothing
            grad_norm = gradients.gradient_norm(gradients.list_gradients(model))
        self._norm = super()._get_grad_norm(model, grad_norm)
        return self._norm

    @property
    def _norm_on_cpu(self) -> bool:
        """Whether the norm is computed here: DeepSpeed sums in fp64, and a GPU in a tree."""
        return self.args.device.type == "cpu" and not self.is_deepspeed_enabled

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        # After the last step there is nothing to stop: the saved result is being verified.
        if self.is_in_train and self.rank_sync.stop_asked():
            raise EvaluationLeftError
        rows = inputs.pop("rows", None)
        with self._row_losses.collect(model, rows, inputs.get("position_ids")):
            result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
        self._evaluated += torch.tensor([float(result[0]) * tokens, tokens], dtype=torch.float64)
        return result

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Report the mean over tokens, whatever the batches; Transformers averages the means of batches."""
        self._evaluated.zero_()
        self._row_losses.clear()
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self.accelerator.reduce(self._evaluated.to(self.args.device, torch.float32)).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Keep the random numbers that loaders draw apart, so that evaluations do not change the curve."""
        with generators.unchanged():
            return super().evaluate(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Interrupt the evaluation at the next batch when a stop is requested; the next start repeats it first.

        Transformers runs that one by `eval_on_start`, which `loading.load` sets, without the consequences of
        an evaluation: the schedule's step and the best metric.
        """
        owed = skip_scheduler and self.state.global_step > 0
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not owed)
        except EvaluationLeftError:
            self.rank_sync.preempted = self.owes_evaluation = True
            self.rank_sync.reached_stop = False  # which includes its evaluation
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            return {}
        if owed:
            self._determine_best_metric(metrics, trial)
        self.owes_evaluation = False  # else the next start would repeat this one
        return metrics

    def not_finite(self) -> tuple[bool, bool]:
        """Whether the loss, or the gradient norm, of this rank was NaN or infinite since the last call."""
        loss = bool(self._bad_losses)
        self._bad_losses.zero_()
        # fp16 finds its loss scale by overflowing gradients, and skips those steps by itself
        gradient = not self.args.fp16 and not math.isfinite(float(self._norm))
        return loss, gradient

    def skip_step(self) -> None:
        """Let the coming optimizer step change nothing, and do not log its loss."""
        self.optimizer.zero_grad()  # no effect under DeepSpeed, which has skipped the step by itself
        self._tr_loss.copy_(self.rank_sync.loss_before)
        self._globalstep_last_logged += 1

    # ---- checkpoints

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save the best step whatever `save_steps` is, and the step of a stop whatever its metric is."""
        self.finish_save()  # which may forget the best step so far
        self._check_metric(metrics)
        self.early_stopping.add(metrics)
        before = self.state.best_metric, self.state.best_global_step
        if better := bool(metrics) and super()._determine_best_metric(
            metrics, trial
        ):  # none from an interrupted evaluation
            self._best_before = before
            self.control.should_save |= self.args.load_best_model_at_end
        if metrics and (better or not self.args.load_best_model_at_end):  # of the step that will be the result
            self._row_losses.write(self.meter.run, self.state.global_step)
        return better or self.rank_sync.preempted

    def _check_metric(self, metrics: dict[str, float]) -> None:
        """Raise TrainingError where the evaluation lacks `metric_for_best_model`; a user's callback may add metrics."""
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if metrics and self.args.metric_for_best_model and name not in metrics:
            raise TrainingError(
                f"metric_for_best_model: the evaluation has no {name}",
                why=f"it has {', '.join(sorted(metrics))}",
                help="metric_for_best_model: eval_loss",
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.finish_save()
        step = self.state.global_step
        if self._complete_step == step:
            return  # the epoch ended with the step that was saved already
        with self.meter.saving():
            self._pending_save = saving.start(self)
        if self._pending_save is None:
            self._forget_unsaved(step)
        elif self._pending_save.blocks or self.rank_sync.preempted:
            self.finish_save()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Complete the checkpoint that is being written where the training fails: several ranks may not meet then."""
        try:
            return super().train(*args, **kwargs)
        except Exception:
            if self.args.world_size == 1:
                self.finish_save()
            raise

    @property
    def writes(self) -> bool:
        """Whether this rank is writing a checkpoint."""
        return self._pending_save is not None and self._pending_save.writer.writes

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, and complete it; every rank calls it.

        Raises:
            TrainingError: it was to be the last one before a stop, and could not be written.
        """
        if self._pending_save is not None:
            save, self._pending_save = self._pending_save, None
            began = time.perf_counter()
            complete = saving.finish(self, save)
            self.meter.save_seconds[-1] += time.perf_counter() - began
            if complete:
                self._complete_step = save.step
            else:
                self._forget_unsaved(save.step)

    def _forget_unsaved(self, step: int) -> None:
        if self.rank_sync.preempted and step == self.state.global_step:
            raise TrainingError("no checkpoint could be written before the stop", help="mend that, and start again")
        if self.state.best_global_step == step:  # the best step is one of those that are saved
            self.state.best_metric, self.state.best_global_step = self._best_before

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: weights and optimizer are put back together, once the strategy has sharded them."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        launcher.assert_no_mismatch(self)
        weights = None
        if self.accelerator.is_fsdp2 and getattr(self.model, "hf_quantizer", None) is None:
            weights = weight_sending.take_weights(self.model)
        with new_tokens.shown_as_tied(self.model) if self.accelerator.is_fsdp2 else contextlib.nullcontext():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if weights is not None:
            offload = self.accelerator.state.fsdp_plugin.cpu_offload
            weight_sending.send_weights(self.model, self.optimizer, weights, offload)
        casts = self.accelerator.is_fsdp2 and self.accelerator.mixed_precision in ("bf16", "fp16")
        fixed_values.hold_in(self.model, hardware.dtype_of(self.accelerator.mixed_precision) if casts else None)
        launcher.assert_set_up(self, self.meter.run.manifest)
        if resume_from_checkpoint is not None:
            # Transformers takes `logging_steps`, `eval_steps` and `save_steps` from the checkpoint.
            self.state.compute_steps(self.args, max_steps)
            loading.load(self, Path(resume_from_checkpoint))
            self._complete_step = self.state.global_step
            loading.compare_rates(self)
            if self.meter.run.forgets_best:
                self.state.best_metric = self.state.best_global_step = None
                self.early_stopping.count = 0
            # On several ranks `set_epoch` does not reach a loader that skips batches (accelerate#4071).
            if self._order is not None:
                self._order.set_epoch(self.state.global_step // self._order.steps)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Skip the epoch after the last step, or a stop before the first: Transformers would train one step more."""
        ends = self.state.global_step >= self.state.max_steps or self.early_stopping.ends_run
        if not ends and not self.rank_sync.preempted:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        """Put the position back: Transformers calls it last before the first step."""
        if checkpoint_folder is not None:
            loading.load_position(self, Path(checkpoint_folder))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Name the best folder in place of Transformers' `_save_checkpoint`: it makes `_load_best_model` run."""
        self.finish_save()
        best, chooses = self.state.best_global_step, self.args.load_best_model_at_end and not self.rank_sync.preempted
        self.state.best_model_checkpoint = str(of_step(Path(self.args.output_dir), best)) if chooses and best else None
        if chooses and not best and self.args.process_index == 0:
            since = " since the metric or the evaluation rows changed" * self.meter.run.forgets_best
            say(f"⚠ load_best_model_at_end: no evaluation gave a finite loss{since}, so the result is the last step's")
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        loading.load_weights(self, Path(self.state.best_model_checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a card is written once, with the result."""

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `push_to_hub` uploads the result that `result.save` has written and verified."""
