"""How many bytes of logits a run holds at a time: chosen once for all its processes, and resumed with.

The size of a tile decides how the head's sums are rounded. So it must not follow what happens to be free at each pass,
and a run that goes on from a checkpoint takes the tile that it began with.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from fastdpo.device import free_memory
from fastdpo.models import vocabulary_size
from fastdpo.ops.budget import default_budget, rows_within
from fastdpo.trainer.resuming import STATE

if TYPE_CHECKING:
    from fastdpo.trainer.engine import PreferenceTrainer

logger = logging.getLogger(__name__)

_STATES = 2  # numbers that an optimizer keeps for each that it trains: AdamW's, and no common one keeps more


def choose_budget(trainer: PreferenceTrainer) -> int:
    """The default of `memory_budget` for a trainer's run: the least over the processes, all of which call this."""
    inner, device = trainer._inner(trainer.model), trainer.args.device
    vocabulary, dtype = vocabulary_size(inner), trainer._autocast_dtype or inner.dtype
    own = default_budget(device, _free_for_passes(trainer), vocabulary, dtype)
    budget = min(each for (each,) in trainer._host_counts.gather([own]))
    rows = rows_within(budget, vocabulary, dtype)
    logger.info("The head takes logits of up to %d tokens at a time (memory_budget=%d).", rows, budget)
    return budget


def resume_budget(trainer: PreferenceTrainer, folder: Path) -> None:
    """Takes the budget of the run that wrote a checkpoint, unless the arguments name one; all processes call it.

    Where it is more than half of what is free on some device, the run warns and chooses anew at its first pass.
    """
    if trainer.args.memory_budget is not None:
        return
    try:
        before = json.loads((folder / STATE).read_text()).get("memory_budget") or 0
    except OSError:
        before = 0
    fits = trainer.args.device.type != "cuda" or before <= _free_for_passes(trainer) // 2
    budgets, fit = zip(*trainer._host_counts.gather([before, int(fits)]), strict=True)
    if not before or len(set(budgets)) > 1:  # of a program that kept none
        trainer.memory_budget = None
    elif all(fit):
        trainer.memory_budget = before
    else:
        trainer.memory_budget = None
        logger.warning(
            "%s is of a run that held %d bytes of logits at a time, more than half of what is free here; a smaller "
            "tile is chosen, and the run goes on with sums that are rounded otherwise.", folder, before,
        )  # fmt: skip


def _free_for_passes(trainer: PreferenceTrainer) -> int:
    """Bytes on a GPU that are free, and stay so once gradients and the optimizer's numbers are there; else 0.

    An optimizer that keeps less than AdamW must not leave the head with nothing: a quarter of what is free counts
    whatever is still to come.
    """
    if trainer.args.device.type != "cuda":
        return 0
    free = free_memory(trainer.args.device)
    return max(free - memory_to_come(trainer.model, trainer.optimizer), free // 4)


def memory_to_come(model: Any, optimizer: Any) -> int:
    """Bytes of the gradients that trained parameters do not have yet, and of what AdamW will keep in its first step."""
    trained = [value for value in model.parameters() if value.requires_grad]
    stepped = trained if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
    states = {} if optimizer is None else optimizer.state
    to_come = sum(_bytes(value) for value in trained if value.grad is None)
    return to_come + _STATES * sum(_bytes(value) for value in stepped if value not in states)


def _bytes(value: Tensor) -> int:
    """Of this process's share."""
    return value.to_local().nbytes if isinstance(value, DTensor) else value.nbytes
