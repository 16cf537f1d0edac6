"""The gather of keys and values for shared prompts: fastdpo's kernels against index_select and its autograd backward.

    python benchmarks/kernels/gather.py           on a GPU: 16384 tokens, 8 heads of 128, bfloat16
    python benchmarks/kernels/gather.py --tiny    a check of the script itself, on any device
    ... --results FOLDER                          also writes them, anew after every part

Time is the median of interleaved runs; GB/s counts the fewest bytes that can do it: every row read once, every gathered
row written once, and back. The ceiling is a copy on the same device just before. Memory is what a run takes beyond its
inputs, results included. A time is given only where the numbers agree in the same run: gathered rows bit for bit, the
gradients with float64 ones within twice the error of index_select's. Whether a gradient is the same in every run is
told as well. Exit code 1 where fastdpo's numbers disagree or vary, or a part failed.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "kernels")]

import torch  # noqa: E402
from common import write_result  # noqa: E402
from goals import evaluate, line  # noqa: E402
from problems import expectation  # noqa: E402
from runner import message  # noqa: E402
from timing import Mark, copy_bytes_per_second, interleaved_intervals, peak_extra_bytes  # noqa: E402
from torch import Tensor  # noqa: E402

from fastdpo.ops import gather_kv  # noqa: E402

# A prompt and its completions, in tokens; as many of them as the row holds.
GROUPS = {
    "pair, short": (150, (45, 45)),
    "pair, long prompt": (2000, (100, 100)),
    "eight completions": (400, (250,) * 8),
}
NAMES = ("fastdpo", "index_select")
# How attention finds them: as the projection wrote them, or transposed in memory.
LAYOUTS = ("tokens first", "heads first")

# Of a row: given only where the numbers agree.
FIGURES = ("ms", "forward_ms", "backward_ms", "spread", "bytes_per_second", "share_of_ceiling", "extra_bytes")


def gathered_rows(group: tuple[int, tuple[int, ...]], tokens: int) -> tuple[int, Tensor]:
    """T and the index (K,) of a packed row of such groups, of `tokens` at most but one group at least."""
    prompt, completions = group
    size = prompt + sum(completions)
    parts, count = [], max(1, tokens // size)
    for start in range(0, count * size, size):
        begin = start + prompt
        for length in completions:
            parts += [torch.arange(start, start + prompt), torch.arange(begin, begin + length)]
            begin += length
    return count * size, torch.cat(parts)


class Case:
    """Keys and values, where they go, and the gradient that comes back."""

    def __init__(self, group: str, layout: str, tokens: int, heads: int, d: int, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        num_rows, index = gathered_rows(GROUPS[group], tokens)
        offsets = torch.zeros(num_rows + 1, dtype=torch.int64)
        offsets[1:] = torch.bincount(index, minlength=num_rows).cumsum(0)
        places = index, index.argsort(stable=True), offsets
        self.index, self.copies, self.offsets = (place.to(device) for place in places)
        self.shape = {"group": group, "layout": layout, "t": num_rows, "k": len(index), "h": heads, "d": d}
        self.dtype = dtype

        def rows() -> Tensor:
            if layout == "heads first":
                return torch.randn(heads, num_rows, d, device=device, dtype=dtype).transpose(0, 1)
            return torch.randn(num_rows, heads, d, device=device, dtype=dtype)

        torch.manual_seed(0)
        self.leaves = tuple(rows().requires_grad_() for _ in range(2))
        self.grads = tuple(torch.randn(len(index), heads, d, device=device, dtype=dtype) for _ in range(2))
        self.work = 4 * (num_rows + len(index)) * heads * d * dtype.itemsize  # of keys and values, there and back

    def run(self, name: str, mark: Mark = lambda: None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Gathered keys and values, and the gradients; marks before, between and after."""
        key, value = self.leaves
        mark()
        if name == "fastdpo":
            gathered = gather_kv(key, value, self.index, self.copies, self.offsets)
        else:
            gathered = key.index_select(0, self.index), value.index_select(0, self.index)
        mark()
        grads = torch.autograd.grad(gathered, self.leaves, self.grads)
        mark()
        return tuple(x.detach() for x in gathered), grads

    def check(self, name: str) -> dict[str, Any]:
        """What the numbers of two runs say; `errors` in multiples of what is allowed."""
        (gathered, grads), (_, again) = self.run(name), self.run(name)
        exact = all(torch.equal(got, x.detach()[self.index]) for got, x in zip(gathered, self.leaves, strict=True))
        _, plain = self.run("index_select")
        errors = {}
        for what, got, naive, up in zip(("key", "value"), grads, plain, self.grads, strict=True):
            truth = torch.zeros(got.shape, dtype=torch.float64, device=got.device).index_add_(
                0, self.index, up.double()
            )
            expected = expectation(truth, naive.double(), by_norm=True)
            errors[what] = (got.double() - truth).norm().item() / expected.allowed
        return {
            "numbers_agree": exact and all(error <= 1 for error in errors.values()),
            "errors": {what: error if math.isfinite(error) else None for what, error in errors.items()},  # for JSON
            "same_every_time": all(torch.equal(x, y) for x, y in zip(grads, again, strict=True)),
        }


