"""From what a user asks for to a loss that can be called: names, weights and options, checked together."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdpo.losses.divergence import DIVERGENCES, REVERSE_KL, Divergence
from fastdpo.losses.registry import PIECES, REGISTRY, LossSpec, get_loss
from fastdpo.losses.terms import Terms


def _is_number(value: Any) -> bool:
    """A finite number, in a form that torch.compile can follow for a number that changes from call to call."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    largest: Any = sys.float_info.max
    return bool(-largest <= value <= largest)


def _at_least_0(value: Any) -> bool:
    return _is_number(value) and value >= 0


# Range of each option, whatever the loss: name -> (test, what must hold).
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "label_smoothing": (lambda value: _is_number(value) and 0 <= value <= 0.5, "must lie in [0, 0.5]"),
    "discopop_tau": (lambda value: _is_number(value) and value > 0, "must be a number above 0"),
    "dpop_lambda": (_at_least_0, "must be a number from 0"),
    "cpo_alpha": (_at_least_0, "must be a number from 0"),
    "simpo_gamma": (_at_least_0, "must be a number from 0"),
    "alphapo_alpha": (_is_number, "must be a number"),
    "desirable_weight": (_at_least_0, "must be a number from 0"),
    "undesirable_weight": (_at_least_0, "must be a number from 0"),
    "center_rewards_coefficient": (_at_least_0, "must be a number from 0"),
    "f_divergence_type": (lambda value: value in DIVERGENCES, f"must be one of {', '.join(DIVERGENCES)}"),
    "f_alpha_divergence_coef": (_is_number, "must be a number"),
    "ld_alpha": (lambda value: value is None or (_is_number(value) and 0 <= value <= 1), "must lie in [0, 1], or None"),
    "use_weighting": (lambda value: isinstance(value, bool), "must be True or False"),
    "reference_free": (lambda value: isinstance(value, bool), "must be True or False"),
}


@dataclass(frozen=True)
class WeightedLosses:
    """sum_k weight_k * loss_k(terms), with beta and options bound and checked.

    options  of the losses' own, by name
    pieces   values of all of PIECES
    """

    parts: tuple[tuple[LossSpec, float], ...]
    beta: float
    options: Mapping[str, Any]
    pieces: Mapping[str, Any]

    def __call__(self, terms: Terms, plain: Terms | None = None, policy_weights: Tensor | None = None) -> Tensor:
        """(B,) losses.

        Args:
            plain: the terms without `ld_alpha`, for the losses of a mix that do not honour it.
            policy_weights: (B,) of WPO, for those that do.
        """
        total: Tensor | None = None
        for spec, weight in self.parts:
            mine = plain if plain is not None and "ld_alpha" not in spec.pieces else terms
            if "f_divergence_type" not in spec.pieces and terms.divergence is not REVERSE_KL:
                mine = mine.with_divergence(REVERSE_KL)
            losses = spec.fn(mine, beta=self.beta, **self._options_of(spec))
            if policy_weights is not None and "use_weighting" in spec.pieces:
                losses = policy_weights * losses
            if weight != 1.0:
                losses = weight * losses
            total = losses if total is None else total + losses
        assert total is not None
        return total

    def _options_of(self, spec: LossSpec) -> dict[str, Any]:
        return {name: self.options.get(name, default) for name, default in spec.options.items()}

    def own_rewards(self, terms: Terms) -> tuple[Tensor, Tensor] | None:
        """The implicit rewards of chosen and rejected, where the first loss defines them itself."""
        spec = self.parts[0][0]
        return None if spec.rewards is None else spec.rewards(terms, beta=self.beta, **self._options_of(spec))

    @property
    def divergence(self) -> Divergence:
        if self.pieces["f_divergence_type"] == "reverse_kl":
            return REVERSE_KL
        return Divergence(self.pieces["f_divergence_type"], self.pieces["f_alpha_divergence_coef"])

    @property
    def names(self) -> str:
        return " + ".join(spec.name for spec, _ in self.parts)

    @property
    def data(self) -> str:
        return self.parts[0][0].data

    @property
    def ld_alpha(self) -> float | None:
        return self.pieces["ld_alpha"]

    @property
    def use_weighting(self) -> bool:
        return bool(self.pieces["use_weighting"])

    @property
    def reference_free(self) -> bool:
        return bool(self.pieces["reference_free"])

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free and any(spec.needs_reference for spec, _ in self.parts)

    @property
    def needs_lengths(self) -> bool:
        return any(spec.needs_lengths for spec, _ in self.parts)

    @property
    def needs_kl(self) -> bool:
        return any(spec.needs_kl for spec, _ in self.parts)

    @property
    def per_pair(self) -> bool:
        return all(spec.per_pair for spec, _ in self.parts)

    def extras(self, terms: Terms) -> dict[str, Tensor] | None:
        """What the losses report besides, by name."""
        given = [spec.extras(terms) for spec, _ in self.parts if spec.extras is not None]
        return {name: value for values in given for name, value in values.items()} or None

    @property
    def mean_rewards(self) -> bool:
        return self.parts[0][0].mean_rewards


