"""ORPOTrainer: pairs without a reference, the odds ratio beside supervised fine-tuning (Hong et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastdpo.trainer.config import ReferenceFreeConfig, option
from fastdpo.trainer.constructors import ReferenceFreeTrainer


@dataclass
class ORPOConfig(ReferenceFreeConfig):
    """Options of ORPOTrainer: names and defaults of TRL's ORPOConfig, and a few of our own (PreferenceConfig)."""

    beta: float = option("Weight of the odds ratio, the paper's lambda.", 0.1)

    def loss_arguments(self) -> dict[str, Any]:
        return {"loss_type": "orpo", "beta": self.beta}


class ORPOTrainer(ReferenceFreeTrainer):
    """Trains on pairs without a reference; the constructor is that of TRL's ORPOTrainer.

    The negative log-likelihood counts the chosen answers' tokens (TRL's the prompts' tokens, too).
    """

    args: ORPOConfig
    _tags: ClassVar[list[str]] = ["fastdpo", "orpo"]
    _config, _method = ORPOConfig, "ORPO"
