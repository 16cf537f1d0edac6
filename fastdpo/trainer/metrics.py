"""Metrics of a run, summed on the device and read once a log; and its speed."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.device import gemm_flops_per_second, is_out_of_memory, peak_memory_gb
from fastdpo.models import routed_experts
from fastdpo.packing import PreferenceBatch

logger = logging.getLogger(__name__)


class MetricSums:
    """Means weighted by pairs. `add` queues work on the device and waits for nothing; `take` waits once."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._counts: list[float] = []

    def add(self, metrics: Mapping[str, Tensor], pairs: float, **weights: float) -> None:
        """`weights`: of metrics that count by something else than the pairs."""
        names = list(metrics)
        counts = [weights.get(name, pairs) for name in names]
        kept = [at_least_float32(value) for value in metrics.values()]
        # A metric that nothing counts for (no desirable answer in the batch, say) is not finite.
        dtype = functools.reduce(torch.promote_types, [value.dtype for value in kept])
        values = torch.stack(
            [(value * n if n else torch.zeros_like(value)).to(dtype) for value, n in zip(kept, counts, strict=True)]
        )
        if self._sums is None:
            self._names, self._sums, self._counts = names, values, counts
        else:
            assert names == self._names
            self._sums = self._sums.to(dtype) + values  # restored sums are float64, which holds either exactly
            self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]

    def state(self, reduce: Any = None) -> dict[str, Any]:
        """What `take` would divide, for a checkpoint; waits for the device."""
        if self._sums is None:
            return {}
        sums = torch.cat([self._sums, self._sums.new_tensor(self._counts)])
        values, counts = (sums if reduce is None else reduce(sums)).view(2, -1).tolist()
        return {"names": self._names, "sums": values, "counts": counts}

    def restore(self, state: Mapping[str, Any], device: torch.device, share: float = 1.0) -> None:
        """`share`: of this process; of several, one takes all and the others nothing, under the same names."""
        self.clear()
        if state:
            self._names, self._counts = list(state["names"]), [share * count for count in state["counts"]]
            self._sums = torch.tensor(state["sums"], dtype=torch.float64, device=device) * share

    def clear(self) -> None:
        self._names, self._sums, self._counts = [], None, []

    def copy(self) -> MetricSums:
        copied = MetricSums()
        copied._names, copied._counts = self._names, self._counts
        copied._sums = None if self._sums is None else self._sums.clone()
        return copied

    def take(self, reduce: Any = None) -> dict[str, float]:
        """The means since the last call; `reduce` adds a tensor up over processes."""
        if self._sums is None:
            return {}
        state = self.state(reduce)
        self.clear()
        each = zip(state["names"], state["sums"], state["counts"], strict=True)
        means = {name: value / count for name, value, count in each if count}
        means.pop("rewards/margins", None)  # of single answers a batch may hold one kind only
        chosen, rejected = (means.get(f"rewards/{side}") for side in ("chosen", "rejected"))
        if chosen is not None and rejected is not None:
            means["rewards/margins"] = chosen - rejected
        return means


def at_least_float32(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


class Throughput:
    """Counts what was trained and how long it took; host integers only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total_unshared = 0  # every token of the data counted, prompts twice, as others count
        self._ceiling: float | None = None  # FLOPs a second; of a run that logs nothing, or lacks memory, unknown
        self._ceiling_asked = False
        self.restart()

    def restart(self) -> None:
        self._since = time.perf_counter()
        self._pairs = self._tokens = self._unshared = 0
        self._flops = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time within it out of the count (evaluation, saving)."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began

    def measure_ceiling(self, dtype: torch.dtype) -> None:
        """Finds what `perf/mfu` is a share of, once; before the first step, for it waits for the device."""
        if self._ceiling_asked:
            return
        self._ceiling_asked = True
        with self.paused():
            try:
                self._ceiling = gemm_flops_per_second(self.device, dtype)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("perf/mfu is not logged: no memory was free to measure the speed of a matrix product.")

    def count(self, batch: PreferenceBatch, flops: float) -> None:
        self._pairs += batch.num_pairs
        self._tokens += batch["num_tokens"]
        self._unshared += batch["unshared_tokens"]
        self.total_unshared += batch.data_tokens
        self._flops += flops

    def take(self) -> dict[str, float]:
        seconds = max(1e-9, time.perf_counter() - self._since)
        if not self._pairs:
            return {}
        values = {
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/pairs_per_second": self._pairs / seconds,
            "perf/saved_tokens_fraction": 1 - self._tokens / max(1, self._unshared),
            "perf/peak_memory_gb": peak_memory_gb(self.device),
        }
        if self._ceiling is not None:
            values["perf/mfu"] = self._flops / seconds / self._ceiling
        self.restart()
        return values


@dataclass(frozen=True)
class StepFlops:
    """Matrix-product FLOPs of forward and backward that a batch needs, attention scores and recomputation left out.

    Two a weight and token forward, two for the gradient of the activations, two for that of a trainable weight. The
    head counts for target tokens only; input embeddings are look-ups; of routed experts those that a token takes.
    """

    per_token: int
    per_target: int

    @classmethod
    def of(cls, model: Any) -> StepFlops:
        """Counted once, before training: the sum runs over all parameters."""
        head = model.get_output_embeddings().weight
        embeddings = {id(head), id(model.get_input_embeddings().weight)}
        experts, taken = routed_experts(model) or (1, 1)
        per_token = 0.0
        for name, weight in model.named_parameters():
            if id(weight) not in embeddings and weight.dim() > 1:
                per_token += cls._of_weight(weight) * (taken / experts if ".experts." in name else 1)
        return cls(round(per_token), cls._of_weight(head))

    @staticmethod
    def _of_weight(weight: Tensor) -> int:
        return weight.numel() * (6 if weight.requires_grad else 4)

    def __call__(self, batch: PreferenceBatch) -> float:
        return float(self.per_token * batch["num_tokens"] + self.per_target * batch["target_ids"].shape[0])
