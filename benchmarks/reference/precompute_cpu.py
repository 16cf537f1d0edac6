"""The reference log-probs of a data set, `fastdpo.precompute` against TRL's own precompute, on this machine's CPU.

    python benchmarks/reference/precompute_cpu.py            some twenty minutes on two cores
    python benchmarks/reference/precompute_cpu.py --pairs 8  a quick look; nothing is written

SmolLM2-135M in float32; the first 64 pairs of benchmarks/data/hh_rlhf_harmless_test.csv, filled with random tokens;
max_length 512. Every run is a process of its own, and the contestants take turns: fastdpo; TRL with its default,
batches of 8 pairs; TRL with that `precompute_ref_batch_size` which was its fastest in the first round, where all of
them ran. Imports, model load and tokenizing come before the clock starts, on both sides. What it measures:

fastdpo  all of `fastdpo.precompute` on tokenized rows, into an empty folder: hash of the weights, check of the packing,
         passes, shards on disk
trl      `DPOTrainer._precompute_ref_logps`, where TRL does this: collating, passes, its own cache file. Its hash of the
         weights, taken elsewhere, is left out.

Time is the median of the rounds, memory the largest peak of a process, tokens those that the backbone ran (padding, and
fastdpo's check, too). Ratios stand only where the sum of every sequence agrees (`TOLERANCES`); else the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "step")]

import torch  # noqa: E402
from common import device_name, in_a_process, write_result  # noqa: E402
from reference_goals import CPU_MODEL, GOALS  # noqa: E402
from running import TOLERANCES, BackboneTokens  # noqa: E402
from step_goals import evaluate, line  # noqa: E402
from workloads import MAX_LENGTH, REFERENCE_PAIRS, hh_lengths, text_rows, word_tokenizer  # noqa: E402

from fastdpo.device import peak_memory_gb  # noqa: E402

OURS, DEFAULT, BEST = "prefix", "trl", "trl_best"
DEFAULT_BATCH = 8  # of TRL, where neither precompute_ref_batch_size nor per_device_train_batch_size is set
BATCHES = (1, 2, 4, 8, 16)

Runs = dict[str, list[dict[str, Any]]]  # contestant -> what `measure` gave, run by run


def measure(contestant: str, model_path: str, pairs: int, batch_size: int | None) -> dict[str, Any]:
    """One run in this process; sums are those of the chosen completions, then of the rejected ones."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    for weight in model.parameters():
        weight.sum()  # loaded weights are read from disk when they are first touched
    vocabulary = model.config.vocab_size
    tokens = BackboneTokens(model)
    run = ours if contestant == OURS else theirs
    seconds, sums = run(model, text_rows(pairs, vocabulary), word_tokenizer(vocabulary), batch_size)
    return {
        "batch_size": batch_size,
        "seconds": seconds,
        "peak_memory_gb": peak_memory_gb(torch.device("cpu")),
        "backbone_tokens": tokens.count,
        "sums": sums,
    }


