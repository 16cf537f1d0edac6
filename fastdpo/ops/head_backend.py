"""Kernels of other packages that give log-probs from hidden states with no logits in memory.

Written in NVIDIA's CuTe DSL, they take the log-sum-exp of the logits where the matrix product ends, before anything is
written. Installed and verified, they run what needs neither a gradient nor token statistics: references, sums of
completions, the KL estimate of `kto`.

Gradients stay ours. quack's are of a mean or sum of log-probs, not of each. Liger's are, but it sums the head's over
tiles in bfloat16, and forms that of a frozen head, too. Nor can ours be formed with a log-sum-exp of theirs: it is that
of logits in float32, and of logits rounded to bfloat16, which the backward forms again, it makes probabilities that do
not add up to 1.

The environment variable FASTDPO_HEAD_BACKEND chooses:

    auto    (or unset) the first of `BACKENDS` that is installed, runs on this GPU and agrees with our own kernels
    none    always our own
    <name>  that one; ValueError where it is not installed, does not run on this GPU or does not agree

Any other call (another dtype, a softcap, a bias, `impl` other than "auto", ...) runs on our own kernels.
FLOP counters do not see the products of a backend.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastdpo_kernels import linear_logprobs as kernel

logger = logging.getLogger(__name__)

VARIABLE = "FASTDPO_HEAD_BACKEND"
_ROWS = 200  # of the problem that a backend is verified on; no multiple of any tile
_TINY = 1e-4  # nats, beside twice the error of our own kernels

# hidden (N, D), weight (V, D), labels (N,) in [0, V) -> logps (N,) in float32
Score = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeadBackend:
    """A package's kernel for bfloat16 hidden states and weight.

    package       the distribution; module: what of it is imported
    load          () -> the function; raises ImportError
    capabilities  of the GPUs that it is written for
    multiples     (of D, of V) that it takes
    """

    name: str
    package: str
    module: str
    load: Callable[[], Score]
    capabilities: tuple[tuple[int, int], ...]
    multiples: tuple[int, int]

    def takes(self, weight: Tensor) -> bool:
        vocabulary, width = weight.shape
        return width % self.multiples[0] == 0 and vocabulary % self.multiples[1] == 0


def _load_quack() -> Score:
    epilogue = importlib.import_module("quack.epilogue.library").lse_target_epi

    def score(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        found = epilogue(hidden, weight.mT, store_d=False, target=labels, tuned=False)
        logps: Tensor = found["target_logit"] - found["lse"]
        return logps

    return score


def _load_liger() -> Score:
    operators = "liger_kernel.ops.cutedsl.ops"
    # Not the function around it, which looks at the labels and waits for the GPU to do so.
    forward = importlib.import_module(f"{operators}._fused_scaled_cross_entropy_forward_fragment_sm90")
    set_context = importlib.import_module(f"{operators}.utils").ensure_cuda_context

    def score(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        set_context()
        nll: Tensor = forward.scaled_ce_forward_fragment(hidden, weight, labels)[0]
        return -nll

    return score


BACKENDS = {
    backend.name: backend
    for backend in (
        HeadBackend("quack", "quack-kernels", "quack", _load_quack, ((9, 0),), (8, 128)),
        # A width that is no multiple of 64 it would pad, and copy the weight to do so.
        HeadBackend("liger", "liger-kernel[cutedsl]", "liger_kernel", _load_liger, ((9, 0),), (64, 1)),
    )
}

# The function of a backend that agrees, or why it is not taken, by (backend, device, V, D).
_verified: dict[tuple[str, torch.device, int, int], Score | str] = {}


def head_scores(hidden: Tensor, head: kernel.Head, impl: str) -> Score | None:
    """The function of the backend that serves these hidden states and this head, None for our own kernels.

    Labels are as those of `linear_token_logps`. It waits for the GPU where it tries a backend out: once a process.

    Raises:
        ValueError: FASTDPO_HEAD_BACKEND is unknown, or names a backend that cannot run here.
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "none", *BACKENDS):
        raise ValueError(f"{VARIABLE} is {wanted!r}; it must be auto, none, {' or '.join(BACKENDS)}.")
    if wanted == "none" or impl != "auto" or not _is_plain(hidden, head):
        return None
    capability = _capability(hidden.device)
    if capability is None:
        return None
    for backend in BACKENDS.values() if wanted == "auto" else (BACKENDS[wanted],):
        if not backend.takes(head.weight):
            continue
        found = _agreeing(backend, capability, head)
        if not isinstance(found, str):
            return partial(_score, found, head.options["ignore_index"])
        if wanted != "auto":
            raise ValueError(f"{VARIABLE}={wanted} cannot be: {found}. Set it to auto or none.")
    return None


