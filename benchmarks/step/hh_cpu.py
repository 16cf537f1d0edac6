"""A DPO training step with cached reference, fastdpo against TRL, on this machine's CPU.

    python benchmarks/step/hh_cpu.py             both, each in a process of its own, step by step in turn
    python benchmarks/step/hh_cpu.py --epochs 1  half as long; nothing is written

SmolLM2-135M in float32; the first 32 pairs of benchmarks/data/hh_rlhf_harmless_test.csv, filled with random tokens, two
epochs in batches of 8; precompute_ref_log_probs=True, gradient checkpointing off, max_length 512, the same order, in
both. A step of one is followed by the same step of the other, and one waits while the other works: the ratio is the
median over the steps, the first left out as warm-up, given with its least and greatest. Memory is the peak of the
process. A ratio is printed only where the losses and gradient norms of all steps agree. The start (tokenizing and the
reference) is timed once, and has no ratio: benchmarks/reference/precompute_cpu.py compares that, in rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "step")]

from common import write_result  # noqa: E402
from running import forget  # noqa: E402
from turns import Spread, Turns, contestants, take_turns  # noqa: E402
from workloads import MAX_LENGTH, text_rows, word_tokenizer  # noqa: E402

BATCH = 8
CONTESTANTS = ("fastdpo", "trl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--turns", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--model", help="model folder; default: the demo's model")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        turns = Turns(*options.turns)
        made = train(options.contestant, options.model, options.pairs, options.epochs, turns)
        Path(options.out).write_text(json.dumps(made))
        return 0
    from fastdpo.demo import prepare_model

    model = options.model or str(prepare_model())
    shared = ["--model", model, "--pairs", str(options.pairs), "--epochs", str(options.epochs)]
    with contestants({name: [__file__, "--contestant", name, *shared] for name in CONTESTANTS}) as started:
        results = take_turns(started)
    ours, theirs = (results[name] for name in CONTESTANTS)
    agree = all(
        abs(a - b) <= 1e-3 * max(1.0, abs(b))
        for key in ("losses", "grad_norms")
        for a, b in zip(ours[key], theirs[key], strict=True)
    )
    summary: dict[str, Any] = {"pairs": options.pairs, "epochs": options.epochs, "numbers_agree": agree, **results}
    ratios = summary["ratios"] = step_ratios(ours, theirs) if agree else None
    memory = summary["ratio_peak_memory_gb"] = ours["peak_memory_gb"] / theirs["peak_memory_gb"] if agree else None
    shown = {
        "seconds_a_pair": None if ratios is None else str(Spread.of(ratios)),
        "start_seconds": None,
        "peak_memory_gb": None if memory is None else f"{memory:.3f}",
    }
    print(f"\n{'':20}{'fastdpo':>10}{'TRL':>10}  fastdpo / TRL")
    for column, ratio in shown.items():
        print(f"{column:20}{ours[column]:10.2f}{theirs[column]:10.2f}  {ratio or '-'}")
    print(f"losses    fastdpo {ours['losses']}\n          TRL     {theirs['losses']}")
    print(f"grad norm fastdpo {ours['grad_norms']}\n          TRL     {theirs['grad_norms']}")
    if not agree:
        print("The numbers do not agree, so no ratio is given.")
    if (options.pairs, options.epochs) == (32, 2):
        print("written to", write_result("step_hh_cpu", summary))
    return 0 if agree else 1


def step_ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> list[float]:
    """Of every step but the first, where there are more."""
    ratios = [a / b for a, b in zip(ours["step_seconds"], theirs["step_seconds"], strict=True)]
    return ratios[1:] or ratios


def train(contestant: str, model_path: str, pairs: int, epochs: int, turns: Turns) -> dict[str, Any]:
    """The start is a turn, and so is each step."""
    import resource

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    if contestant == "trl":
        from trl import DPOConfig, DPOTrainer
    else:
        from fastdpo import DPOConfig, DPOTrainer

    turns.wait()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    vocabulary = model.config.vocab_size
    step_seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            forget()  # the other has the memory meanwhile
            turns.wait()
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            step_seconds.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            logging_steps=1,
            max_length=MAX_LENGTH,
            bf16=False,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            save_strategy="no",
            report_to=[],
            seed=0,
        )
        began = time.perf_counter()
        trainer = DPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(text_rows(pairs, vocabulary)),
            processing_class=word_tokenizer(vocabulary),
            callbacks=[Clock()],
        )
        start_seconds = time.perf_counter() - began
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "seconds_a_pair": statistics.median(step_seconds[1:] or step_seconds) / BATCH,
        "start_seconds": start_seconds,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "step_seconds": step_seconds,
        "losses": [round(entry["loss"], 6) for entry in logs],
        "grad_norms": [round(entry["grad_norm"], 5) for entry in logs],
    }


if __name__ == "__main__":
    sys.exit(main())
