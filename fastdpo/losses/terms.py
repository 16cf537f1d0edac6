"""What a paired loss is a function of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PairTerms:
    """Sums of log-probs over the completions of B pairs; every tensor is (B,).

    The lengths count completion tokens; they are there where the loss asks for them.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None

    @property
    def chosen_logratios(self) -> Tensor:
        """log pi(y_w|x) - log pi_ref(y_w|x)"""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """log pi(y_l|x) - log pi_ref(y_l|x)"""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def delta(self) -> Tensor:
        """The difference of the two log-ratios, chosen minus rejected."""
        return self.chosen_logratios - self.rejected_logratios
