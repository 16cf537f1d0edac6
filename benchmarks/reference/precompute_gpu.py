"""The reference log-probs of a data set on a GPU: `fastdpo.precompute`, and padded forward passes with all logits.

    python benchmarks/reference/precompute_gpu.py             Llamas of 1B and 8B in bfloat16, lengths of HH-RLHF and
                                                              of instructions; about a minute on an H200
    python benchmarks/reference/precompute_gpu.py --tiny      a check of the script itself, on any device
    ... --results FOLDER                                      also writes them, anew after every part

Weights are random; `workloads.py` has the shapes. Two contestants, at the same tokens a pass:

prefix  all of `fastdpo.precompute` on tokenized rows, into an empty folder: hashing, packing, passes, shards on disk.
        What is done once a model is not in it: the hash of its weights, which is measured apart, and its check.
naive   chosen and rejected rows in file order, padded to the longest of a pass; transformers' forward, log_softmax and
        gather. On an eighth of the pairs, timed once, after a first run.

Given are tokens a second by wall clock (of `prefix` the median of three runs), counted as in the data (prompts twice)
and as the backbone ran them; the FLOPs of the least work (`flops.forward_work`) a second as a share of what a large
matrix product reaches; and the time that the device was busy as a share of the time that passed: the rest is host work
that nothing hides. A speed stands only where the sums of the naive code's sequences agree with those of small padded
passes. Exit code 1 where those of `prefix` do not, or a part failed or was left out for time.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "step")]

import torch  # noqa: E402
from common import device_name, write_result  # noqa: E402
from contestants import both_sides  # noqa: E402
from flops import ModelFlops, forward_work  # noqa: E402
from reference_goals import GOALS  # noqa: E402
from running import TOLERANCES, BackboneTokens, failed, forget, make_model, told  # noqa: E402
from step_goals import evaluate, line  # noqa: E402
from timing import Timing, synchronize  # noqa: E402
from torch import Tensor  # noqa: E402
from workloads import REFERENCE_PLANS, Part, rows  # noqa: E402

import fastdpo  # noqa: E402
from fastdpo.device import gemm_flops_per_second  # noqa: E402
from fastdpo.reference import model_fingerprint  # noqa: E402
from fastdpo.reference.fingerprint import sequence_key  # noqa: E402

MAX_TOKENS = {"cpu": 512, "cuda": 32768}  # a pass
YARDSTICK_PART = 8  # the yardstick's passes are this much smaller
NAIVE_PART = 8  # and the naive code runs so many times fewer pairs

# Of a row: given only where the numbers agree.
FIGURES = ("seconds", "spread", "tokens_per_second", "backbone_tokens_per_second", "share_of_ceiling",
           "device_seconds", "speedup")  # fmt: skip

Pairs = list[dict[str, list[int]]]


class Reference:
    """A model and the two ways to its log-probs; sums are those of all chosen completions, then of the rejected."""

    def __init__(self, model: Any, max_tokens: int) -> None:
        self.model, self.max_tokens = model, max_tokens
        self.fingerprint_seconds, self.fingerprint = timed(partial(model_fingerprint, model))
        self.tokens = BackboneTokens(model)

    def prefix(self, pairs: Pairs) -> Any:
        """A cache with nothing but the log-probs of these pairs."""
        with tempfile.TemporaryDirectory() as folder:
            cache = fastdpo.ReferenceCache(Path(folder) / "cache", self.fingerprint)
            return fastdpo.precompute(self.model, pairs, cache, max_tokens=self.max_tokens, progress=False)

    def naive(self, pairs: Pairs, max_tokens: int | None = None) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            made = [
                both_sides(fastdpo.PreferenceCollator(packing="padded")(some).to(self.model.device))
                .sums(self.model)
                .view(2, -1)
                for some in padded_passes(pairs, max_tokens or self.max_tokens)
            ]
        return torch.cat(made, 1).view(-1).cpu()


def padded_passes(pairs: Pairs, max_tokens: int) -> Iterator[Pairs]:
    """In their order, as many as fit padded to the longest of both sides; at least one."""
    some: Pairs = []
    longest = 0
    for pair in pairs:
        length = len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        if some and 2 * (len(some) + 1) * max(longest, length) > max_tokens:
            yield some
            some, longest = [], 0
        some.append(pair)
        longest = max(longest, length)
    if some:
        yield some


def cached_sums(cache: Any, pairs: Pairs) -> Tensor:
    keys = [sequence_key(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    return torch.from_numpy(cache.lookup(keys)[1])


def unshared(pairs: Pairs) -> int:
    return sum(2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)


def measure(part: Part, reference: Reference, rounds: int) -> dict[str, Any]:
    model = reference.model
    pairs = rows(part, model.config.vocab_size)
    few = pairs[: max(1, len(pairs) // NAIVE_PART)]
    result: dict[str, Any] = {
        "title": str(part),
        "model": part.model,
        "shape": part.shape,
        "pairs": part.pairs,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_tokens": reference.max_tokens,
        "ceiling_per_second": gemm_flops_per_second(model.device, model.dtype),
        "fingerprint_seconds": reference.fingerprint_seconds,
        "baseline": None,
        "contestants": {"prefix": empty_row(pairs), "naive": empty_row(few)},
    }
    flops = ModelFlops.of(model.config)
    right = reference.naive(few, max(1, reference.max_tokens // YARDSTICK_PART))
    allowed = [TOLERANCES[model.dtype].sum(len(pair[side])) for side in ("chosen_ids", "rejected_ids") for pair in few]
    # name -> the pairs, what is run with them, and the sums of the first few of what it gives
    ways: dict[str, tuple[Pairs, Callable[[Pairs], Any], Callable[[Any], Tensor]]] = {
        "prefix": (pairs, reference.prefix, lambda cache: cached_sums(cache, few)),
        "naive": (few, reference.naive, lambda sums: sums),
    }
    for name, (some, way, sums_of) in ways.items():
        row = result["contestants"][name]
        row["flops"] = flops.forward(forward_work(some))
        run = partial(way, some)
        try:
            way(few)  # compiles kernels, checks the model, fills the allocator
            reference.tokens.count = 0
            seconds, made = timed(run)
            row["backbone_tokens"] = reference.tokens.count
            check(row, sums_of(made), right, torch.tensor(allowed))
            if row["numbers_agree"]:
                times = [seconds]
                if name == "prefix":
                    times += (timed(run)[0] for _ in range(rounds - 1))
                    row["device_seconds"] = device_seconds(run)
                take_figures(row, Timing.of([[each] for each in times]), result["ceiling_per_second"])
        except Exception as error:  # out of memory, say; the other one is to be measured
            failed(row, error, FIGURES)
        forget()
    relate(result)
    return result


def empty_row(pairs: Pairs) -> dict[str, Any]:
    keys = ("reason", "flops", "backbone_tokens", "largest_error", "numbers_agree", *FIGURES)
    counts = {"pairs": len(pairs), "unshared_tokens": unshared(pairs)}
    return {"status": "not measured", **counts, **dict.fromkeys(keys)}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    synchronize()
    began = time.perf_counter()
    made = run()
    synchronize()
    return time.perf_counter() - began, made


def check(row: dict[str, Any], sums: Tensor, right: Tensor, allowed: Tensor) -> None:
    error = ((sums - right).abs() / allowed).max().item()  # NaN where there is one
    row["numbers_agree"] = error <= 1
    row["largest_error"] = error if math.isfinite(error) else None  # JSON has no NaN
    if not row["numbers_agree"]:
        row.update(status="numbers disagree", reason=f"a sum {error:.3g} times as far off as allowed")


def device_seconds(run: Callable[[], Any]) -> float | None:
    """That kernels and copies ran on the device, added up; None without one, or where nobody can say.

    By the profiler, in a run of its own: what it costs falls on the host.
    """
    if not torch.cuda.is_available():
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            timed(run)
        events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(event.self_device_time_total for event in events if not event.is_user_annotation) / 1e6 or None
    except Exception:  # a profiler that does not work here must not cost the figures that need none
        return None


def take_figures(row: dict[str, Any], timing: Timing, ceiling: float) -> None:
    seconds = timing.seconds[0]
    row.update(
        status="measured",
        seconds=seconds,
        spread=timing.spread,
        tokens_per_second=row["unshared_tokens"] / seconds,
        backbone_tokens_per_second=row["backbone_tokens"] / seconds,
        share_of_ceiling=row["flops"] / seconds / ceiling,
    )


def relate(result: dict[str, Any]) -> None:
    ours, naive = (result["contestants"][name] for name in ("prefix", "naive"))
    if naive["status"] == "measured":
        result["baseline"] = "naive"
        naive["speedup"] = 1.0
        if ours["status"] == "measured":
            ours["speedup"] = ours["tokens_per_second"] / naive["tokens_per_second"]


def run_parts(
    plan: list[Part],
    device: torch.device,
    seconds: float,
    after_part: Callable[[dict[str, Any]], None],
    rounds: int = 3,
) -> dict[str, Any]:
    """The result of all parts; `after_part` gets it as it grows. A part that raises is noted, and the next one runs."""
    began = time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result: dict[str, Any] = {"device_type": device.type, "complete": False, "parts": [], "problems": [], "goals": []}
    current, reference = None, None
    for part in plan:
        if time.monotonic() - began > seconds:
            result["problems"].append(f"{part}: left out, {seconds:.0f} s are over")
            continue
        try:
            if part.model != current or reference is None:
                current, reference = part.model, None
                forget()
                reference = Reference(
                    make_model(part.model, device, dtype, checkpointing=False), MAX_TOKENS[device.type]
                )
            measured = measure(part, reference, rounds)
        except Exception as error:  # the results of the other parts are wanted all the same
            status, reason = told(error)
            result["problems"].append(f"{part}: {status} ({reason})")
        else:
            result["parts"].append(measured)
            row = measured["contestants"]["prefix"]
            if row["status"] != "measured":
                result["problems"].append(f"{part}: {row['status']} ({row['reason']})")
            print(report(measured), flush=True)
        result["goals"] = evaluate(device.type, device_name(), result["parts"], GOALS)
        result["seconds"] = time.monotonic() - began
        after_part(result)
    result["complete"] = True
    after_part(result)
    return result


def report(result: dict[str, Any]) -> str:
    columns = ("pairs", "seconds", "tokens/s", "backbone/s", "ceiling", "device", "speed-up")
    lines = [f"\n{result['title']}, {result['dtype']}; hash of the weights {result['fingerprint_seconds']:.1f} s",
             f"  {'':8}" + "".join(f"{column:>12}" for column in columns)]  # fmt: skip
    for name, row in result["contestants"].items():
        if row["status"] != "measured":
            lines.append(f"  {name:8} {row['status']}: {row['reason']}")
            continue
        busy, speedup = row["device_seconds"], row["speedup"]
        cells = [
            str(row["pairs"]),
            f"{row['seconds']:.3g}",
            f"{row['tokens_per_second']:.4g}",
            f"{row['backbone_tokens_per_second']:.4g}",
            f"{row['share_of_ceiling']:.1%}",
            "-" if busy is None else f"{busy / row['seconds']:.1%}",
            "-" if speedup is None else f"{speedup:.2f}",
        ]
        lines.append(f"  {name:8}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no part begins later than this")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not options.tiny and device.type == "cpu":
        parser.error("there is no GPU; --tiny checks the script without one")

    def write(result: dict[str, Any]) -> None:
        if options.results:
            write_result("tiny-reference_gpu" if options.tiny else "reference_gpu", result, options.results)

    result = run_parts(REFERENCE_PLANS["tiny" if options.tiny else "cuda"], device, options.seconds, write)
    print()
    for text in [*map(line, result["goals"]), *result["problems"]]:
        print(text)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
