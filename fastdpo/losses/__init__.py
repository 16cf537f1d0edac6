"""Preference losses: pure functions on (B,) tensors, and the registry that names them."""

from fastdpo.losses.registry import REGISTRY, LossSpec, WeightedLosses, get_loss, resolve_losses
from fastdpo.losses.terms import PairTerms

__all__ = ["REGISTRY", "LossSpec", "PairTerms", "WeightedLosses", "get_loss", "resolve_losses"]
