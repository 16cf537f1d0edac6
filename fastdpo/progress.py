"""One progress bar for a training run, with the figures that matter beside it."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback


def show_progress(trainer: Any) -> None:
    """Puts `RunProgress` in the place of transformers' own bar, which prints a dict a log."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(RunProgress())


class RunProgress(TrainerCallback):
    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, desc="training", unit="step", initial=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._bar is None or not logs or "rewards/margins" not in logs:
            return
        self._bar.set_postfix_str(
            f"loss {logs['loss']:.3f}, margin {logs['rewards/margins']:+.2f}, "
            f"accuracy {logs['rewards/accuracies']:.0%}, {logs.get('perf/tokens_per_second', 0):,.0f} tokens/s"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
