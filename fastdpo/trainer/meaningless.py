"""Options of transformers.TrainingArguments that would do nothing, or something wrong, to preference training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Name -> (whether a value is harmless, why another is refused and what to do).
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "label_smoothing_factor": (
        lambda value: not value,
        "it smooths the labels of a cross-entropy, of which there is none; set label_smoothing, the share of pairs "
        "taken to be labelled the wrong way round",
    ),
    "label_names": (
        lambda value: value in (None, [], ["labels"]),
        "batches of preferences have no columns of labels; leave it out",
    ),
    "include_for_metrics": (
        lambda value: not set(value or ()) - {"loss"},
        "only 'loss' can be handed to compute_metrics: a packed row is not one input for each sample",
    ),
    "length_column_name": (
        lambda value: value == "length",
        "lengths are counted from the token ids; leave it out",
    ),
    "bf16_full_eval": (
        lambda value: not value,
        "it would leave the policy in bfloat16 after an evaluation, beside a reference that is not; set bf16=True, "
        "which holds for evaluation, too",
    ),
    "fp16_full_eval": (
        lambda value: not value,
        "it would leave the policy in float16 after an evaluation, beside a reference that is not; set fp16=True, "
        "which holds for evaluation, too",
    ),
    "enable_jit_checkpoint": (
        lambda value: not value,
        "a checkpoint is always written when the run is told to stop by SIGTERM; leave it out",
    ),
}  # fmt: skip


def check_supported(config: Any) -> None:
    """
    Raises:
        ValueError: an option that would be ignored, or leave a model that computes otherwise than before.
    """
    for name, (harmless, reason) in REFUSED.items():
        value = getattr(config, name, None)
        if hasattr(config, name) and not harmless(value):
            raise ValueError(f"{name}={value!r} is not supported: {reason}.")
    if str(getattr(config.save_strategy, "value", config.save_strategy)) == "best" and _is_no(config.eval_strategy):
        raise ValueError(
            "save_strategy='best' saves after evaluations, and eval_strategy is 'no', so nothing would be saved; set "
            "eval_strategy='steps' or 'epoch'."
        )


def check_processes(config: Any) -> None:
    """What has a meaning for one process alone; `config` knows by now how many there are.

    Raises:
        ValueError: means over the pairs of each process.
    """
    if not getattr(config, "average_tokens_across_devices", True) and config.world_size > 1:
        raise ValueError(
            "average_tokens_across_devices=False is not supported: the loss is the mean over the pairs of all "
            "processes; leave it out."
        )


def _is_no(strategy: Any) -> bool:
    return str(getattr(strategy, "value", strategy)) == "no"
