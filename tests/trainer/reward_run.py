"""One rank of test_reward: trains a tiny reward model and writes the curve; by torch.distributed.run or alone."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from reward_models import tiny_reward_model
from tiny import random_rows, word_tokenizer
from torch.distributed.tensor import DTensor

from fastdpo import RewardConfig, RewardTrainer

torch.set_num_threads(1)
folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
rows = [{**row, "margin": 0.1 * (i % 5)} for i, row in enumerate(random_rows(32, prompt=(2, 30)))]
trainer = RewardTrainer(
    tiny_reward_model(),
    args=RewardConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", 1)),
        per_device_eval_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
        max_steps=4,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=2,
        center_rewards_coefficient=0.1,
        **options,
    ),
    train_dataset=rows,
    eval_dataset=rows[:12],
    processing_class=word_tokenizer(),
)
if "fsdp" in options:  # accelerate shards models on GPUs only, unless told that it is on some
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
trainer.train()
evaluated = trainer.evaluate()
sharded = isinstance(trainer.model.get_input_embeddings().weight, DTensor)
if trainer.is_world_process_zero():
    names = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin", "loss")
    logs = [[entry[name] for name in (*names, "grad_norm")] for entry in trainer.state.log_history if "loss" in entry]
    logs.append([evaluated[f"eval_{name}"] for name in names])
    system = "fsdp2" if sharded else type(trainer.model_wrapped).__name__
    (folder / "curve.json").write_text(json.dumps({"system": system, "logs": logs}))
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
