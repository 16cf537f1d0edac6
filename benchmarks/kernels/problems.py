"""What is measured: the inputs, the float64 truth about them, and the least work that each task needs.

Three families of tasks. "logits": log-probs (N,) from logits (N, V). "head": log-probs or their sum from hidden states
(N, D) and the head's weight (V, D). "dpo": the DPO loss from the same. What a variant computes is checked at the very
size that is timed: all outputs, and the gradients of rows (and of vocabulary entries) spread over the whole range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

SAMPLE = 64  # rows of which a gradient is checked
SPREAD = 3.0  # standard deviation of the logits: some ten tokens share most of the probability, as in a language model
TRUTH_BYTES = 1 << 30  # float64 logits held at a time
# So small that the loss stays in its steep part: its gradient then errs as the log-probs do, and no more.
BETA = 1e-3


@dataclass(frozen=True)
class Mode:
    """Which of the inputs need a gradient, and the bytes moved or the FLOPs of the fewest passes that can do that."""

    name: str
    needs: tuple[bool, ...]
    work: float

    @property
    def has_gradient(self) -> bool:
        return any(self.needs)


class Expected(NamedTuple):
    """A float64 value, how far from it one may be, and whether that is a norm (else it is the largest difference)."""

    value: Tensor
    allowed: float
    by_norm: bool


def naive_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """The code that everyone writes, and whose error is the measure of the others'."""
    return torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def spread(n: int, count: int, device: torch.device) -> Tensor:
    return torch.linspace(0, n - 1, min(n, count), device=device, dtype=torch.float64).long().unique()


