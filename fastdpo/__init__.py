"""fastdpo: preference training (DPO and its relatives), fast and exact.

Importing fastdpo imports neither triton nor transformers; they come with the first name that needs them.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _is_no_advice_on_kernels(record: logging.LogRecord) -> bool:
    return "kernels-community" not in str(record.msg)


# On a CPU with bfloat16 instructions bitsandbytes, which transformers imports where it is installed, warns that PyPI's
# package `kernels` is missing, or, in this repository's root, that the folder of that name is not it. That package only
# speeds up 4-bit inference on the CPU; fastdpo does not need it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_advice_on_kernels)

_HOME = {
    "token_logps": "fastdpo.functional",
    "linear_token_logps": "fastdpo.functional",
    "loss": "fastdpo.functional",
    "linear_loss": "fastdpo.functional",
    "preference_loss": "fastdpo.sums",
    "listwise_loss": "fastdpo.sums",
    "unpaired_loss": "fastdpo.sums",
    "list_losses": "fastdpo.losses",
    "register_loss": "fastdpo.losses",
    "LossOutput": "fastdpo.types",
    "IGNORE_INDEX": "fastdpo.types",
    "batch_loss": "fastdpo.scoring",
    "sequence_logps": "fastdpo.scoring",
    "PreferenceBatch": "fastdpo.packing",
    "PreferenceCollator": "fastdpo.packing",
    "ReferenceCache": "fastdpo.reference",
    "precompute": "fastdpo.reference",
    "DPOConfig": "fastdpo.trainer",
    "DPOTrainer": "fastdpo.trainer",
    "KTOConfig": "fastdpo.trainer",
    "KTOTrainer": "fastdpo.trainer",
    "ORPOConfig": "fastdpo.trainer",
    "ORPOTrainer": "fastdpo.trainer",
    "CPOConfig": "fastdpo.trainer",
    "CPOTrainer": "fastdpo.trainer",
    "RewardConfig": "fastdpo.trainer",
    "RewardTrainer": "fastdpo.trainer",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdpo' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


if TYPE_CHECKING:
    from fastdpo.functional import linear_loss, linear_token_logps, loss, token_logps
    from fastdpo.losses import list_losses, register_loss
    from fastdpo.packing import PreferenceBatch, PreferenceCollator
    from fastdpo.reference import ReferenceCache, precompute
    from fastdpo.scoring import batch_loss, sequence_logps
    from fastdpo.sums import listwise_loss, preference_loss, unpaired_loss
    from fastdpo.trainer import (
        CPOConfig,
        CPOTrainer,
        DPOConfig,
        DPOTrainer,
        KTOConfig,
        KTOTrainer,
        ORPOConfig,
        ORPOTrainer,
        RewardConfig,
        RewardTrainer,
    )
    from fastdpo.types import IGNORE_INDEX, LossOutput