def resolve_losses(
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None = None,
    *,
    beta: float = 0.1,
    **options: Any,
) -> WeightedLosses:
    """Checks names, weights, beta and options together; raises ValueError that names what does not fit."""
    if not isinstance(loss_type, str | Sequence):
        raise ValueError(f"loss_type is {loss_type!r}; it must be the name of a loss, or a list of names.")
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    if not names:
        raise ValueError(f"loss_type is {loss_type!r}; name at least one loss of: {', '.join(REGISTRY)}.")
    specs = [get_loss(name) for name in names]
    kinds = {spec.data: spec.name for spec in specs}
    if len(kinds) > 1:
        told = " and ".join(f"{name} (of {data})" for data, name in kinds.items())
        raise ValueError(f"loss_type mixes {told}, which are functions of different data; mix losses of one kind.")
    if not (_is_number(beta) and beta > 0):
        raise ValueError(f"beta is {beta}; it must be a number above 0 (0.1 is usual).")
    weights = _weights(loss_weights, names)
    for option, value in options.items():
        _check_option(option, value, specs)
    pieces = {name: options.pop(name, neutral) for name, neutral in PIECES.items()}
    _check_together(pieces, specs)
    for spec in specs:
        for name, (holds, what) in spec.requires.items():
            value = options.get(name, spec.options[name])
            if not holds(value):
                raise ValueError(f"{name} is {value}; for loss_type {spec.name} it {what}.")
    return WeightedLosses(tuple(zip(specs, weights, strict=True)), float(beta), dict(options), pieces)


def _weights(loss_weights: Sequence[float] | None, names: list[str]) -> list[float]:
    if loss_weights is None:
        return [1.0] * len(names)
    if isinstance(loss_weights, str) or not isinstance(loss_weights, Iterable):
        raise ValueError(f"loss_weights is {loss_weights!r}; it must be a list, one number for each loss.")
    weights = list(loss_weights)
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights has {len(weights)} values and loss_type {len(names)} losses ({', '.join(names)}); "
            "give one weight for each loss."
        )
    for name, weight in zip(names, weights, strict=True):
        if not _is_number(weight):
            raise ValueError(f"loss_weights gives {name} the weight {weight!r}; it must be a number.")
    return [float(weight) for weight in weights]


def _check_option(option: str, value: Any, specs: list[LossSpec]) -> None:
    able = [spec for spec in REGISTRY.values() if option in spec.honours]
    if not able:
        known = dict.fromkeys(name for spec in REGISTRY.values() for name in spec.honours)
        raise ValueError(f"{option} is no option of a loss; known are: {', '.join(known)}.")
    if option in _RANGES:
        holds, what = _RANGES[option]
        if not holds(value):
            raise ValueError(f"{option} is {value!r}; it {what}.")
    if any(option in spec.honours for spec in specs):
        return
    # Passing the value that changes nothing to a loss that does not know the option is no mistake.
    neutral = PIECES[option] if option in PIECES else able[0].options[option]
    if value != neutral:
        raise ValueError(
            f"{option}={value} has no meaning for loss_type {' + '.join(spec.name for spec in specs)}; "
            f"leave it at {neutral} or choose a loss that honours it: {', '.join(spec.name for spec in able)}."
        )


def _check_together(pieces: Mapping[str, Any], specs: list[LossSpec]) -> None:
    coef, kind = pieces["f_alpha_divergence_coef"], pieces["f_divergence_type"]
    if coef != PIECES["f_alpha_divergence_coef"] and kind != "alpha_divergence":
        raise ValueError(
            f"f_alpha_divergence_coef={coef} has no meaning with f_divergence_type={kind!r}; "
            "set f_divergence_type='alpha_divergence', or leave the coefficient out."
        )
    for option in ("ld_alpha", "reference_free", "f_divergence_type"):
        # The references are summed with ld_alpha, or not there at all, and a divergence is that of the whole objective:
        # for every loss of a mix alike.
        unable = [spec.name for spec in specs if spec.needs_reference and option not in spec.pieces]
        if pieces[option] != PIECES[option] and unable:
            raise ValueError(f"{option}={pieces[option]} has no meaning for {unable[0]} in this mix; leave one out.")
