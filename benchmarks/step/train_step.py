"""A DPO training step (forward and backward) with cached reference: fastdpo's packings, naive code, and TRL.

    python benchmarks/step/train_step.py            on a GPU: Llamas of 1B and 8B in bfloat16, six shapes of data; on a
                                                    CPU: one of 135M in float32, two shapes, in under ten minutes
    python benchmarks/step/train_step.py --tiny     a check of the script itself, on any device
    ... --results FOLDER                            also writes them, anew after every part
    ... --models 1B --shapes hh "long prompt"       these parts alone

Weights are random; `workloads.py` has the shapes, `contestants.py` who takes part. On a GPU all layers are checkpointed
(`--checkpointing off` for none). Per contestant: pairs a second (median of interleaved runs), tokens through the
backbone, memory at its peak beyond weights and inputs, gradients included, FLOPs by `flops.py`, and MFU: the FLOPs that
the prefix-packed row needs without recomputation, over the time, as a share of what a large matrix product reaches.
Speed-up, FLOP ratio and memory ratio are against TRL, or against the plain step where there is no TRL. Times and ratios
are given only where loss and gradient norm agree with the plain step's in the same run. Exit code 1 where a part failed
or was left out for time, or where a packing of fastdpo failed or computed something else.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "step")]

import torch  # noqa: E402
from common import device_name, write_result  # noqa: E402
from contestants import BETA, PACKINGS, Contestant, Contestants  # noqa: E402
from flops import ModelFlops  # noqa: E402
from running import TOLERANCES, failed, forget, gradient_norm, make_model, told  # noqa: E402
from step_goals import evaluate, line, ratios  # noqa: E402
from timing import Mark, interleaved_intervals, peak_extra_bytes, synchronize  # noqa: E402
from torch import Tensor  # noqa: E402
from workloads import MODELS, PLANS, Part, rows  # noqa: E402

from fastdpo.device import gemm_flops_per_second  # noqa: E402

YARDSTICKS = ("plain", "naive", "padded")  # the first that runs says what is right
BASELINES = ("trl", "plain")  # the first that was measured is what others are compared with

# Of a row: given only where the numbers agree.
FIGURES = ("seconds", "spread", "pairs_per_second", "extra_bytes", "mfu", "speedup", "flop_ratio", "achieved",
           "memory_ratio")  # fmt: skip

ROUNDS_SECONDS = 6.0  # for the timed rounds of a part, of which there are two at the least


class Step:
    """One contestant's step, to be run any number of times."""

    def __init__(self, model: Any, contestant: Contestant) -> None:
        self.model, self.contestant = model, contestant

    def __call__(self, mark: Mark) -> None:
        self.prepare()
        mark()
        self.run()
        mark()

    def prepare(self) -> None:
        self.model.zero_grad()
        if self.model.config._attn_implementation != self.contestant.attention:
            self.model.set_attn_implementation(self.contestant.attention)

    def run(self) -> Tensor:
        loss = self.contestant.loss()
        loss.backward()
        return loss.detach()

    def first(self) -> dict[str, Any]:
        """Numbers, memory and time of one run; on a GPU of the second, since in the first one kernels are compiled."""
        if torch.cuda.is_available():
            self.prepare()
            self.run()
        self.prepare()
        forget()
        losses: list[Tensor] = []
        began = time.perf_counter()
        extra_bytes = peak_extra_bytes(lambda: losses.append(self.run()))
        synchronize()
        seconds = time.perf_counter() - began
        return {
            "loss": losses[0].item(),
            "grad_norm": gradient_norm(self.model),
            "extra_bytes": extra_bytes,
            "first_seconds": seconds,
        }