def measure(case: Case, ceiling: float, repeats: int, warmup: int) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {name: case.check(name) | dict.fromkeys(FIGURES) for name in NAMES}
    right = [name for name, row in rows.items() if row["numbers_agree"]]
    runs = {name: lambda mark, name=name: case.run(name, mark) for name in right}
    for name, timing in interleaved_intervals(runs, repeats, warmup).items():
        if isinstance(timing, Exception):
            raise timing
        total, forward, backward = timing.seconds
        rows[name].update(
            ms=total * 1e3,
            forward_ms=forward * 1e3,
            backward_ms=backward * 1e3,
            spread=timing.spread,
            bytes_per_second=case.work / total,
            share_of_ceiling=case.work / total / ceiling,
            extra_bytes=peak_extra_bytes(lambda name=name: case.run(name)),
        )
    dtype = str(case.dtype).removeprefix("torch.")
    return {
        "family": "gather",
        **case.shape,
        "dtype": dtype,
        "work": case.work,
        "ceiling_per_second": ceiling,
        "variants": rows,
    }


def report(part: dict[str, Any]) -> str:
    lines = [f"\n{part['group']}, {part['layout']}: T={part['t']} K={part['k']} H={part['h']} d={part['d']} "
             f"{part['dtype']}; a copy reaches {part['ceiling_per_second'] / 1e9:.4g} GB/s"]  # fmt: skip
    for name, row in part["variants"].items():
        if not row["numbers_agree"]:
            lines.append(f"  {name:13} numbers disagree: {row['errors']} times the error allowed")
            continue
        memory = "" if row["extra_bytes"] is None else f"  {row['extra_bytes'] / 1e9:+.3f} GB"
        lines.append(
            f"  {name:13} {row['ms']:8.3f} ms = {row['forward_ms']:.3f} + {row['backward_ms']:.3f} "
            f"±{row['spread'] / 2:.1%}  {row['bytes_per_second'] / 1e9:.4g} GB/s, {row['share_of_ceiling']:.1%}{memory}"
            f"  {'the same every time' if row['same_every_time'] else 'another gradient every time'}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, heads, d = (1000, 2, 16) if options.tiny else (16384, 8, 128)
    repeats, warmup = (3, 1) if options.tiny else (10, 3)
    result: dict[str, Any] = {"device_type": device.type, "complete": False, "parts": [], "problems": [], "goals": []}

    def write() -> None:
        result["goals"] = evaluate(device.type, result["parts"], ["gather"])
        if options.results:
            write_result("tiny-gather" if options.tiny else "gather", result, options.results)

    ceiling = copy_bytes_per_second(device)
    for group in GROUPS:
        for layout in LAYOUTS:
            try:
                part = measure(Case(group, layout, tokens, heads, d, device), ceiling, repeats, warmup)
            except Exception as error:  # the results of the other parts are wanted all the same
                result["problems"].append(f"{group}, {layout}: {message(error)}")
            else:
                result["parts"].append(part)
                ours = part["variants"]["fastdpo"]
                if not (ours["numbers_agree"] and ours["same_every_time"]):
                    result["problems"].append(f"{group}, {layout}: the numbers disagree, or vary")
                print(report(part), flush=True)
            write()
    result["complete"] = True
    write()
    print()
    for text in [*map(line, result["goals"]), *result["problems"]]:
        print(text)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