class Problem:
    """Inputs of one size. Families say what the truth is; here is how a variant's numbers are held against it."""

    family: str
    unit: str  # of the work: "bytes" or "FLOP"
    shape: dict[str, int]
    dtype: torch.dtype
    labels: Tensor
    grad: Tensor  # (N,) gradient that arrives at the log-probs
    modes: tuple[Mode, ...]

    def leaves(self, variant: Any, mode: Mode) -> tuple[Tensor, ...]:
        """The inputs as the variant takes them, fresh for one run."""
        raise NotImplementedError

    def expected(self, returns: str) -> dict[str, Expected]:
        raise NotImplementedError

    def pieces(self, returns: str, output: Tensor, grads: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
        """What of a run is compared, under the names of `expected`, in float64. A gradient not asked for is None."""
        raise NotImplementedError

    def upstream(self, returns: str, output: Tensor) -> Tensor | None:
        return self.grad.to(output.dtype) if returns == "tokens" else None

    def errors(self, variant: Any, output: Tensor, grads: tuple[Tensor | None, ...]) -> dict[str, float]:
        """Every error as a multiple of what is allowed: the numbers agree where none is above 1 (NaN is not)."""
        expected = self.expected(variant.returns)
        errors = {}
        for name, value in self.pieces(variant.returns, output, grads).items():
            truth, allowed, by_norm = expected[name]
            errors[name] = _distance(value, truth, by_norm) / allowed
        return errors


def _distance(value: Tensor, truth: Tensor, by_norm: bool) -> float:
    difference = value - truth
    return (difference.norm() if by_norm else difference.abs().max()).item()


def expectation(truth: Tensor, naive: Tensor, by_norm: bool) -> Expected:
    """Twice the error of the naive code in the same dtype, and a little."""
    scale = (truth.norm() if by_norm else truth.abs().max()).item()
    return Expected(truth, 2 * _distance(naive, truth, by_norm) + 1e-5 * scale + 1e-6 * (not by_norm), by_norm)


class LogitsProblem(Problem):
    family, unit = "logits", "bytes"

    def __init__(self, n: int, v: int, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.dtype = {"n": n, "v": v}, dtype
        self.logits = torch.randn(n, v, device=device, dtype=dtype).mul_(SPREAD)
        self.labels = torch.randint(v, (n,), device=device)
        self.grad = torch.randn(n, device=device)
        self.rows = spread(n, SAMPLE, device)
        one_pass = n * v * self.logits.element_size()
        # Forward: one read. Backward: one read and one write.
        self.modes = (Mode("no grad", (False,), one_pass), Mode("gradient", (True,), 3 * one_pass))

    @cached_property
    def _scratch(self) -> Tensor:
        return torch.empty_like(self.logits)

    def leaves(self, variant: Any, mode: Mode) -> tuple[Tensor, ...]:
        logits = self.logits
        if variant.overwrites and mode.has_gradient:
            logits = self._scratch.copy_(self.logits)
        return (logits.detach().requires_grad_(mode.has_gradient),)

    @cached_property
    def _expected(self) -> dict[str, Expected]:
        n, v = self.shape["n"], self.shape["v"]
        truth = torch.empty(n, dtype=torch.float64, device=self.logits.device)
        for rows in range(0, n, step := max(1, TRUTH_BYTES // (8 * v))):
            part = slice(rows, rows + step)
            z = self.logits[part].double()
            truth[part] = z.gather(1, self.labels[part, None]).squeeze(1) - z.logsumexp(1)
        labels = self.labels[self.rows, None]
        gradient = -self.logits[self.rows].double().softmax(1)
        gradient.scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.float64))
        gradient *= self.grad[self.rows, None]
        leaf = self.logits.detach().requires_grad_()
        logps = naive_logps(leaf, self.labels)
        naive = self.pieces("tokens", logps.detach(), torch.autograd.grad(logps, leaf, self.grad))
        truths = {"log-probs": truth, **self._gradient_pieces(gradient)}
        return {name: expectation(truths[name], naive[name], name != "log-probs") for name in truths}

    def expected(self, returns: str) -> dict[str, Expected]:
        return self._expected

    def pieces(self, returns: str, output: Tensor, grads: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
        pieces = {"log-probs": output.double()}
        if grads and grads[0] is not None:
            pieces |= self._gradient_pieces(grads[0][self.rows].double())
        return pieces

    def _gradient_pieces(self, gradient: Tensor) -> dict[str, Tensor]:
        """The entries of the labels apart: beside them an error in all the others would hardly show."""
        labels = self.labels[self.rows, None]
        return {"gradient at labels": gradient.gather(1, labels), "gradient elsewhere": gradient.scatter(1, labels, 0)}


class HeadProblem(Problem):
    """family "head" or "dpo"; the rows are those of `pairs` pairs, chosen then rejected, all of the same length."""

    unit = "FLOP"

    def __init__(
        self, family: str, n: int, d: int, v: int, device: torch.device, dtype: torch.dtype, pairs: int = 8
    ) -> None:
        assert n % (2 * pairs) == 0
        self.family, self.dtype, self.pairs = family, dtype, pairs
        self.shape = {"n": n, "d": d, "v": v}
        self.hidden = torch.randn(n, d, device=device, dtype=dtype)
        self.weight = torch.randn(v, d, device=device, dtype=dtype).mul_(SPREAD / math.sqrt(d))
        self.labels = torch.randint(v, (n,), device=device)
        self.grad = torch.randn(n, device=device)
        self.rows = spread(n, SAMPLE, device)
        self.vocabulary = torch.cat([self.labels[self.rows[: SAMPLE // 2]], spread(v, SAMPLE // 2, device)]).unique()
        self.length = n // (2 * pairs)
        ids = torch.arange(2 * pairs, device=device).view(2, pairs).T.reshape(-1)  # chosen i is i, rejected pairs + i
        self.sequence_ids = ids.repeat_interleave(self.length)
        self.refs = torch.zeros(2 * pairs, device=device)
        product = 2 * n * d * v
        self.modes = (
            Mode("no grad", (False, False), product),
            Mode("frozen head", (True, False), 2 * product),
            Mode("trainable", (True, True), 3 * product),
        )

    @cached_property
    def _padded(self) -> Tensor:
        """(2 * pairs, length, D), chosen rows first."""
        return self._swap(self.hidden.view(self.pairs, 2, self.length, -1))

    @property
    def padded_labels(self) -> Tensor:
        return self._swap(self.labels.view(self.pairs, 2, self.length))

    def _swap(self, halves: Tensor) -> Tensor:
        return halves.transpose(0, 1).reshape(2 * self.pairs, *halves.shape[2:])

    def leaves(self, variant: Any, mode: Mode) -> tuple[Tensor, ...]:
        hidden = self._padded if variant.padded else self.hidden
        tensors = zip((hidden, self.weight), mode.needs, strict=True)
        return tuple(tensor.detach().requires_grad_(needed) for tensor, needed in tensors)

    def pair_loss(self, logps: Tensor) -> Tensor:
        """-logsigmoid(BETA * (chosen - rejected)).mean() of per-token log-probs (N,); the references are zero."""
        sums = logps.new_zeros(2 * self.pairs).index_add(0, self.sequence_ids, logps)
        chosen, rejected = sums.view(2, -1)
        return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()

    @cached_property
    def _truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """float64 log-probs (N,), dlogp/dhidden of the sampled rows, and d logp / d logit of the sampled vocabulary."""
        weight, n, v = self.weight.double(), self.shape["n"], self.shape["v"]
        logps = torch.empty(n, dtype=torch.float64, device=weight.device)
        of_vocabulary = logps.new_empty(n, len(self.vocabulary))
        for start in range(0, n, step := max(1, TRUTH_BYTES // (8 * v))):
            part = slice(start, start + step)
            z = self.hidden[part].double() @ weight.T
            lse = z.logsumexp(1)
            logps[part] = z.gather(1, self.labels[part, None]).squeeze(1) - lse
            of_vocabulary[part] = -(z[:, self.vocabulary] - lse[:, None]).exp()
        of_vocabulary += self.labels[:, None] == self.vocabulary
        p = (self.hidden[self.rows].double() @ weight.T).softmax(1)
        return logps, weight[self.labels[self.rows]] - p @ weight, of_vocabulary

    def _coefficients(self, returns: str) -> Tensor:
        """d output / d logp of every token, (N,) float64, with the gradient that arrives at the output."""
        if returns == "tokens":
            return self.grad.double()
        leaf = self._truth[0].clone().requires_grad_()
        return torch.autograd.grad(self.pair_loss(leaf) if returns == "loss" else leaf.sum(), leaf)[0]

    @cached_property
    def _known(self) -> dict[str, dict[str, Expected]]:
        return {}

    def expected(self, returns: str) -> dict[str, Expected]:
        if returns not in self._known:
            self._known[returns] = self._make_expected(returns)
        return self._known[returns]

    def _make_expected(self, returns: str) -> dict[str, Expected]:
        truth, of_hidden, of_vocabulary = self._truth
        coefficients = self._coefficients(returns)
        hidden, weight = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()
        logps = naive_logps(hidden @ weight.T, self.labels)
        naive = self.pieces(returns, logps.detach(), torch.autograd.grad(logps, (hidden, weight), coefficients.float()))
        if returns == "tokens":
            output = expectation(truth, naive["output"], by_norm=False)
        else:
            value = self.pair_loss(truth) if returns == "loss" else truth.sum()
            # The error of one sum may be small by luck. What it is likely to be follows from the errors of its terms.
            likely = 2 * (coefficients * (logps.detach() - truth)).norm().item()
            output = Expected(value, 2 * likely + 1e-5 * value.abs().item() + 1e-6, by_norm=False)
        of_weight = (coefficients[:, None] * of_vocabulary).T @ self.hidden.double()
        truths = {"gradient of hidden": coefficients[self.rows, None] * of_hidden, "gradient of weight": of_weight}
        return {"output": output} | {name: expectation(truths[name], naive[name], by_norm=True) for name in truths}

    def pieces(self, returns: str, output: Tensor, grads: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
        pieces = {"output": output.double()}
        of_hidden, of_weight = grads or (None, None)
        if of_hidden is not None:
            if of_hidden.dim() == 3:  # padded
                of_hidden = self._unswap(of_hidden)
            pieces["gradient of hidden"] = of_hidden[self.rows].double()
        if of_weight is not None:
            pieces["gradient of weight"] = of_weight[self.vocabulary].double()
        return pieces

    def _unswap(self, padded: Tensor) -> Tensor:
        return padded.reshape(2, self.pairs, self.length, -1).transpose(0, 1).reshape(self.shape["n"], -1)
