"""DPOTrainer: pairs of a chosen and a rejected answer, or ranked lists, with a reference or without."""

from __future__ import annotations

from typing import ClassVar

from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.constructors import ReferenceTrainer


class DPOTrainer(ReferenceTrainer):
    """Trains on preference pairs or ranked lists; the constructor is that of TRL's DPOTrainer.

    Arguments and errors are those of PreferenceTrainer. `tokenizer` is the older name of `processing_class`.
    """

    args: DPOConfig
    _tags: ClassVar[list[str]] = ["fastdpo", "dpo"]
    _config, _method = DPOConfig, "DPO"
