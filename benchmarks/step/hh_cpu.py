"""A DPO training step with cached reference, fastdpo against TRL, on this machine's CPU.

    python benchmarks/step/hh_cpu.py            both, one after the other, each in a process of its own
    python benchmarks/step/hh_cpu.py --pairs 8  a quick look: one step, and that one cold; nothing is written

SmolLM2-135M in float32; the first 32 pairs of benchmarks/data/hh_rlhf_harmless_test.csv, filled with random tokens;
batches of 8; precompute_ref_log_probs=True, gradient checkpointing off, max_length 512, the same order, in both. Time
is that of the optimizer steps, the first left out as warm-up; memory is the peak of the process. A ratio is printed
only where the losses and gradient norms of all steps agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "step")]

from common import in_a_process, write_result  # noqa: E402
from workloads import MAX_LENGTH, text_rows, word_tokenizer  # noqa: E402

BATCH = 8
CONTESTANTS = ("fastdpo", "trl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help="model folder; default: the demo's model")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        Path(options.out).write_text(json.dumps(train(options.contestant, options.model, options.pairs)))
        return 0
    from fastdpo.demo import prepare_model

    model = options.model or str(prepare_model())
    shared = ["--model", model, "--pairs", str(options.pairs)]
    results = {name: in_a_process([__file__, "--contestant", name, *shared]) for name in CONTESTANTS}
    ours, theirs = (results[name] for name in CONTESTANTS)
    agree = all(
        abs(a - b) <= 1e-3 * max(1.0, abs(b))
        for key in ("losses", "grad_norms")
        for a, b in zip(ours[key], theirs[key], strict=True)
    )
    summary: dict[str, Any] = {"pairs": options.pairs, "numbers_agree": agree, **results}
    columns = ("seconds_a_pair", "reference_seconds", "peak_memory_gb")
    print(f"\n{'':24}{'fastdpo':>10}{'TRL':>10}{'ratio':>10}")
    for column in columns:
        ratio = ours[column] / theirs[column]
        summary[f"ratio_{column}"] = ratio if agree else None
        print(f"{column:24}{ours[column]:10.2f}{theirs[column]:10.2f}{ratio if agree else float('nan'):10.3f}")
    print(f"losses    fastdpo {ours['losses']}\n          TRL     {theirs['losses']}")
    print(f"grad norm fastdpo {ours['grad_norms']}\n          TRL     {theirs['grad_norms']}")
    if not agree:
        print("The numbers do not agree, so no ratio is given.")
    if options.pairs == 32:
        print("written to", write_result("step_hh_cpu", summary))
    return 0 if agree else 1


def train(contestant: str, model_path: str, pairs: int) -> dict[str, Any]:
    import resource

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    if contestant == "trl":
        from trl import DPOConfig, DPOTrainer
    else:
        from fastdpo import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    vocabulary = model.config.vocab_size
    step_seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            step_seconds.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            num_train_epochs=1,
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
        reference_seconds = time.perf_counter() - began
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    timed = step_seconds[1:] or step_seconds
    return {
        "seconds_a_pair": sum(timed) / len(timed) / BATCH,
        "reference_seconds": reference_seconds,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "step_seconds": step_seconds,
        "losses": [round(entry["loss"], 6) for entry in logs],
        "grad_norms": [round(entry["grad_norm"], 5) for entry in logs],
    }


if __name__ == "__main__":
    sys.exit(main())
