"""The names of the losses, what each needs, and which options it honours."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastdpo.losses import paired
from fastdpo.losses.terms import PairTerms


@dataclass(frozen=True)
class LossSpec:
    """One row of the registry.

    fn        (PairTerms, *, beta, **options) -> losses (B,)
    options   names and neutral values of the options it honours; the neutral value changes nothing
    per_pair  the loss of a pair depends on that pair alone, so its gradient can be formed a chunk of pairs at a time
    """

    name: str
    fn: Callable[..., Tensor]
    formula: str
    source: str
    options: Mapping[str, float] = field(default_factory=dict)
    needs_reference: bool = True
    needs_lengths: bool = False
    per_pair: bool = True


REGISTRY: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec(
            "sigmoid",
            paired.sigmoid,
            "-(1-eps) logsigmoid(beta delta) - eps logsigmoid(-beta delta)",
            "Rafailov 2023; Mitchell 2023",
            options={"label_smoothing": 0.0},
        ),
        LossSpec("hinge", paired.hinge, "max(0, 1 - beta delta)", "Zhao 2023; Liu 2023"),
        LossSpec(
            "aot",
            paired.aot,
            "sigmoid of sort(logp_c - logp_r) - sort(ref_c - ref_r)",
            "Melnyk 2024",
            options={"label_smoothing": 0.0},
            per_pair=False,
        ),
        LossSpec(
            "aot_unpaired",
            paired.aot_unpaired,
            "sigmoid of sort(Delta_c) - sort(Delta_r)",
            "Melnyk 2024",
            options={"label_smoothing": 0.0},
            per_pair=False,
        ),
        LossSpec("ipo", paired.ipo, "(Delta_c/L_c - Delta_r/L_r - 1/(2 beta))^2", "Azar 2023", needs_lengths=True),
    )
}

# Options by their neutral value: passing that one to a loss that does not know the option is no mistake.
NEUTRAL: dict[str, float] = {name: value for spec in REGISTRY.values() for name, value in spec.options.items()}


@dataclass(frozen=True)
class WeightedLosses:
    """sum_k weight_k * loss_k(terms), with beta and options bound and checked."""

    parts: tuple[tuple[LossSpec, float], ...]
    beta: float
    options: Mapping[str, Any]

    def __call__(self, terms: PairTerms) -> Tensor:
        total: Tensor | None = None
        for spec, weight in self.parts:
            options = {name: value for name, value in self.options.items() if name in spec.options}
            losses = spec.fn(terms, beta=self.beta, **options)
            if weight != 1.0:
                losses = weight * losses
            total = losses if total is None else total + losses
        assert total is not None
        return total

    @property
    def needs_reference(self) -> bool:
        return any(spec.needs_reference for spec, _ in self.parts)

    @property
    def needs_lengths(self) -> bool:
        return any(spec.needs_lengths for spec, _ in self.parts)

    @property
    def per_pair(self) -> bool:
        return all(spec.per_pair for spec, _ in self.parts)


def get_loss(name: str) -> LossSpec:
    if isinstance(name, str) and name in REGISTRY:
        return REGISTRY[name]
    near = difflib.get_close_matches(str(name), REGISTRY, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"loss_type is {name!r}, which is no known loss.{hint} Known are: {', '.join(REGISTRY)}.")


def resolve_losses(
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None = None,
    *,
    beta: float = 0.1,
    **options: Any,
) -> WeightedLosses:
    """Checks names, weights, beta and options together; raises ValueError that names what does not fit."""
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    if not names:
        raise ValueError(f"loss_type is {loss_type!r}; name at least one loss of: {', '.join(REGISTRY)}.")
    specs = [get_loss(name) for name in names]
    weights = [1.0] * len(names) if loss_weights is None else [float(weight) for weight in loss_weights]
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights has {len(weights)} values and loss_type {len(names)} losses ({', '.join(names)}); "
            "give one weight for each loss."
        )
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}; it must be a number above 0 (0.1 is usual).")
    for option, value in options.items():
        if option not in NEUTRAL:
            raise ValueError(f"{option} is no option of a loss; known are: {', '.join(NEUTRAL)}.")
        if value != NEUTRAL[option] and not any(option in spec.options for spec in specs):
            able = [name for name, spec in REGISTRY.items() if option in spec.options]
            raise ValueError(
                f"{option}={value} has no meaning for loss_type {' + '.join(names)}; "
                f"leave it at {NEUTRAL[option]} or choose a loss that honours it: {', '.join(able)}."
            )
    smoothing = options.get("label_smoothing", 0.0)
    if not 0.0 <= smoothing <= 0.5:
        raise ValueError(f"label_smoothing is {smoothing}; it must lie in [0, 0.5].")
    return WeightedLosses(tuple(zip(specs, weights, strict=True)), beta, dict(options))
