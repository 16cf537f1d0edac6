"""The contestants: fastdpo, PyTorch, and the peers that are installed.

A variant makes, for one problem, a function of the problem's inputs. Peers are imported only then, so that any of them
may be missing; nobody's code is changed, and each is called with its own defaults unless its name says otherwise.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from problems import BETA, Problem, naive_logps
from torch import Tensor

import fastdpo
from fastdpo.ops.head_backend import VARIABLE

Function = Callable[..., Tensor]
LOW_BUDGET = 256 << 20


class Unavailable(Exception):
    """The variant cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Variant:
    """A way to do the task of a family.

    make        problem -> function of the problem's leaves; may raise
    package     the distribution that it needs, None for what is always there
    returns     "tokens": log-probs (N,); "sum": their sum; "loss": the DPO loss
    overwrites  writes over the logits that it is given
    padded      takes hidden states as (2 * pairs, length, D), chosen first
    """

    name: str
    make: Callable[[Any], Function]
    package: str | None = None
    returns: str = "tokens"
    overwrites: bool = False
    padded: bool = False
    needs_cuda: bool = False

    def version(self) -> str | None:
        return None if self.package is None else f"{self.package} {importlib.metadata.version(self.package)}"

    def function(self, problem: Problem) -> Function:
        if self.package is not None:
            try:
                importlib.metadata.version(self.package)
            except importlib.metadata.PackageNotFoundError:
                raise Unavailable(f"{self.package} is not installed") from None
        if self.needs_cuda and problem.labels.device.type != "cuda":
            raise Unavailable("needs a CUDA device")
        try:
            return self.make(problem)
        except ImportError as error:
            raise Unavailable(f"cannot be imported: {error}") from error


def fastdpo_logits(problem: Any, **options: Any) -> Function:
    return lambda logits: fastdpo.token_logps(logits, problem.labels, **options)


def fastdpo_head(problem: Any, **options: Any) -> Function:
    return lambda hidden, weight: fastdpo.linear_token_logps(hidden, weight, problem.labels, **options)


def with_backend(name: str, problem: Any) -> Function:
    """`fastdpo_head`, where no gradient is needed on the named package's kernels (`fastdpo.ops.head_backend`)."""
    head = fastdpo_head(problem)

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = name
        try:
            return head(hidden, weight)
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before

    return logps


def fastdpo_dpo(problem: Any, **options: Any) -> Function:
    tokens_per_pair = [2 * problem.length] * problem.pairs

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fastdpo.linear_loss(
            hidden, weight, problem.labels, problem.refs, sequence_ids=problem.sequence_ids,
            tokens_per_pair=tokens_per_pair, beta=BETA, token_metrics=False, **options,
        ).loss  # fmt: skip

    return loss


def eager_logits(problem: Any) -> Function:
    return lambda logits: naive_logps(logits, problem.labels)


def eager_head(problem: Any) -> Function:
    return lambda hidden, weight: naive_logps(hidden @ weight.T, problem.labels)


def compiled(make: Callable[[Any], Function]) -> Callable[[Any], Function]:
    return lambda problem: torch.compile(make(problem), dynamic=False)


def in_pair_loss(variant: Variant) -> Variant:
    """Per-token log-probs of a head, then the DPO loss in plain PyTorch."""

    def make(problem: Any) -> Function:
        tokens = variant.make(problem)
        return lambda hidden, weight: problem.pair_loss(tokens(hidden, weight))

    assert variant.returns == "tokens"
    return replace(variant, make=make, returns="loss")


def trl_logits(problem: Any) -> Function:
    from trl.trainer.utils import selective_log_softmax

    return lambda logits: selective_log_softmax(logits, problem.labels)


