"""Preference losses: pure functions of terms, the registry that names them, and what checks names and options.

terms.py             what a loss is a function of: PairTerms, ListTerms, AnswerTerms
divergence.py        f-divergences: scores of log-ratios
paired.py, reference_free.py, listwise.py, unpaired.py, reward.py     the functions
registry.py          one row a loss; register_loss for the user's own (tried out by probe.py)
resolve.py           names, weights and options, checked together -> WeightedLosses
catalogue.py         the registry as a table
"""

from fastdpo.losses.catalogue import list_losses
from fastdpo.losses.divergence import Divergence
from fastdpo.losses.registry import REGISTRY, LossSpec, get_loss, register_loss
from fastdpo.losses.resolve import WeightedLosses, resolve_losses
from fastdpo.losses.terms import AnswerTerms, ListTerms, PairTerms, Terms

__all__ = [
    "REGISTRY",
    "AnswerTerms",
    "Divergence",
    "ListTerms",
    "LossSpec",
    "PairTerms",
    "Terms",
    "WeightedLosses",
    "get_loss",
    "list_losses",
    "register_loss",
    "resolve_losses",
]
