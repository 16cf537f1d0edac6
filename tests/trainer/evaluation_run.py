"""One rank of test_evaluation: evaluates and predicts, and writes what comes out."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import IterableDataset
from reward_models import tiny_reward_model
from tiny import random_rows, tiny_model, word_tokenizer

import fastdpo
from fastdpo import trainer as trainers

torch.set_num_threads(1)
folder = Path(sys.argv[1])
options = {"use_cpu": True, "report_to": [], "bf16": False, "disable_tqdm": True, "per_device_eval_batch_size": 2}
results = {}


def rows_of(kind, count):
    rows = random_rows(count, seed=3)
    if kind != "kto":
        return rows
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": row["chosen_ids"],
            "label": number % 3 != 1,
            "KL_completion_ids": row["rejected_ids"],
        }
        for number, row in enumerate(rows)
    ]


def evaluated(name, kind, rows, predict=True, **further):
    """Metrics and predictions of an untrained model."""
    made = {"dpo": fastdpo.DPOTrainer, "kto": fastdpo.KTOTrainer, "reward": fastdpo.RewardTrainer}[kind]
    config = getattr(trainers, made.__name__.replace("Trainer", "Config"))
    model = tiny_reward_model() if kind == "reward" else tiny_model()
    reference = {} if kind == "reward" else {"ref_model": tiny_model(seed=1)}
    run = made(
        model, args=config(str(folder / "out"), **{**options, **further}), processing_class=word_tokenizer(),
        train_dataset=rows_of(kind, 4), eval_dataset=rows,
        compute_metrics=lambda output: {"rows": len(output.predictions), "sum": float(output.predictions[:, 0].sum())},
        **reference,
    )  # fmt: skip
    metrics = run.evaluate()
    predictions = run.predict(rows).predictions.tolist() if predict else []
    kept = {key: value for key, value in metrics.items() if not key.endswith(("second", "runtime", "time"))}
    results[name] = {"metrics": kept, "predictions": predictions}


for count in (5, 8, 1):
    evaluated(f"dpo {count}", "dpo", rows_of("dpo", count))
    evaluated(f"reward {count}", "reward", rows_of("reward", count))
evaluated("kto 5", "kto", rows_of("kto", 5), predict=False, loss_type="apo_zero_unpaired")
size = 4 // int(os.environ.get("WORLD_SIZE", 1))  # one batch, of which the KL divergence is estimated
evaluated("kto kl 5", "kto", rows_of("kto", 5), predict=False, per_device_eval_batch_size=size)
evaluated("cut 5", "dpo", rows_of("dpo", 5), max_tokens_per_microbatch=30)
evaluated("padded 5", "dpo", rows_of("dpo", 5), packing="padded")
evaluated("weighted 5", "dpo", [{**row, "pair_weight": 1.0 + n} for n, row in enumerate(rows_of("dpo", 5))])
stream = IterableDataset.from_generator(lambda: iter(rows_of("dpo", 5)))
evaluated("stream 5", "dpo", stream, remove_unused_columns=False)
(folder / f"results-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(results))
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
