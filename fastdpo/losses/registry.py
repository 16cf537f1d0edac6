"""The names of the losses: what each is a function of, what it needs, and which options it honours."""

from __future__ import annotations

import difflib
import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastdpo.losses import listwise, paired, reference_free, reward, unpaired

DATA = {
    "pairs": "a chosen and a rejected answer to each prompt",
    "lists": "K ranked answers to each prompt",
    "answers": "single answers, each desirable or not",
    "scores": "a reward model's scores of a chosen and a rejected answer",
}

# Arguments of the functions that take a loss's options, which are therefore none.
_ARGUMENTS = frozenset({
    "beta", "loss_type", "loss_weights", "reduction", "ref_logps", "pair_weights", "margins", "lengths",
    "chosen_lengths", "rejected_lengths", "mean_chosen_length", "list_sizes", "ranks", "desirable", "kl", "kl_logps",
    "ref_kl_logps", "sequence_ids", "tokens_per_pair", "ignore_index", "temperature", "softcap", "logit_scale", "impl",
    "token_metrics", "inplace_backward", "bias", "head_dtype", "head_grad_scale", "memory_budget",
    "attention_backend", "router_aux_loss_coef",
})  # fmt: skip

# Options that act on what a loss is a function of, not on the loss: the value that changes nothing.
PIECES: dict[str, Any] = {
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "reference_free": False,
}
_DIVERGENCE = frozenset({"f_divergence_type", "f_alpha_divergence_coef"})
_SUMS = frozenset({"ld_alpha", "use_weighting", "reference_free"})


