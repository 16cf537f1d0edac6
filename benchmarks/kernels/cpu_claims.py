"""What fastdpo saves on a CPU against the plain code in PyTorch: time and memory, in float32.

    python benchmarks/kernels/cpu_claims.py                      minutes on two cores
    python benchmarks/kernels/cpu_claims.py --results FOLDER     also writes them
    python benchmarks/kernels/cpu_claims.py --tiny               a check of the script itself

Two tasks, forward and backward: log-probs from logits (against log_softmax and gather), and the DPO loss of eight
pairs from hidden states (against the same with all logits). Times are medians of rounds in which both run, in one
process. Memory is the peak of a process of its own for each side, beyond what is resident before: inputs, PyTorch, one
small run; and the same without the gradients, which every way has to return. Ratios are given only where outputs and
gradients agree with float64 ones in the same run; else the exit code is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "kernels")]

import torch  # noqa: E402
from common import write_result  # noqa: E402
from logprobs import ceiling_of, make_problem, title  # noqa: E402
from problems import Problem  # noqa: E402
from runner import Run, measure  # noqa: E402
from timing import peak_extra_bytes  # noqa: E402
from variants import VARIANTS, Variant  # noqa: E402

CPU = torch.device("cpu")
NAIVE = "eager"
Memory = Callable[[str, str, str], "int | None"]  # family, mode, variant

SIZES = {
    False: {"logits": {"n": 2048, "v": 49152}, "dpo": {"n": 2048, "d": 576, "v": 49152}},
    True: {"logits": {"n": 64, "v": 1000}, "dpo": {"n": 64, "d": 32, "v": 1000}},
}
CONTESTANTS = {"logits": ("fastdpo", "fastdpo, in place", NAIVE), "dpo": ("fastdpo", NAIVE)}


def contestants(family: str) -> list[Variant]:
    return [variant for variant in VARIANTS[family] if variant.name in CONTESTANTS[family]]


def make_run(problem: Problem, mode: str, variant: str) -> Run:
    (chosen,) = [candidate for candidate in VARIANTS[problem.family] if candidate.name == variant]
    (needs,) = [candidate for candidate in problem.modes if candidate.name == mode]
    return Run(problem, chosen, needs, chosen.function(problem))


def measure_memory(family: str, mode: str, variant: str, tiny: bool) -> int | None:
    """In this process, which should have done nothing else."""
    make_run(make_problem(family, SIZES[True][family], CPU), mode, variant)()  # loads what is loaded on first use
    run = make_run(make_problem(family, SIZES[tiny][family], CPU), mode, variant)
    run.leaves()  # copies of inputs that are to be overwritten are made here
    return peak_extra_bytes(run)


def memory_in_a_process(family: str, mode: str, variant: str, tiny: bool) -> int | None:
    command = [sys.executable, __file__, "--memory", family, mode, variant, *(["--tiny"] if tiny else [])]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None if printed == "None" else int(printed)


def compare(problem: Problem, memory: Memory, repeats: int = 5) -> dict[str, Any]:
    """mode -> variant -> figures, and ratios to the plain code where both are right."""
    problem.modes = tuple(mode for mode in problem.modes if mode.has_gradient)
    part = measure(problem, contestants(problem.family), ceiling_of(problem), repeats, warmup=1)
    cases = {}
    for mode, measured in part["modes"].items():
        rows = measured["variants"]
        for name, row in rows.items():
            row["extra_bytes"] = memory(problem.family, mode, name) if row["ms"] is not None else None
        (needs,) = [candidate for candidate in problem.modes if candidate.name == mode]
        for variant in contestants(problem.family):
            row = rows[variant.name]
            leaves = () if variant.overwrites else problem.leaves(variant, needs)
            gradients = sum(leaf.nbytes for leaf in leaves if leaf.requires_grad)
            row["work_bytes"] = None if row["extra_bytes"] is None else max(0, row["extra_bytes"] - gradients)
        plain = rows[NAIVE]
        for row in rows.values():
            row["time_ratio"] = ratio(row["ms"], plain["ms"])
            row["memory_ratio"] = ratio(row["extra_bytes"], plain["extra_bytes"])
            row["work_memory_ratio"] = ratio(row["work_bytes"], plain["work_bytes"])
        cases[mode] = rows
    return {"family": problem.family, **problem.shape, "dtype": part["dtype"], "modes": cases}


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else ours / theirs


def report(part: dict[str, Any]) -> str:
    lines = [f"\n{title(part['family'], part)}, {part['dtype']}"]
    for mode, rows in part["modes"].items():
        lines.append(f"  {mode:32} {'ms':>9} {'extra GB':>9} {'time':>9} {'memory':>9} {'no grads':>9}")
        for name, row in rows.items():
            shown = [row["ms"], None if row["extra_bytes"] is None else row["extra_bytes"] / 1e9, row["time_ratio"],
                     row["memory_ratio"], row["work_memory_ratio"]]  # fmt: skip
            cells = " ".join(f"{'-' if value is None else format(value, '.3f'):>9}" for value in shown)
            lines.append(f"    {name:30} {cells}" + ("" if row["status"] == "measured" else f"  {row['status']}"))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if torch.cuda.is_available():
        parser.error("this is about CPUs; hide the GPU with CUDA_VISIBLE_DEVICES=")
    if options.memory:
        print(measure_memory(*options.memory, tiny=options.tiny))
        return 0
    parts = []
    for family, shape in SIZES[options.tiny].items():
        parts.append(compare(make_problem(family, shape, CPU), lambda *run: memory_in_a_process(*run, options.tiny)))
        print(report(parts[-1]), flush=True)
    result = {"device_type": "cpu", "threads": torch.get_num_threads(), "parts": parts}
    if options.results:
        print(
            "written to", write_result("tiny-kernels-cpu" if options.tiny else "kernels_cpu", result, options.results)
        )
    rows = [row for part in parts for case in part["modes"].values() for row in case.values()]
    return 0 if all(row["status"] == "measured" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