def ours(model: Any, rows: list[dict[str, str]], tokenizer: Any, _: None) -> tuple[float, list[float]]:
    from fastdpo import precompute
    from fastdpo.data import tokenize_row
    from fastdpo.reference.fingerprint import sequence_key

    tokenized = [tokenize_row(row, tokenizer) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        cache = precompute(model, tokenized, Path(folder) / "cache", max_length=MAX_LENGTH, progress=False)
        seconds = time.perf_counter() - began
    keys = [sequence_key(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in tokenized]
    return seconds, cache.lookup(keys)[1].tolist()


def theirs(model: Any, rows: list[dict[str, str]], tokenizer: Any, batch_size: int | None) -> tuple[float, list[float]]:
    """`batch_size` None: TRL's default."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    seconds = []

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            seconds.append(time.perf_counter() - began)
            return dataset

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            max_length=MAX_LENGTH,
            bf16=False,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=batch_size,
            report_to=[],
        )
        trainer = Timed(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        columns = [list(trainer.train_dataset[f"ref_{side}_logps"]) for side in ("chosen", "rejected")]
    return sum(seconds), [float(value) for column in columns for value in column]


def take_turns(run: Callable[[str, int | None], dict[str, Any]], rounds: int, batches: Sequence[int]) -> Runs:
    """`run` gets a contestant and its batch size; all of `batches` in the first round, the fastest in the others."""
    runs: Runs = {OURS: [run(OURS, None)], DEFAULT: [run(DEFAULT, None)]}
    others = [run(BEST, size) for size in batches if size != DEFAULT_BATCH]
    best = min([*runs[DEFAULT], *others], key=lambda one: one["seconds"])
    if best in others:
        runs[BEST] = [best]
    for _ in range(rounds - 1):
        for name, made in runs.items():
            made.append(run(name, made[0]["batch_size"]))
    return runs


def compare(runs: Runs, pairs: int) -> dict[str, Any]:
    """The figures of every contestant; ratios of fastdpo to those whose sums agree with its own in every run."""
    targets = [row[side] for side in (1, 2) for row in hh_lengths()[:pairs]]
    allowed = [TOLERANCES[torch.float32].sum(count) for count in targets]
    yardstick = runs[OURS][0]["sums"]
    contestants: dict[str, Any] = {}
    for name, made in runs.items():
        errors = [worst(one["sums"], yardstick, allowed) for one in made]
        contestants[name] = {
            "batch_size": DEFAULT_BATCH if name == DEFAULT else made[0]["batch_size"],
            "seconds": statistics.median(one["seconds"] for one in made),
            "runs": [one["seconds"] for one in made],
            "peak_memory_gb": max(one["peak_memory_gb"] for one in made),
            "backbone_tokens": made[0]["backbone_tokens"],
            "largest_error": max(errors) if all(map(math.isfinite, errors)) else None,  # JSON has no NaN
            "numbers_agree": all(error <= 1 for error in errors),
        }
    mine, default = contestants[OURS], contestants[DEFAULT]
    best = contestants.get(BEST, default)
    mine["speedup"] = ratio(mine, default, "seconds")
    mine["speedup_best"] = ratio(mine, best, "seconds")
    mine["memory_ratio"] = ratio(mine, default, "peak_memory_gb")
    return {
        "model": CPU_MODEL,
        "shape": "hh",
        "pairs": pairs,
        "dtype": "float32",
        "baseline": "trl",
        "contestants": contestants,
    }


def worst(sums: list[float], right: list[float], allowed: list[float]) -> float:
    """The largest difference, as a multiple of the allowed one; NaN where there is one."""
    errors = [abs(a - b) / limit for a, b, limit in zip(sums, right, allowed, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def ratio(mine: dict[str, Any], other: dict[str, Any], figure: str) -> float | None:
    """How many times less of it fastdpo takes; None where numbers do not agree."""
    return other[figure] / mine[figure] if mine["numbers_agree"] and other["numbers_agree"] else None


def report(part: dict[str, Any]) -> str:
    columns = ("batch_size", "seconds", "peak_memory_gb", "backbone_tokens", "largest_error")
    lines = [f"\n{part['model']}, {part['shape']}, {part['pairs']} pairs, {part['dtype']}",
             f"{'':10}" + "".join(f"{column:>17}" for column in columns)]  # fmt: skip
    for name, row in part["contestants"].items():
        cells = ("-" if row[column] is None else f"{row[column]:.5g}" for column in columns)
        lines.append(f"{name:10}" + "".join(f"{cell:>17}" for cell in cells))
        if not row["numbers_agree"]:
            lines.append(f"{name}: the numbers do not agree, so no ratio is given.")
    for figure in ("speedup", "speedup_best", "memory_ratio"):
        value = part["contestants"][OURS][figure]
        lines.append(f"{figure:14}" + ("-" if value is None else f"{value:.2f}"))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=REFERENCE_PAIRS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES, help="of TRL; its default always runs")
    parser.add_argument("--model", help="model folder; default: the demo's model")
    parser.add_argument("--contestant", choices=(OURS, DEFAULT, BEST), help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if torch.cuda.is_available():
        parser.error("this is about CPUs; hide the GPU with CUDA_VISIBLE_DEVICES=")
    if options.contestant:
        made = measure(options.contestant, options.model, options.pairs, options.batch_size)
        Path(options.out).write_text(json.dumps(made))
        return 0
    from fastdpo.demo import prepare_model

    model = options.model or str(prepare_model())

    def run(contestant: str, batch_size: int | None) -> dict[str, Any]:
        size = [] if batch_size is None else ["--batch-size", str(batch_size)]
        shared = ["--model", model, "--pairs", str(options.pairs)]
        made = in_a_process([__file__, "--contestant", contestant, *size, *shared])
        print(f"{made['seconds']:.2f} s", flush=True)
        return made

    part = compare(take_turns(run, options.rounds, options.batches), options.pairs)
    goals = evaluate("cpu", device_name(), [part], GOALS)
    print("\n".join([report(part), *map(line, goals)]))
    if options.pairs == REFERENCE_PAIRS:
        result = {"rounds": options.rounds, "max_length": MAX_LENGTH, "parts": [part], "goals": goals}
        print("written to", write_result("reference_cpu", result))
    return 0 if all(row["numbers_agree"] for row in part["contestants"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
