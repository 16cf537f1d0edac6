"""One of two ranks of test_systems: a step of batch_loss on a wrapped model, against the whole batch on a plain one."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import random_rows, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastdpo
from fastdpo.packing import PreferenceCollator

way = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
rows = [dict(row, ref_chosen_logps=-20.0 - i, ref_rejected_logps=-22.0) for i, row in enumerate(random_rows(6))]


def make():
    model = tiny_model()
    if "lora" in way:
        import peft

        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, lora)
    return model


plain, model = make(), make()
fastdpo.batch_loss(plain, PreferenceCollator()(rows)).loss.backward()
whole = fastdpo.sequence_logps(plain, PreferenceCollator()(rows)).detach()
if way == "ddp":
    model = DistributedDataParallel(model)
else:
    mesh = init_device_mesh("cpu", (2,))
    inner = fastdpo.models.causal_lm(model)
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
batch = PreferenceCollator()(rows[rank::2])
with torch.no_grad():
    logps = fastdpo.sequence_logps(model, batch)
torch.testing.assert_close(logps, whole.view(2, 6)[:, rank::2].reshape(-1))
fastdpo.batch_loss(model, batch).loss.backward()
expected = dict(plain.named_parameters())
compared = 0
for name, parameter in model.named_parameters():
    grad = parameter.grad
    if grad is None:
        continue
    grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
    torch.testing.assert_close(grad, expected[name.removeprefix("module.")].grad, rtol=1e-4, atol=1e-6)
    compared += 1
assert compared == sum(parameter.grad is not None for parameter in plain.parameters()) > 0
(Path(sys.argv[2]) / f"equal-{rank}").touch()
dist.barrier()
dist.destroy_process_group()
