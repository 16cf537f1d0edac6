"""Every registered loss with every option as a list of cases, and drawn inputs to call each and its oracle with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import loss_oracle
import torch
from torch import Tensor

import fastdpo
from fastdpo.losses import REGISTRY

DIVERGENCES = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    *(
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
        for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0)
    ),
]
# What a loss cannot do without.
REQUIRED = {"exo_pair": {"label_smoothing": 0.1}}
VALUES: dict[str, tuple] = {
    "label_smoothing": (0.1, 0.5),
    "discopop_tau": (0.5, 5.0),
    "dpop_lambda": (0.0, 2.5),
    "cpo_alpha": (0.0, 0.3),
    "simpo_gamma": (0.0, 1.3),
    "alphapo_alpha": (-0.5, 0.0, 0.1),
    "desirable_weight": (0.0, 1.7),
    "undesirable_weight": (0.0, 0.6),
    "center_rewards_coefficient": (0.01, 2.0),
}
OF_LOSS = {("robust", "label_smoothing"): (0.1, 0.45), ("exo_pair", "label_smoothing"): (1e-3, 0.5)}
MIXES = [
    (("sigmoid", "ipo"), (0.25, 2.0), {}),
    (("sigmoid", "sft"), (1.0, 0.7), {"label_smoothing": 0.1}),
    (("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0), {}),
    (("cpo", "simpo"), None, {"cpo_alpha": 0.5}),
    (("orpo", "hinge"), (1.0, -0.5), {}),
    (("alphapo", "sft"), (1.0, 0.3), {"alphapo_alpha": 0.1}),
    (("cpo", "sigmoid", "sigmoid_norm"), (0.5, 1.0, 2.0), {"f_divergence_type": "forward_kl"}),
    (("sigmoid", "simpo"), None, {"reference_free": True}),
    (("aot", "hinge"), (1.0, 3.0), {"label_smoothing": 0.2}),
    (("exo_pair", "robust"), (2.0, 0.0), {"label_smoothing": 0.2}),
    (("kto", "apo_zero_unpaired"), (0.5, 1.5), {"desirable_weight": 2.0}),
    (("listwise", "listwise"), (0.5, 1.5), {}),
]


@dataclass(frozen=True)
class Case:
    """One loss, or a mix, with options; names of the registry as they were when this file was read."""

    names: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    loss_weights: tuple[float, ...] | None = None

    def __str__(self) -> str:
        told = [str(value) if isinstance(value, str) else f"{key}={value}" for key, value in self.options.items()]
        return "-".join(["+".join(self.names), *told])

    @property
    def specs(self):
        return [REGISTRY[name] for name in self.names]

    @property
    def data(self) -> str:
        return self.specs[0].data

    @property
    def per_pair(self) -> bool:
        return all(spec.per_pair for spec in self.specs)

    @property
    def has_reference(self) -> bool:
        return any(spec.needs_reference for spec in self.specs) and not self.options.get("reference_free")


def plain(name: str) -> Case:
    return Case((name,), REQUIRED.get(name, {}))


def cases() -> list[Case]:
    found = []
    for name, spec in REGISTRY.items():
        base = plain(name)
        found.append(base)
        for option in spec.options:
            for value in OF_LOSS.get((name, option), VALUES[option]):
                found.append(replace(base, options={**base.options, option: value}))
        if "f_divergence_type" in spec.pieces:
            found += [replace(base, options={**base.options, **chosen}) for chosen in DIVERGENCES]
        if "reference_free" in spec.pieces:
            found.append(replace(base, options={**base.options, "reference_free": True}))
    return found + [Case(names, options, weights) for names, weights, options in MIXES]


CASES = cases()
PLAIN = [plain(name) for name in REGISTRY]


@dataclass(frozen=True)
class Inputs:
    """B groups; `logps` are the leaves: (chosen, rejected) of pairs and scores, (logps,) of lists and answers."""

    case: Case
    logps: tuple[Tensor, ...]
    refs: tuple[Tensor, ...] | None
    lengths: tuple[Tensor, Tensor] | None = None
    sizes: tuple[int, ...] | None = None
    desirable: Tensor | None = None
    kl: float | None = None
    margins: Tensor | None = None
    pair_weights: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.sizes) if self.sizes else len(self.logps[0])

    def call(self, *logps: Tensor, **options: Any) -> fastdpo.LossOutput:
        """fastdpo on these inputs, with other leaves where some are given."""
        case, logps = self.case, logps or self.logps
        options = {**case.options, "pair_weights": self.pair_weights, **options}
        options |= {"loss_type": case.names if len(case.names) > 1 else case.names[0]}
        options |= {"loss_weights": case.loss_weights}
        if case.data == "lists":
            return fastdpo.listwise_loss(*logps, *(self.refs or ()), list_sizes=self.sizes, **options)
        if case.data == "answers":
            if self.kl is not None:
                options = {"kl": self.kl, **options}
            return fastdpo.unpaired_loss(*logps, *(self.refs or ()), desirable=self.desirable, **options)
        if any(spec.needs_lengths for spec in case.specs):
            options |= dict(zip(("chosen_lengths", "rejected_lengths"), self.lengths, strict=True))
        if case.data == "scores":
            options |= {"margins": self.margins}
        return fastdpo.preference_loss(*logps, *(self.refs or ()), **options)

    def truth(self, beta: float) -> Tensor:
        """(B,) unweighted losses by the oracle."""
        weights = self.case.loss_weights or (1.0,) * len(self.case.names)
        return sum(w * self._truth(name, beta) for name, w in zip(self.case.names, weights, strict=True))

    def _truth(self, name: str, beta: float) -> Tensor:
        options, pieces = dict(self.case.options), REGISTRY[name].pieces
        options.pop("reference_free", None)
        kind, alpha = options.pop("f_divergence_type", "reverse_kl"), options.pop("f_alpha_divergence_coef", 0.5)
        if self.case.data == "answers":
            return loss_oracle.answer_losses(
                name, *self.logps, *self.refs, self.desirable, beta, kl=self.kl or 0, **options
            )
        divergence = {"divergence": kind, "alpha": alpha} if "f_divergence_type" in pieces else {}
        if self.case.data == "lists":
            refs = self.refs[0] if self.refs else None
            return loss_oracle.ranked_losses(*self.logps, refs, self.sizes, beta, **divergence)
        return loss_oracle.pair_losses(
            name, *self.logps, *(self.refs or (None, None)), beta, lengths=self.lengths, margins=self.margins,
            pair_weights=self.pair_weights, **divergence, **options,
        )  # fmt: skip

    def part(self, groups: Sequence[int]) -> Inputs:
        """Of these groups alone, in this order."""
        groups, rows = list(groups), list(groups)
        if self.sizes:
            starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
            rows = [starts[i] + k for i in groups for k in range(self.sizes[i])]

        def taken(tensors, indices):
            return None if tensors is None else tuple(tensor[indices] for tensor in tensors)

        return replace(
            self,
            logps=taken(self.logps, rows),
            refs=taken(self.refs, rows),
            lengths=taken(self.lengths, groups),
            sizes=tuple(self.sizes[i] for i in groups) if self.sizes else None,
            desirable=None if self.desirable is None else self.desirable[groups],
            margins=None if self.margins is None else self.margins[groups],
            pair_weights=None if self.pair_weights is None else self.pair_weights[groups],
        )

    def leaves(self) -> Inputs:
        """The same with log-probs that take a gradient."""
        return replace(self, logps=tuple(tensor.detach().clone().requires_grad_() for tensor in self.logps))


def drawn(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, count: int = 6) -> Inputs:
    """Inputs of `count` pairs, or lists of 2 to 5, or answers; log-ratios small enough for the oracle's naive exp."""
    spread = 0.7 if "f_divergence_type" in case.options else 1.5
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    sizes = tuple(2 + (3 * i + seed) % 4 for i in range(count)) if case.data == "lists" else None
    size, number = sum(sizes) if sizes else count, 1 if case.data in ("lists", "answers") else 2
    refs = tuple((-20 + 5 * normal(size)).to(dtype) for _ in range(number))
    if case.data == "scores":
        logps = tuple((2 * normal(size)).to(dtype) for _ in range(number))
    else:
        logps = tuple((ref.double() + spread * normal(size)).to(dtype) for ref in refs)
    if case.options.get("reference_free"):
        logps = tuple((spread * normal(size)).to(dtype) for _ in range(number))
    lengths = torch.randint(1, 30, (2, count), generator=generator)
    return Inputs(
        case,
        logps,
        refs if case.has_reference else None,
        (lengths[0].to(dtype), lengths[1].to(dtype)),
        sizes,
        torch.arange(count) % 3 != 1 if case.data == "answers" else None,
        0.4 if case.data == "answers" and any(spec.needs_kl for spec in case.specs) else None,
        normal(size).to(dtype) if case.data == "scores" else None,
    ).leaves()