def measure(part: Part, model: Any, contestants: Contestants, checkpointing: bool, most_rounds: int) -> dict[str, Any]:
    """Rows of all contestants."""
    pairs = rows(part, model.config.vocab_size)
    targets = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    tolerance = TOLERANCES[model.dtype]
    made = contestants.of(pairs)
    flops = ModelFlops.of(model.config)
    result: dict[str, Any] = {
        "title": str(part),
        "model": part.model,
        "shape": part.shape,
        "pairs": part.pairs,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "checkpointing": checkpointing,
        "ceiling_per_second": gemm_flops_per_second(model.device, model.dtype),
        "useful_flops": flops(made["prefix"].work, checkpointing=False),
        "loss_tolerance": BETA * tolerance.sum(targets) / part.pairs,  # beta: the slope in a log-prob, at most
        "norm_tolerance": tolerance.norm,
        "baseline": None,
        "contestants": {},
    }
    steps: dict[str, Step] = {}
    for name, contestant in made.items():
        row = result["contestants"][name] = empty_row()
        if contestant is None:
            row.update(status="not installed")
        elif isinstance(contestant, Exception):
            failed(row, contestant, FIGURES)
        else:
            row.update(tokens=contestant.work.tokens, flops=flops(contestant.work, checkpointing))
            step = Step(model, contestant)
            try:
                row.update(step.first())
            except Exception as error:  # out of memory, or a peer's own fault: the others are to be measured
                failed(row, error, FIGURES)
            else:
                steps[name] = step
    compare_numbers(result)
    agreeing = {name: step for name, step in steps.items() if result["contestants"][name]["numbers_agree"]}
    take_times(result, agreeing, most_rounds)
    relate(result)
    model.zero_grad()
    return result


def empty_row() -> dict[str, Any]:
    keys = ("reason", "tokens", "flops", "first_seconds", "loss", "grad_norm", "numbers_agree", *FIGURES)
    return {"status": "not measured", **dict.fromkeys(keys)}


def compare_numbers(result: dict[str, Any]) -> None:
    """Every row that ran against the yardstick; one that disagrees loses its figures."""
    ran = {name: row for name, row in result["contestants"].items() if row["loss"] is not None}
    yardstick = next((ran[name] for name in YARDSTICKS if name in ran), None)
    if yardstick is None:
        return
    right = yardstick["loss"], yardstick["grad_norm"]
    for row in ran.values():
        loss = abs(row["loss"] - right[0]) / result["loss_tolerance"]
        norm = abs(row["grad_norm"] / right[1] - 1) / result["norm_tolerance"]
        row["numbers_agree"] = loss <= 1 and norm <= 1  # NaN is not
        if not row["numbers_agree"]:
            reason = f"loss {loss:.3g} times, gradient norm {norm:.3g} times as far off as allowed"
            row.update(dict.fromkeys(FIGURES), status="numbers disagree", reason=reason)
            for key in ("loss", "grad_norm"):  # JSON has no NaN
                row[key] = row[key] if math.isfinite(row[key]) else None


def take_times(result: dict[str, Any], steps: dict[str, Step], most_rounds: int) -> None:
    if not steps:
        return
    all_rows = result["contestants"]
    a_round = sum(all_rows[name]["first_seconds"] for name in steps)
    rounds = max(2, min(most_rounds, int(ROUNDS_SECONDS / a_round)))
    for name, timing in interleaved_intervals(steps, repeats=rounds, warmup=0).items():
        row = all_rows[name]
        if isinstance(timing, Exception):
            failed(row, timing, FIGURES)
            continue
        seconds = timing.seconds[0]
        row.update(
            status="measured",
            seconds=seconds,
            spread=timing.spread,
            pairs_per_second=result["pairs"] / seconds,
            mfu=result["useful_flops"] / seconds / result["ceiling_per_second"],
        )


def relate(result: dict[str, Any]) -> None:
    """Every measured row to the baseline's."""
    measured = {name: row for name, row in result["contestants"].items() if row["status"] == "measured"}
    result["baseline"] = next((name for name in BASELINES if name in measured), None)
    if result["baseline"] is None:
        return
    theirs = measured[result["baseline"]]
    for row in measured.values():
        row.update(ratios(theirs, row))


