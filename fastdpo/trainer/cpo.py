"""CPOTrainer: pairs without a reference: CPO (Xu et al. 2024), SimPO (Meng et al.), AlphaPO (Gupta et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdpo.trainer.config import ReferenceFreeConfig, option
from fastdpo.trainer.constructors import ReferenceFreeTrainer
from fastdpo.types import LossOutput

_LOSSES = ("sigmoid", "simpo", "hinge", "ipo", "alphapo")


@dataclass
class CPOConfig(ReferenceFreeConfig):
    """Options of CPOTrainer: names and defaults of TRL's CPOConfig, and a few of our own (PreferenceConfig).

    loss_type  sigmoid (CPO), simpo, hinge or ipo, without reference; cpo_alpha times the chosen answers' NLL is added;
               alphapo, which is simpo with cpo_alpha=0 and rewards bent by `alpha`
    """

    beta: float = option("Temperature of the preference.", 0.1)
    label_smoothing: float = option("Share of pairs taken to be labelled the wrong way round, in [0, 0.5].", 0.0)
    loss_type: str = option("sigmoid, simpo, hinge, ipo or alphapo.", "sigmoid")
    cpo_alpha: float = option("Weight of the chosen answers' negative log-likelihood.", 1.0)
    simpo_gamma: float = option("SimPO's target margin.", 0.5)
    alpha: float = option("AlphaPO's exponent, for simpo and alphapo; 0 is SimPO.", 0.0)

    def __post_init__(self) -> None:
        if self.loss_type == "alphapo":  # as TRL has it
            self.loss_type, self.cpo_alpha = "simpo", 0.0
        super().__post_init__()

    def _check(self) -> None:
        if self.cpo_alpha < 0:
            raise ValueError(f"cpo_alpha is {self.cpo_alpha}; it must be a number from 0.")
        if self.simpo_gamma != 0.5 and self.loss_type != "simpo":
            raise ValueError(
                f"simpo_gamma={self.simpo_gamma} has no meaning for loss_type={self.loss_type!r}; leave it out, or set "
                "loss_type='simpo'."
            )
        if self.alpha and self.loss_type != "simpo":
            raise ValueError(
                f"alpha={self.alpha} bends the mean log-probs that AlphaPO compares, and loss_type={self.loss_type!r} "
                "is not built on them; set loss_type='alphapo' (or 'simpo'), or leave alpha out."
            )
        super()._check()

    def loss_arguments(self) -> dict[str, Any]:
        if self.loss_type not in _LOSSES:
            raise ValueError(f"loss_type is {self.loss_type!r}; CPOTrainer knows {', '.join(_LOSSES)}.")
        if self.loss_type == "sigmoid":
            own = {"label_smoothing": self.label_smoothing, "cpo_alpha": self.cpo_alpha}
            return {"loss_type": "cpo", "beta": self.beta, **own}
        name = "alphapo" if self.alpha else self.loss_type
        mix: dict[str, Any] = {
            "loss_type": [name],
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
        }
        if self.cpo_alpha:
            mix |= {"loss_type": [name, "sft"], "loss_weights": [1.0, self.cpo_alpha]}
        if self.loss_type != "simpo":
            return mix | {"reference_free": True}
        return mix | {"simpo_gamma": self.simpo_gamma} | ({"alphapo_alpha": self.alpha} if self.alpha else {})


class CPOTrainer(ReferenceFreeTrainer):
    """Trains on pairs without a reference; the constructor is that of TRL's CPOTrainer."""

    args: CPOConfig
    _tags: ClassVar[list[str]] = ["fastdpo", "cpo"]
    _config, _method = CPOConfig, "CPO"

    def _metrics_of(self, output: LossOutput) -> dict[str, Tensor]:
        return {"nll_loss": torch.zeros_like(output.loss), **super()._metrics_of(output)}
