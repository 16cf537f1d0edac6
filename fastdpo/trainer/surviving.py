"""A transformers.Trainer that a run of days can rely on: numbers that are no numbers, signals, checkpoints, logs."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastdpo.device import freed_memory_kept
from fastdpo.models import weights_as_trained
from fastdpo.trainer.config import PreferenceConfig
from fastdpo.trainer.kept_reference import ADAPTER, KeptReference
from fastdpo.trainer.metrics import MetricSums, StepFlops, Throughput
from fastdpo.trainer.passes import HostCounts
from fastdpo.trainer.resuming import say_what_differs
from fastdpo.trainer.run_state import newest_checkpoint, save_state
from fastdpo.trainer.watch import NotFiniteError, StepParts, StepWatch, StopRequest, write_aside

logger = logging.getLogger(__name__)


class SurvivingTrainer(Trainer):
    """What PreferenceTrainer is on top of; what happens to a batch is there."""

    args: PreferenceConfig
    _tags: ClassVar[list[str]] = ["fastdpo"]
    _metrics: dict[str, MetricSums]
    _throughput: Throughput
    _host_counts: HostCounts
    _reference: KeptReference
    _step_flops: StepFlops
    _autocast_dtype: torch.dtype | None
    _before_step: tuple[Tensor, MetricSums]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._watch, self._stop_request, self._step_parts = StepWatch(), StopRequest(), StepParts()
        self._resumed_from: str | None = None
        self._stop_agreed = 0  # the signal that some process was sent
        self._saved_step: int | None = None
        self._last_logged = self._skipped = self._passes = 0  # the step of the last log, and steps left out since
        super().__init__(*args, **kwargs)

    def _inner(self, model: Any) -> Any:
        """The transformers model inside adapters and wrappers."""
        raise NotImplementedError

    def _flops_of(self, inner: Any) -> StepFlops:
        raise NotImplementedError

    def _model_lent(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._step_parts.grad_norm = norm
        if self.args.nan_loss == "skip":
            loss = torch.stack(self._step_parts.losses).sum()
            bad = not (math.isfinite(float(norm)) and math.isfinite(float(loss)))
            if any(flag for (flag,) in self._host_counts.gather([int(bad)])):
                self._skip_step(model)
        return norm

    def _skip_step(self, model: Any) -> None:
        """Leaves a step out: no gradient, and none of its numbers in what is logged."""
        step = self.state.global_step + 1
        loss, norm, rows = self._step_parts.take()
        self._write_aside(step, rows)
        logger.warning(
            "step %d is skipped: its loss is %s and its gradient norm %s; its rows are in %s.",
            step, float(loss), float(norm), self._aside,
        )  # fmt: skip
        model.zero_grad()
        loss_before, self._metrics["train"] = self._before_step
        self._tr_loss.copy_(loss_before)
        self._skipped += 1

    def forget_steps(self) -> None:
        """What an earlier `train` has left of steps that it did not log."""
        self._watch.steps.clear()
        self._step_parts = StepParts()
        self._metrics["train"].clear()
        self._throughput.total_unshared = 0
        self._passes = 0  # over the data, begun
        self._last_logged, self._skipped = self.state.global_step, 0

    def measure_ceiling(self) -> None:
        """Finds what `perf/mfu` is a share of, where some step of this run is to be logged."""
        if _logs_a_step(self.args, self.state):
            self._throughput.measure_ceiling(self._autocast_dtype or self._inner(self.model).dtype)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.model_init is None:  # else the model is made later
            self._step_flops = self._flops_of(self._inner(self.model))  # weights may have been frozen since
        self._throughput.restart()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(Path(self.args.output_dir)) or True
        if isinstance(resume_from_checkpoint, str | Path):
            say_what_differs(self, Path(resume_from_checkpoint))
        self._saved_step = None
        with freed_memory_kept(self.args.device), self._stop_request.listening(), ExitStack() as self._lending:
            if self.model_init is None:  # else `call_model_init` lends the model that it makes
                self._lending.enter_context(self._model_lent())
                self._lending.enter_context(weights_as_trained(self.model))
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self.check_finite()
            told = max(number for (number,) in self._host_counts.gather([self._stop_request.signal or 0]))
            number = self._stop_agreed or told
            if number and self._saved_step != self.state.global_step:  # told after the last step
                self._save_checkpoint(self.model_wrapped, None)
        self._stop_agreed = 0
        self._stop_request.finish(number)
        return output

    def _inner_training_loop(self, *args: Any, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        self._resumed_from = resume_from_checkpoint
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
            # The loss and its sums are float32, whatever the layers compute in.
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
        return super()._inner_training_loop(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            finite = math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm", 0.0))
            if not finite and self.args.nan_loss == "stop":
                self.check_finite()
            self._watch.steps.clear()
            self._leave_out_skipped(logs)
            logs.update(self._metrics["train"].take(self._reduce))
            logs["num_tokens"] = self.num_tokens()
            logs.update(self._throughput.take())
        elif "train_runtime" in logs and (left := self._metrics["train"].take(self._reduce)):
            logs.update(left)  # in the last record: of the steps since the one before
            logs["num_tokens"] = self.num_tokens()
        super().log(logs, start_time)

    def _leave_out_skipped(self, logs: dict[str, float]) -> None:
        """The loss as a mean over the steps that were made; transformers divides by all."""
        steps = self.state.global_step - self._last_logged
        if self._skipped:
            if steps > self._skipped:
                logs["loss"] *= steps / (steps - self._skipped)
            else:
                del logs["loss"]
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]
        self._last_logged, self._skipped = self.state.global_step, 0

    def num_tokens(self) -> int:
        """Trained so far, of all processes, prompts counted with every answer; all of them call it."""
        return sum(count for (count,) in self._host_counts.gather([self._throughput.total_unshared]))

    @property
    def _aside(self) -> Path:
        return Path(self.args.output_dir) / "nan_rows.jsonl"

    def _write_aside(self, step: int, rows: Sequence[int]) -> None:
        self._aside.parent.mkdir(parents=True, exist_ok=True)
        write_aside(self._aside, step, rows, self.train_dataset, self.args.process_index)

    def check_finite(self) -> None:
        """Waits for the device, and raises NotFiniteError for the first step since the last log that went wrong."""
        bad = self._watch.first_bad()
        if bad is None:
            return
        step, loss, norm, rows = bad
        self._write_aside(step, rows)
        some = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise NotFiniteError(
            f"the loss of step {step} is {loss} and its gradient norm {norm}. Rows {some} of the training data "
            f"(counted from 0) made it on this process; they are in {self._aside}. The weights have taken it in: go "
            "back to a checkpoint before it. Look at the rows, lower learning_rate or set max_grad_norm; "
            "nan_loss='skip' leaves such steps out."
        )

    def create_model_card(
        self, model_name: str | None = None, dataset_name: Any = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """Writes README.md into the output folder; the arguments are TRL's, and those of transformers."""
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        if dataset_name is not None:
            kwargs["dataset"] = dataset_name
        super().create_model_card(model_name=model_name, tags=[*self._tags, *tags], **kwargs)

    def _reduce(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, "sum") if self.accelerator.num_processes > 1 else sums

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self._reference.kind == "adapter copy":  # which PEFT has saved, too: the policy is what is wanted
            shutil.rmtree(Path(output_dir or self.args.output_dir) / ADAPTER, ignore_errors=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._throughput.paused():
            if self._watch.steps:
                self.check_finite()
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_state(self, folder)
            super()._save_checkpoint(model, trial)
            self._saved_step = self.state.global_step
            if self.is_world_process_zero():
                self.create_model_card(model_name=Path(self.args.output_dir).name)


def _logs_a_step(args: PreferenceConfig, state: TrainerState) -> bool:
    """Whether a run that begins here comes to a log of its loss."""
    if args.logging_first_step and state.global_step == 0:
        return True
    if args.logging_strategy == "steps":
        return state.global_step // state.logging_steps < state.max_steps // state.logging_steps
    return bool(args.logging_strategy == "epoch")
