"""Log-probs and losses from logits and from hidden states: fastdpo, PyTorch and the peers that are installed.

    python benchmarks/kernels/logprobs.py           on a GPU: vocabularies of 49152 to 256000, bfloat16
    python benchmarks/kernels/logprobs.py --tiny    a check of the script itself, on any device
    ... --results FOLDER                            also writes them, anew after every part
    ... --only fastdpo TRL                          these contestants alone, under a name of their own

Of every variant and mode: time (median of interleaved runs; CUDA events on a GPU), work done in a second, share of the
ceiling that this device reached just before (a copy, or a large matrix product), and memory beyond the inputs, results
included. A time is given only where outputs and gradients agree with float64 ones in the same run. Exit code 1 where a
part failed, was left out for time, or a variant of fastdpo failed or computed something else.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "kernels")]

import torch  # noqa: E402
from common import write_result  # noqa: E402
from goals import evaluate, line  # noqa: E402
from problems import HeadProblem, LogitsProblem, Problem  # noqa: E402
from runner import measure, message  # noqa: E402
from timing import copy_bytes_per_second, product_flops_per_second  # noqa: E402
from variants import VARIANTS, Variant  # noqa: E402

TITLES = {
    "logits": "log-probs from logits",
    "head": "log-probs from hidden states",
    "dpo": "DPO loss from hidden states",
}
SCALES = {"bytes": (1e9, "GB/s"), "FLOP": (1e12, "TFLOP/s")}

# What the goals are about comes first, in case the time runs out.
SIZES: dict[str, list[tuple[str, dict[str, int]]]] = {
    "tiny": [
        ("logits", {"n": 64, "v": 1000}),
        ("head", {"n": 64, "d": 32, "v": 1000}),
        ("dpo", {"n": 64, "d": 32, "v": 1000}),
    ],
    "cpu": [
        ("logits", {"n": 2048, "v": 49152}),
        ("dpo", {"n": 1024, "d": 576, "v": 49152}),
        ("head", {"n": 1024, "d": 576, "v": 49152}),
    ],
    "cuda": [
        ("logits", {"n": 16384, "v": 128256}),
        ("dpo", {"n": 4096, "d": 4096, "v": 128256}),
        ("head", {"n": 4096, "d": 4096, "v": 128256}),
        ("logits", {"n": 16384, "v": 151936}),
        ("head", {"n": 8192, "d": 2304, "v": 256000}),
        ("logits", {"n": 16384, "v": 49152}),
    ],
}


def make_problem(family: str, shape: dict[str, int], device: torch.device) -> Problem:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if family == "logits":
        return LogitsProblem(**shape, device=device, dtype=dtype)
    return HeadProblem(family, **shape, device=device, dtype=dtype)


def ceiling_of(problem: Problem) -> float:
    device = problem.labels.device
    return copy_bytes_per_second(device) if problem.unit == "bytes" else product_flops_per_second(device, problem.dtype)


def contestants(family: str, tiny: bool, only: list[str] | None = None) -> list[Variant]:
    return [
        variant
        for variant in VARIANTS[family]
        # Compiling takes longer than all the rest of a tiny run.
        if not (tiny and variant.name == "torch.compile") and (not only or variant.name.split(",")[0] in only)
    ]


def run_parts(
    sizes: list[tuple[str, dict[str, int]]],
    variants_of: Callable[[str], list[Variant]],
    device: torch.device,
    seconds: float,
    after_part: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The result of all parts; `after_part` gets it as it grows. A part that raises is noted, and the next one runs."""
    began = time.monotonic()
    repeats, warmup = (10, 3) if device.type == "cuda" else (5, 1)
    result: dict[str, Any] = {"device_type": device.type, "complete": False, "parts": [], "problems": [], "goals": []}
    for family, shape in sizes:
        if time.monotonic() - began > seconds:
            result["problems"].append(f"{title(family, shape)}: left out, {seconds:.0f} s are over")
            continue
        try:
            problem = make_problem(family, shape, device)
            part = measure(problem, variants_of(family), ceiling_of(problem), repeats, warmup)
        except Exception as error:  # the results of the other parts are wanted all the same
            result["problems"].append(f"{title(family, shape)}: {message(error)}")
        else:
            result["parts"].append(part)
            result["problems"] += faults(part)
            print(report(part), flush=True)
        problem = None
        forget()
        result["goals"] = evaluate(device.type, result["parts"], {family for family, _ in sizes})
        result["seconds"] = time.monotonic() - began
        after_part(result)
    result["complete"] = True
    after_part(result)
    return result


def forget() -> None:
    """What one part leaves would count against the next: memory, and compiled code (PyTorch gives up after eight)."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def faults(part: dict[str, Any]) -> list[str]:
    """What is wrong with our own variants; a peer that fails is in its row, and that is all."""
    return [
        f"{title(part['family'], part)}, {mode}, {name}: {row['status']} ({row['reason']})"
        for mode, measured in part["modes"].items()
        for name, row in measured["variants"].items()
        if name.startswith("fastdpo") and row["status"] != "measured"
    ]


def title(family: str, shape: dict[str, Any]) -> str:
    return f"{TITLES[family]}, " + " ".join(f"{key.upper()}={shape[key]}" for key in ("n", "d", "v") if key in shape)


def report(part: dict[str, Any]) -> str:
    scale, unit = SCALES[part["unit"]]
    ceiling = part["ceiling_per_second"] / scale
    lines = [f"\n{title(part['family'], part)}, {part['dtype']}; this device reaches {ceiling:.3g} {unit}"]
    for mode, measured in part["modes"].items():
        lines.append(f"  {mode}; at the least {measured['floor_ms']:.3f} ms")
        for name, row in measured["variants"].items():
            if row["ms"] is None:
                lines.append(f"    {name:18} {row['status']}: {row['reason']}")
                continue
            halves = "" if row["backward_ms"] is None else f" = {row['forward_ms']:.3f} + {row['backward_ms']:.3f}"
            memory = "" if row["extra_bytes"] is None else f"  {row['extra_bytes'] / 1e9:+.3f} GB"
            rate = f"{row['rate'] / scale:.4g} {unit}, {row['share_of_ceiling']:.1%}"
            lines.append(f"    {name:18} {row['ms']:9.3f} ms{halves:22} ±{row['spread'] / 2:5.1%}  {rate:24}{memory}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=200, help="no part begins later than this")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def write(result: dict[str, Any]) -> None:
        if options.results:
            words = ["tiny" if options.tiny else "logprobs", *(options.only or ())]
            write_result("_".join(words), result, options.results)

    sizes = SIZES["tiny" if options.tiny else device.type]

    def variants_of(family: str) -> list[Variant]:
        return contestants(family, options.tiny, options.only)

    result = run_parts(sizes, variants_of, device, options.seconds, write)
    print()
    for text in [*map(line, result["goals"]), *result["problems"]]:
        print(text)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