def trl_head(problem: Any) -> Function:
    """What its patched `forward` calls, and with the same chunk; without the statistics that it can give besides."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        # bias, targets, temperature, chunk, softcap, logit scale, further outputs
        return ChunkedLogProbFunction.apply(hidden, weight, None, problem.labels, 1.0, chunk, None, 1.0, ())[0]

    return logps


def liger_logits(problem: Any) -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits: -liger_cross_entropy(logits, problem.labels, reduction="none")


def liger_head(problem: Any, **options: Any) -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight: -liger_fused_linear_cross_entropy(hidden, weight, problem.labels, **options)


def liger_dpo(problem: Any) -> Function:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    # It takes no precomputed references; without a reference model they count as zero, as they are here.
    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=problem.labels.device.type == "cuda")
    labels = problem.padded_labels
    return lambda hidden, weight: loss(weight, hidden, labels)[0]


def cce_head(problem: Any, **options: Any) -> Function:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight: -linear_cross_entropy(hidden, weight, problem.labels, reduction="none", **options)


def quack_logits(problem: Any, **options: Any) -> Function:
    from quack.cross_entropy import cross_entropy

    return lambda logits: -cross_entropy(logits, problem.labels, reduction="none", **options)


def quack_head(problem: Any) -> Function:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight: -chunked_linear_cross_entropy(hidden, weight, problem.labels, reduction="sum")


TRL, LIGER, CCE, QUACK = "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels"

_TOKENS_OF_HEAD = (
    Variant("eager", eager_head),
    Variant("TRL", trl_head, TRL),
    # Its default leaves small gradients out of the products.
    Variant("CCE", cce_head, CCE, needs_cuda=True),
    Variant("CCE, no filter", lambda problem: cce_head(problem, filter_eps=None), CCE, needs_cuda=True),
)

VARIANTS: dict[str, tuple[Variant, ...]] = {
    "logits": (
        Variant("fastdpo", fastdpo_logits),
        Variant(
            "fastdpo, in place", lambda problem: fastdpo_logits(problem, inplace_backward=True), overwrites=True
        ),
        Variant("eager", eager_logits),
        Variant("torch.compile", compiled(eager_logits)),
        Variant("TRL", trl_logits, TRL),
        Variant("Liger", liger_logits, LIGER, overwrites=True, needs_cuda=True),
        Variant("quack", quack_logits, QUACK, needs_cuda=True),
        Variant(
            "quack, in place", lambda problem: quack_logits(problem, inplace_backward=True), QUACK, overwrites=True,
            needs_cuda=True,
        ),
    ),
    "head": (
        Variant("fastdpo", fastdpo_head),
        Variant("fastdpo, 256 MiB", lambda problem: fastdpo_head(problem, memory_budget=LOW_BUDGET)),
        Variant("fastdpo, own kernels", lambda problem: with_backend("none", problem)),
        Variant("quack in fastdpo", lambda problem: with_backend("quack", problem), QUACK, needs_cuda=True),
        Variant("Liger in fastdpo", lambda problem: with_backend("liger", problem), LIGER, needs_cuda=True),
        *_TOKENS_OF_HEAD,
        Variant("torch.compile", compiled(eager_head)),
        Variant("Liger", lambda problem: liger_head(problem, reduction="sum"), LIGER, returns="sum", needs_cuda=True),
        Variant(
            "Liger, float32 dW", lambda problem: liger_head(problem, reduction="sum", accum_dtype=torch.float32), LIGER,
            returns="sum", needs_cuda=True,
        ),
        Variant(
            "Liger, per token", lambda problem: liger_head(problem, reduction="none", accum_dtype=torch.float32), LIGER,
            needs_cuda=True,
        ),
        Variant("quack", quack_head, QUACK, returns="sum", needs_cuda=True),
    ),
    "dpo": (
        Variant("fastdpo", fastdpo_dpo, returns="loss"),
        Variant("fastdpo, 256 MiB", lambda problem: fastdpo_dpo(problem, memory_budget=LOW_BUDGET), returns="loss"),
        *map(in_pair_loss, _TOKENS_OF_HEAD),
        Variant("Liger", liger_dpo, LIGER, returns="loss", padded=True),
    ),
}  # fmt: skip
