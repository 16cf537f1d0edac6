"""One rank of test_distributed: trains a tiny model and writes the curve; started by torch.distributed.run or alone."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny import random_rows, tiny_model, word_tokenizer
from torch.distributed.tensor import DTensor

from fastdpo import DPOConfig, DPOTrainer

torch.set_num_threads(1)
folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
if options.pop("own_disk", False):  # as on machines that share none
    options["ref_logps"] = str(folder / f"cache-{os.environ.get('RANK', 0)}")
rows = random_rows(32, prompt=(2, 30))
dtype = getattr(torch, options.pop("dtype", "float32"))
trainer = DPOTrainer(
    tiny_model(dtype=dtype),
    args=DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", 1)),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        **{"max_steps": 4, "learning_rate": 1e-3, **options},
    ),
    train_dataset=rows,
    processing_class=word_tokenizer(),
)
if "fsdp" in options:  # accelerate shards models on GPUs only, unless told that it is on some
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    plugin = trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    if options.get("bf16"):
        plugin.set_mixed_precision("bf16")
passes, forward = [], trainer.compute_loss
trainer.compute_loss = lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs)
trainer.train()
weight = trainer.model.get_input_embeddings().weight
sharded = {"fsdp2": isinstance(weight, DTensor), "zero3": hasattr(weight, "ds_id")}
system = next((name for name, found in sharded.items() if found), type(trainer.model_wrapped).__name__)
if options.get("master_weights"):
    start = dict(tiny_model(dtype=dtype).named_parameters())
    held = {name: trainer.optimizer.state[value]["master_weight"] for name, value in trainer.model.named_parameters()}
    held = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in held.items()}
    moved = {name: float((value != start[name].float()).double().mean()) for name, value in held.items()}
    (folder / f"moved-{trainer.args.process_index}.json").write_text(json.dumps(moved))
    (folder / f"dtypes-{trainer.args.process_index}.json").write_text(
        json.dumps(sorted({str(value.dtype) for value in (*held.values(), *trainer.model.parameters())}))
    )
(folder / "system.json").write_text(json.dumps(system))
(folder / f"passes-{trainer.args.process_index}.json").write_text(json.dumps(len(passes)))
if trainer.is_world_process_zero():
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen")
    logs = [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
    (folder / "curve.json").write_text(json.dumps(logs))
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
