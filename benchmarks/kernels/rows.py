"""The row kernels alone, beside their predecessors: log-probs from logits, the backward, and both in one pass.

    python benchmarks/kernels/rows.py             on a GPU: 16384 rows of 128256 and of 50257 logits, bfloat16
    python benchmarks/kernels/rows.py --tiny      a check of the script itself, in Triton's interpreter without a GPU
    ... --tune                                    "per thread" with blocks of other sizes, too
    ... --results FOLDER                          also writes them, anew after every part

"per thread" are the kernels of `fastdpo_kernels`, "per row" those of `block_kernels`. A thread has 32 columns of a
block and a row 128 threads; other sizes, between which counting cannot decide, have their own names. Time is the
median of interleaved runs; GB/s counts the fewest bytes: a read of the logits forward, a read and a write backward and
in the one pass. The ceiling is a copy on the same device just before. The one pass overwrites its logits and runs
again on what it has written, whose cost is the same; it is checked on fresh ones. A time is given only where the
numbers agree with float64 ones in the same run. Exit code 1 where the numbers of "per thread" disagree, or differ
between two runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "kernels")]

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

import block_kernels  # noqa: E402
from common import write_result  # noqa: E402
from timing import copy_bytes_per_second, interleaved_intervals  # noqa: E402
from torch import Tensor  # noqa: E402

from fastdpo_kernels import row as row_reader  # noqa: E402
from fastdpo_kernels import token_logprobs, token_logprobs_grad  # noqa: E402

# Forward, backward, and both in one pass.
Functions = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]
CONTESTANTS: dict[str, Functions] = {
    "per thread": (
        token_logprobs.token_logprobs_fwd, token_logprobs.token_logprobs_bwd,
        token_logprobs_grad.token_logprobs_fwd_grad,
    ),
    "per row": (
        block_kernels.token_logprobs_fwd, block_kernels.token_logprobs_bwd, block_kernels.token_logprobs_fwd_grad,
    ),
}  # fmt: skip
# Blocks that have not been chosen, by counting: columns and threads.
SIZES = {"16 columns": (16, 128), "64 columns": (64, 128), "64 threads": (32, 64), "256 threads": (32, 256)}
KERNELS = ("forward", "forward, statistics", "backward", "one pass", "one pass, statistics")
SOFTCAP = 30.0
CHECKED_ROWS = 64

# Of a row: given only where the numbers agree.
FIGURES = ("ms", "spread", "bytes_per_second", "share_of_ceiling")


def resized(columns: int, threads: int) -> Functions:
    """The functions of "per thread" with as many columns a thread, of as many threads a row."""

    def within(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with (
                mock.patch.multiple(row_reader, COLUMNS_OF_THREAD=columns, THREADS=threads),
                mock.patch.object(token_logprobs, "THREADS", threads),
                mock.patch.object(token_logprobs_grad, "THREADS", threads),
            ):
                return function(*args, **options)

        return call

    forward, backward, one_pass = map(within, CONTESTANTS["per thread"])
    return forward, backward, one_pass


class Case:
    """Logits (N, V) whose rows begin where they begin, labels, and the functions of a contestant on them."""

    def __init__(self, n: int, v: int, softcap: float | None, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.options: dict[str, Any] = {"softcap": softcap}
        self.shape = {"n": n, "v": v, "softcap": softcap}
        self.logits = torch.empty(n, v, device=device, dtype=dtype).normal_(std=3.0)
        self.labels = torch.randint(v, (n,), device=device)
        self.grad = torch.randn(n, device=device)
        self.out = torch.empty_like(self.logits)
        self.sample = torch.arange(0, n, max(1, n // CHECKED_ROWS), device=device)

    def bytes_moved(self, kernel: str) -> int:
        return self.logits.nbytes * (1 if kernel.startswith("forward") else 2)

    def run(self, contestant: str, kernel: str) -> dict[str, Tensor]:
        """What the kernel gives; of the one pass, from fresh logits."""
        forward, backward, one_pass = CONTESTANTS[contestant]
        stats = kernel.endswith("statistics")
        if kernel.startswith("forward"):
            logps, norms, values = forward(self.logits, self.labels, stats=stats, **self.options)
            out = {"log-probs": logps, "log-sum-exp": norms.sum(0)}
        elif kernel == "backward":
            _, norms, values = forward(self.logits, self.labels, **self.options)
            self.out.fill_(torch.nan)
            backward(self.logits, self.labels, norms, self.grad, out=self.out, **self.options)
            out = {"gradient": self.out[self.sample].float()}
        else:
            self.out.copy_(self.logits)
            logps, scale, values = one_pass(self.out, self.labels, stats=stats, **self.options)
            q = self.out[self.sample].float()
            out = {"log-probs": logps, "gradient": q if scale is None else q * scale[self.sample, None]}
        return out if values is None else {**out, "entropy": values[0], "log sum p^2": values[3]}

    def timed(self, contestant: str, kernel: str) -> Callable[[Callable[[], None]], None]:
        """Only the kernel between two marks."""
        forward, backward, one_pass = CONTESTANTS[contestant]
        stats = kernel.endswith("statistics")
        _, norms, _ = forward(self.logits, self.labels, **self.options)

        def run(mark: Callable[[], None]) -> None:
            mark()
            if kernel.startswith("forward"):
                forward(self.logits, self.labels, stats=stats, **self.options)
            elif kernel == "backward":
                backward(self.logits, self.labels, norms, self.grad, out=self.out, **self.options)
            else:
                one_pass(self.out, self.labels, stats=stats, **self.options)
            mark()

        return run

    def truth(self) -> dict[str, Tensor]:
        """float64, of the sampled rows; log-probs and gradient by autograd. The backward's gradient lacks `grad`."""
        x = self.logits[self.sample].double().requires_grad_()
        softcap = self.options["softcap"]
        z = x if softcap is None else softcap * torch.tanh(x / softcap)
        log_p = z.log_softmax(1)
        logps = log_p.gather(1, self.labels[self.sample, None]).squeeze(1)
        (gradient,) = torch.autograd.grad(logps.sum(), x)
        log_p = log_p.detach()
        return {
            "log-probs": logps.detach(),
            "log-sum-exp": z.detach().logsumexp(1),
            "gradient": gradient,
            "entropy": -(log_p.exp() * log_p).sum(1),
            "log sum p^2": (2 * log_p).logsumexp(1),
        }

    def check(self, contestant: str, kernel: str, truth: dict[str, Tensor]) -> dict[str, Any]:
        """Errors of two runs, in multiples of what is allowed: 1e-5 of a sum, a rounding of the dtype of a gradient."""
        first, again = (self.run(contestant, kernel) for _ in range(2))
        errors = {}
        for name, value in first.items():
            want = truth[name]
            if name == "gradient":
                got = value.double()
                want = want * self.grad[self.sample, None].double() if kernel == "backward" else want
                allowed = 2 * torch.finfo(self.logits.dtype).eps * want.norm().item()
                errors[name] = (got - want).norm().item() / allowed
            else:
                got = value[self.sample].double()
                errors[name] = ((got - want).abs() / (1e-5 * (1 + want.abs()))).max().item()
        return {
            "numbers_agree": all(error <= 1 for error in errors.values()),  # NaN is no agreement
            "errors": {name: error if error == error else None for name, error in errors.items()},
            "same_every_time": all(torch.equal(first[name], again[name]) for name in first),
        }