def run_parts(
    plan: list[Part],
    device: torch.device,
    checkpointing: bool,
    seconds: float,
    after_part: Callable[[dict[str, Any]], None],
    most_rounds: int = 10,
) -> dict[str, Any]:
    """The result of all parts; `after_part` gets it as it grows. A part that raises is noted, and the next one runs."""
    began = time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result: dict[str, Any] = {"device_type": device.type, "complete": False, "parts": [], "problems": [], "goals": []}
    current, model, contestants = None, None, None
    for part in plan:
        if time.monotonic() - began > seconds:
            result["problems"].append(f"{part}: left out, {seconds:.0f} s are over")
            continue
        try:
            if part.model != current:
                current = model = contestants = None
                forget()
                model = make_model(part.model, device, dtype, checkpointing)
                contestants = Contestants(model, device)
                current = part.model
            measured = measure(part, model, contestants, checkpointing, most_rounds)
        except Exception as error:  # the results of the other parts are wanted all the same
            status, reason = told(error)
            result["problems"].append(f"{part}: {status} ({reason})")
        else:
            result["parts"].append(measured)
            result["problems"] += faults(measured)
            print(report(measured), flush=True)
        forget()
        result["goals"] = evaluate(device.type, device_name(), result["parts"])
        result["seconds"] = time.monotonic() - began
        after_part(result)
    result["complete"] = True
    after_part(result)
    return result


def faults(result: dict[str, Any]) -> list[str]:
    """What is wrong with our own contestants; a peer that fails is in its row, and that is all."""
    return [
        f"{result['title']}, {name}: {row['status']} ({row['reason']})"
        for name, row in result["contestants"].items()
        if name in PACKINGS and row["status"] != "measured"
    ]


COLUMNS = ("pairs/s", "tokens", "extra GB", "TFLOP", "MFU", "speed-up", "FLOP ratio", "achieved", "memory ratio")


def report(result: dict[str, Any]) -> str:
    checkpointing = "on" if result["checkpointing"] else "off"
    lines = [
        f"\n{result['title']}, {result['dtype']}, checkpointing {checkpointing}; ratios against {result['baseline']}",
        f"  {'':8}" + "".join(f"{column:>14}" for column in COLUMNS),
    ]
    for name, row in result["contestants"].items():
        if row["status"] != "measured":
            lines.append(f"  {name:8} {row['status']}" + (f": {row['reason']}" if row["reason"] else ""))
            continue
        cells = [
            f"{row['pairs_per_second']:.3g}",
            str(row["tokens"]),
            "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e9:.2f}",
            f"{row['flops'] / 1e12:.3g}",
            f"{row['mfu']:.1%}",
            *("-" if row[key] is None else f"{row[key]:.2f}" for key in FIGURES[-4:]),
        ]
        lines.append(f"  {name:8}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--pairs", type=int, help="a batch; default: by model and shape")
    parser.add_argument("--checkpointing", choices=("on", "off"), help="default: on on a GPU, off on a CPU")
    parser.add_argument("--seconds", type=float, help="no part begins later than this; default: 150 on a GPU")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = [
        part if options.pairs is None else replace(part, pairs=options.pairs)
        for part in PLANS["tiny" if options.tiny else device.type]
        if (not options.models or part.model in options.models) and (not options.shapes or part.shape in options.shapes)
    ]
    checkpointing = (options.checkpointing or ("on" if device.type == "cuda" else "off")) == "on"
    seconds = options.seconds or (150 if device.type == "cuda" else math.inf)

    def write(result: dict[str, Any]) -> None:
        if options.results:
            write_result("tiny-train_step" if options.tiny else "train_step", result, options.results)

    result = run_parts(plan, device, checkpointing, seconds, write, most_rounds=2 if options.tiny else 10)
    print()
    for text in [*map(line, result["goals"]), *result["problems"]]:
        print(text)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