def _is_plain(hidden: Tensor, head: kernel.Head) -> bool:
    return (
        hidden.dtype == head.weight.dtype == torch.bfloat16
        and head.weight.is_contiguous()
        and hidden.shape[0] > 0
        and head.bias is None
        and head.options["softcap"] is None
        and head.options["logit_scale"] == head.options["temperature"]
    )


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Of an NVIDIA GPU; None elsewhere, and where nothing may be tried out."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.get_device_capability(device)


def _agreeing(backend: HeadBackend, capability: tuple[int, int], head: kernel.Head) -> Score | str:
    """The backend's function, or why it is not taken; tried out once a process for each shape of the weight."""
    if capability not in backend.capabilities:
        return f"{backend.package} is not written for GPUs of compute capability {capability[0]}.{capability[1]}"
    key = backend.name, head.weight.device, *head.weight.shape
    if key not in _verified:
        _verified[key] = _try_out(backend, head)
    return _verified[key]


def _try_out(backend: HeadBackend, head: kernel.Head) -> Score | str:
    if importlib.util.find_spec(backend.module) is None:
        return f"{backend.package} is not installed"
    try:
        score = backend.load()
    except (ImportError, AttributeError) as error:  # of Liger without the DSL, say, or another version
        return f"{backend.package} cannot be imported ({error})"
    try:
        why_not = _disagreement(score, head)
    except Exception as error:  # kernels that are compiled at the first call raise what they like
        why_not = f"it raised {type(error).__name__}: {error}"
    if why_not is None:
        logger.info("Log-probs without a gradient come from %s.", backend.package)
        return score
    logger.warning(
        "%s is installed, but its kernel for the language-model head is not used: %s. %s=none keeps it from being "
        "tried.", backend.package, why_not, VARIABLE,
    )  # fmt: skip
    return why_not


@torch.no_grad()
def _disagreement(score: Score, head: kernel.Head) -> str | None:
    """How log-probs of drawn hidden states differ from those in float32 by more than twice as much as our own do in
    bfloat16; None where they do not."""
    (vocabulary, width), device = head.weight.shape, head.weight.device
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(_ROWS, width, device=device, generator=generator).to(head.dtype)
    labels = torch.randint(vocabulary, (_ROWS,), device=device, generator=generator)
    labels[::7] = head.options["ignore_index"]
    own = []
    for each in (replace(head, dtype=torch.float32), head):
        inputs = hidden.to(each.dtype)
        results = kernel.RowResults(inputs, stats=False)
        kernel.fwd(inputs, labels, each, results, each.buffer(_ROWS))
        own.append(results.logps)
    exact, ours = own
    error = (_score(score, head.options["ignore_index"], hidden, head.weight, labels) - exact).abs().max()
    allowed = 2 * (ours - exact).abs().max() + _TINY
    if error <= allowed:
        return None
    return f"its log-probs are off by {float(error):.2g}, and {float(allowed):.2g} is allowed"  # NaN, too


def _score(score: Score, ignore_index: int, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """logps (N,) as ours: 0 where ignored, NaN for labels that are no tokens.

    The kernels are given labels that all are tokens: what they make of others need not concern us.
    """
    known = (labels >= 0) & (labels < weight.shape[0])
    with torch.cuda.device_of(hidden):  # a no-op for CPU tensors
        logps = score(hidden.detach().contiguous(), weight, labels.where(known, 0))
    return logps.where(known, torch.nan).where(labels != ignore_index, 0.0)