def measure(case: Case, ceiling: float, repeats: int, warmup: int) -> dict[str, Any]:
    truth = case.truth()
    kernels: dict[str, Any] = {}
    for kernel in KERNELS:
        rows: dict[str, dict[str, Any]] = {
            name: case.check(name, kernel, truth) | dict.fromkeys(FIGURES) for name in CONTESTANTS
        }
        runs = {name: case.timed(name, kernel) for name, row in rows.items() if row["numbers_agree"]}
        for name, timing in interleaved_intervals(runs, repeats, warmup).items():
            if isinstance(timing, Exception):
                raise timing
            rate = case.bytes_moved(kernel) / timing.seconds[0]
            rows[name].update(
                ms=timing.seconds[0] * 1e3, spread=timing.spread, bytes_per_second=rate, share_of_ceiling=rate / ceiling
            )
        kernels[kernel] = rows
    dtype = str(case.logits.dtype).removeprefix("torch.")
    return {**case.shape, "dtype": dtype, "ceiling_per_second": ceiling, "kernels": kernels}


def report(part: dict[str, Any]) -> str:
    softcap = "" if part["softcap"] is None else f", softcap {part['softcap']:g}"
    lines = [f"\nN={part['n']} V={part['v']} {part['dtype']}{softcap}; "
             f"a copy reaches {part['ceiling_per_second'] / 1e9:.4g} GB/s"]  # fmt: skip
    for kernel, rows in part["kernels"].items():
        for name, row in rows.items():
            if not row["numbers_agree"]:
                lines.append(f"  {kernel:22} {name:11} numbers disagree: {row['errors']} times the error allowed")
                continue
            same = "" if row["same_every_time"] else "  differs between runs"
            lines.append(
                f"  {kernel:22} {name:11} {row['ms']:8.3f} ms ±{row['spread'] / 2:.1%}  "
                f"{row['bytes_per_second'] / 1e9:.4g} GB/s, {row['share_of_ceiling']:.1%}{same}"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    if options.tune:
        CONTESTANTS.update({name: resized(*size) for name, size in SIZES.items()})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("without a GPU only --tiny runs")
    if device.type == "cpu":
        sys.path.insert(0, str(ROOT / "tests"))
        import triton_interpreter

        triton_interpreter.mend()
    repeats, warmup = (2, 1) if options.tiny else (10, 3)
    shapes = [(1, 5000, None), (1, 1031, SOFTCAP)] if options.tiny else [
        (16384, 128256, None), (16384, 50257, None), (16384, 128256, SOFTCAP)
    ]  # fmt: skip
    ceiling = copy_bytes_per_second(device)
    parts = []
    for n, v, softcap in shapes:
        parts.append(measure(Case(n, v, softcap, device, torch.bfloat16), ceiling, repeats, warmup))
        print(report(parts[-1]), flush=True)
        if options.results:
            result = {"device_type": device.type, "complete": len(parts) == len(shapes), "parts": parts}
            name = ("tiny-" if options.tiny else "") + ("rows_tuned" if options.tune else "rows")
            written = write_result(name, result, options.results)
    if options.results:
        print("written to", written)
    ours = [rows["per thread"] for part in parts for rows in part["kernels"].values()]
    return 0 if all(row["numbers_agree"] and row["same_every_time"] for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