@dataclass(frozen=True)
class LossSpec:
    """One row of the registry.

    fn               (PairTerms | ListTerms | AnswerTerms, *, beta, **options) -> losses (B,)
    formula, source  for people
    data             "pairs", "lists", "answers" or "scores": which terms `fn` takes (those of scores are PairTerms)
    options          names and defaults of the keywords that `fn` takes
    pieces           which of PIECES it honours
    needs_reference, needs_lengths, needs_kl  what must be given beside the policy's log-probs
    per_pair         the loss of a pair (list, answer) depends on that alone, so its gradient can be formed a chunk of
                     pairs at a time, and single pairs can be weighted
    extras           terms -> further means to report, by name; called without gradient
    mean_rewards     the implicit reward is beta * logp / L, not beta times the score
    rewards          (terms, *, beta, **options) -> the implicit rewards of chosen and rejected, where they are neither
    requires         range of an option that this loss alone asks for: name -> (test, what must hold)
    """

    name: str
    fn: Callable[..., Tensor]
    formula: str = ""
    source: str = ""
    data: str = "pairs"
    options: Mapping[str, Any] = field(default_factory=dict)
    pieces: frozenset[str] = frozenset()
    needs_reference: bool = True
    needs_lengths: bool = False
    needs_kl: bool = False
    per_pair: bool = True
    mean_rewards: bool = False
    rewards: Callable[..., tuple[Tensor, Tensor]] | None = None
    extras: Callable[..., dict[str, Tensor]] | None = None
    requires: Mapping[str, tuple[Callable[[Any], bool], str]] = field(default_factory=dict)

    @property
    def honours(self) -> tuple[str, ...]:
        """All options that it can carry out."""
        return (*self.options, *(name for name in PIECES if name in self.pieces))

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be given, in words."""
        given = {
            "reference": self.needs_reference,
            "lengths": self.needs_lengths,
            "KL estimate": self.needs_kl,
            "whole batch": not self.per_pair,
        }
        return tuple(name for name, needed in given.items() if needed)


_SMOOTHING = {"label_smoothing": 0.0}
_WEIGHTS = {"desirable_weight": 1.0, "undesirable_weight": 1.0}

REGISTRY: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec(
            "sigmoid",
            paired.sigmoid,
            "-(1-ε) logσ(βδ) - ε logσ(-βδ)",
            "Rafailov 2023 (2305.18290); Mitchell 2023",
            options=_SMOOTHING,
            pieces=_DIVERGENCE | _SUMS,
        ),
        LossSpec(
            "hinge",
            paired.hinge,
            "max(0, 1 - βδ)",
            "Zhao 2023 (2305.10425); Liu 2023 (2309.06657)",
            pieces=_DIVERGENCE | _SUMS,
        ),
        LossSpec(
            "ipo",
            paired.ipo,
            "(s_c/L_c - s_r/L_r - 1/(2β))²",
            "Azar 2023 (2310.12036)",
            pieces=_DIVERGENCE | _SUMS,
            needs_lengths=True,
        ),
        LossSpec(
            "exo_pair",
            paired.exo_pair,
            "σ(βδ)(logσ(βδ) - log(1-ε)) + σ(-βδ)(logσ(-βδ) - log ε)",
            "Ji 2024 (2402.00856)",
            options=_SMOOTHING,
            pieces=_DIVERGENCE | _SUMS,
            requires={"label_smoothing": (lambda value: value > 0, "must be above 0 (1e-3 is usual)")},
        ),
        LossSpec(
            "nca_pair",
            paired.nca_pair,
            "-logσ(βΔ_c) - ½ logσ(-βΔ_c) - ½ logσ(-βΔ_r)",
            "Chen 2024 (2402.05369)",
            pieces=_SUMS,
        ),
        LossSpec(
            "robust",
            paired.robust,
            "(-(1-ε) logσ(βδ) + ε logσ(-βδ)) / (1-2ε)",
            "Chowdhury 2024 (2403.00409)",
            options=_SMOOTHING,
            pieces=_DIVERGENCE | _SUMS,
            requires={"label_smoothing": (lambda value: value < 0.5, "must be below 0.5")},
        ),
        LossSpec("bco_pair", paired.bco_pair, "-logσ(βΔ_c) - logσ(-βΔ_r)", "Jung 2024 (2404.04656)", pieces=_SUMS),
        LossSpec("sppo_hard", paired.sppo_hard, "(Δ_c - ½/β)² + (Δ_r + ½/β)²", "Wu 2024 (2405.00675)", pieces=_SUMS),
        LossSpec(
            "aot",
            paired.aot,
            "sigmoid on sort(logp_c - logp_r) - sort(ref_c - ref_r)",
            "Melnyk 2024 (2406.05882)",
            options=_SMOOTHING,
            pieces=_SUMS - {"use_weighting"},
            per_pair=False,
        ),
        LossSpec(
            "aot_unpaired",
            paired.aot_unpaired,
            "sigmoid on sort(Δ_c) - sort(Δ_r)",
            "Melnyk 2024 (2406.05882)",
            options=_SMOOTHING,
            pieces=_SUMS - {"use_weighting"},
            per_pair=False,
        ),
        LossSpec("apo_zero", paired.apo_zero, "1 - σ(βΔ_c) + σ(βΔ_r)", "D'Oosterlinck 2024 (2408.06266)", pieces=_SUMS),
        LossSpec(
            "apo_down",
            paired.apo_down,
            "σ(βΔ_c) + 1 - σ(β(Δ_c - Δ_r))",
            "D'Oosterlinck 2024 (2408.06266)",
            pieces=_SUMS,
        ),
        LossSpec(
            "discopop",
            paired.discopop,
            "-(1-m) logσ(βδ) + m e^(-βδ), m = σ(βδ/τ)",
            "Lu 2024 (2406.08414)",
            options={"discopop_tau": 0.05},
            pieces=_DIVERGENCE | _SUMS,
        ),
        LossSpec(
            "sigmoid_norm",
            paired.sigmoid_norm,
            "-logσ(β(s_c/L_c - s_r/L_r))",
            "Lambert 2024 (2411.15124)",
            pieces=_DIVERGENCE | _SUMS,
            needs_lengths=True,
        ),
        LossSpec(
            "dpop",
            paired.dpop,
            "-logσ(β(Δ_c - Δ_r - λ max(0, -Δ_c)))",
            "Pal 2024 (2402.13228)",
            options={"dpop_lambda": 50.0},
            pieces=_SUMS,
        ),
        LossSpec(
            "sft",
            reference_free.sft,
            "NLL_c, the mean over all tokens of chosen answers",
            "Pang 2024 (2404.19733); Wang 2024 (2411.10442)",
            needs_reference=False,
            needs_lengths=True,
            extras=reference_free.nll_extras,
        ),
        LossSpec(
            "orpo",
            reference_free.orpo,
            "NLL_c - β logσ(log odds_c - log odds_r), odds of e^(logp/L)",
            "Hong 2024 (2403.07691)",
            needs_reference=False,
            needs_lengths=True,
            mean_rewards=True,
            extras=reference_free.orpo_extras,
        ),
        LossSpec(
            "simpo",
            reference_free.simpo,
            "sigmoid on β(logp_c/L_c - logp_r/L_r) - γ",
            "Meng 2024 (2405.14734)",
            options={**_SMOOTHING, "simpo_gamma": 0.5},
            pieces=frozenset({"use_weighting"}),
            needs_reference=False,
            needs_lengths=True,
            mean_rewards=True,
        ),
        LossSpec(
            "alphapo",
            reference_free.alphapo,
            "sigmoid on β(r_c - r_r) - γ, r = (1 - e^(-α logp/L)) / α",
            "Gupta 2025 (2501.03884)",
            options={**_SMOOTHING, "simpo_gamma": 0.5, "alphapo_alpha": 0.25},
            pieces=frozenset({"use_weighting"}),
            needs_reference=False,
            needs_lengths=True,
            rewards=reference_free.alphapo_rewards,
        ),
        LossSpec(
            "cpo",
            reference_free.cpo,
            "sigmoid on β(logp_c - logp_r), plus α NLL_c",
            "Xu 2024 (2401.08417)",
            options={**_SMOOTHING, "cpo_alpha": 1.0},
            needs_reference=False,
            needs_lengths=True,
            extras=reference_free.nll_extras,
        ),
        LossSpec(
            "listwise",
            listwise.listwise,
            "-Σ_k log softmax(βs_k ... βs_K)_k",
            "Rafailov 2023 (2305.18290, A.3)",
            data="lists",
            pieces=_DIVERGENCE | {"reference_free"},
        ),
        LossSpec(
            "kto",
            unpaired.kto,
            "w_d (1 - σ(β(Δ - kl))) or w_u (1 - σ(β(kl - Δ)))",
            "Ethayarajh 2024 (2402.01306)",
            data="answers",
            options=_WEIGHTS,
            needs_kl=True,
        ),
        LossSpec(
            "apo_zero_unpaired",
            unpaired.apo_zero_unpaired,
            "w_d (1 - σ(βΔ)) or w_u σ(βΔ)",
            "D'Oosterlinck 2024 (2408.06266)",
            data="answers",
            options=_WEIGHTS,
        ),
        LossSpec(
            "reward",
            reward.reward,
            "-logσ(r_c - r_r - margin) + c (r_c + r_r)²",
            "Bradley & Terry 1952; Ouyang 2022 (2203.02155)",
            data="scores",
            options={"center_rewards_coefficient": 0.0},
            needs_reference=False,
        ),
    )
}


def get_loss(name: str) -> LossSpec:
    """The registry's row.

    Raises:
        ValueError: no such loss; the message names all, the nearest first.
    """
    if isinstance(name, str) and name in REGISTRY:
        return REGISTRY[name]
    near = difflib.get_close_matches(str(name), REGISTRY, n=len(REGISTRY), cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    names = [*near, *(known for known in REGISTRY if known not in near)]
    raise ValueError(f"loss_type is {name!r}, which is no known loss.{hint} Known are: {', '.join(names)}.")


def register_loss(
    name: str,
    fn: Callable[..., Tensor] | None = None,
    *,
    formula: str = "",
    source: str = "",
    data: str = "pairs",
    options: Mapping[str, Any] | None = None,
    pieces: Any = (),
    needs_reference: bool = True,
    needs_lengths: bool = False,
    needs_kl: bool = False,
    per_pair: bool = True,
    overwrite: bool = False,
) -> Callable[..., Any]:
    """Makes `fn` a loss like any other, under `name`: for `preference_loss`, `loss`, `linear_loss` and the trainers.

        @fastdpo.register_loss("squared", formula="(1 - βδ)²")
        def squared(terms, *, beta):
            return (1 - beta * terms.delta) ** 2

    Args:
        fn: a pure function (terms, *, beta, **options) -> (B,), in PyTorch, differentiable; without it, a decorator.
            `terms` is a `fastdpo.losses.PairTerms`, or what `data` says.
        data: "pairs", "lists" (ListTerms), "answers" (AnswerTerms) or "scores" (PairTerms).
        options: names and defaults of the keywords that `fn` takes beside `beta`.
        pieces: which of f_divergence_type, f_alpha_divergence_coef, ld_alpha, use_weighting, reference_free it
            honours; the first two need it to be a function of `terms.delta` or of the scores.
        needs_reference, needs_lengths, needs_kl: what must be given beside the policy's log-probs.
        per_pair: whether the loss of a pair depends on that pair alone.
        overwrite: replace a loss of this name.

    Returns:
        fn.

    Raises:
        ValueError: the name is taken; `fn` on a drawn batch of five does not give (5,) finite, differentiable losses,
            or the loss of a pair changes with the others in spite of per_pair=True.
    """
    if fn is None:
        arguments = locals()
        chosen = {key: arguments[key] for key in arguments if key not in ("name", "fn")}
        return lambda function: register_loss(name, function, **chosen)
    from fastdpo.losses.probe import loss_problem

    if not (isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)):
        raise ValueError(f"the name of a loss is {name!r}; it must be a word of letters, digits and underscores.")
    if name in REGISTRY and not overwrite:
        raise ValueError(f"a loss {name!r} is registered already; take another name, or pass overwrite=True.")
    if data not in DATA:
        raise ValueError(f"data is {data!r}; it must be one of {', '.join(map(repr, DATA))}.")
    unknown = sorted(set(pieces) - set(PIECES))
    if unknown:
        raise ValueError(f"pieces has {unknown[0]!r}; known are: {', '.join(PIECES)}.")
    spec = LossSpec(
        name, fn, formula, source, data, dict(options or {}), frozenset(pieces), needs_reference, needs_lengths,
        needs_kl, per_pair,
    )  # fmt: skip
    _check_declared(spec)
    problem = loss_problem(spec)
    if problem is not None:
        raise ValueError(f"the loss {name!r} cannot be registered: {problem}")
    REGISTRY[name] = spec
    return fn


def _check_declared(spec: LossSpec) -> None:
    """That what a loss says of itself can be carried out for its data."""
    able = {"pairs": _DIVERGENCE | _SUMS, "lists": _DIVERGENCE | {"reference_free"}}.get(spec.data, frozenset())
    unable = sorted(spec.pieces - able)
    if unable:
        raise ValueError(f"pieces has {unable[0]!r}, which has no meaning for losses of {spec.data}; leave it out.")
    if spec.needs_kl and spec.data != "answers":
        raise ValueError(f"needs_kl=True has no meaning for losses of {spec.data}; it is for answers.")
    known = {name: value for other in REGISTRY.values() for name, value in other.options.items()}
    for option, value in spec.options.items():
        if option in PIECES or option in _ARGUMENTS or not option.isidentifier():
            raise ValueError(
                f"the option {option!r} of loss {spec.name!r} has a meaning already, or is no name; give it another."
            )
        if option in known and known[option] != value:
            raise ValueError(
                f"the option {option!r} has the default {known[option]} in other losses and {value} here; keep that, "
                "or give it another name."
            )
