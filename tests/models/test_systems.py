"""Packed passes inside the machinery that training runs put around a model: the numbers stay those without it."""

import contextlib
import copy

import pytest
import torch
from processes import run_script
from tiny import random_rows, tiny_model

import fastdpo
from fastdpo.packing import PreferenceCollator


def rows_with_refs(count=4, seed=1):
    return [dict(row, ref_chosen_logps=-20.0 - i, ref_rejected_logps=-22.0)
            for i, row in enumerate(random_rows(count, seed=seed))]  # fmt: skip


def loss_and_grads(model, context=contextlib.nullcontext, packing="prefix"):
    model.zero_grad()
    with context():
        loss = fastdpo.batch_loss(model, PreferenceCollator(packing=packing)(rows_with_refs())).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, **tolerance)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(kind, use_reentrant):
    model = tiny_model(kind).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = loss_and_grads(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    layers, count = [], torch.utils.checkpoint.checkpoint
    model._set_gradient_checkpointing(
        enable=True,
        gradient_checkpointing_func=lambda *args, **kwargs: (
            layers.append(1) or count(*args, use_reentrant=use_reentrant, **kwargs)
        ),
    )
    assert_same(loss_and_grads(model), plain)
    assert len(layers) == 2


def test_activation_offloading():
    model = tiny_model()
    assert_same(loss_and_grads(model, torch.autograd.graph.save_on_cpu), loss_and_grads(model))


def test_autocast():
    """Log-probs come out in float32, near the float32 ones, with gradients in the weights' dtype."""
    model = tiny_model()
    loss, grads = loss_and_grads(model, lambda: torch.autocast("cpu", torch.bfloat16))
    exact, exact_grads = loss_and_grads(model)
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.05 * abs(exact)
    _, padded_grads = loss_and_grads(model, lambda: torch.autocast("cpu", torch.bfloat16), packing="padded")
    for name, grad in exact_grads.items():
        ours, theirs = ((each[name] - grad).norm() for each in (grads, padded_grads))
        assert ours <= 2 * theirs + 1e-3 * grad.norm(), name


def test_four_bit_weights_with_lora():
    """QLoRA: the layers' weights in four bits, adapters on top, the head as it was."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    model = tiny_model(hidden_size=64, intermediate_size=64)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    four = bitsandbytes.nn.Linear4bit(child.in_features, child.out_features, bias=False,
                                                      quant_type="nf4", compute_dtype=torch.float32)  # fmt: skip
                    four.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                    four.support_avx512bf16_for_cpu = False  # its CPU product for evaluation, in bfloat16
                    setattr(parent, name, four.to("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, lora)
    ours, theirs = (loss_and_grads(model, packing=packing) for packing in ("prefix", "padded"))
    assert ours[1] and all("lora_" in name for name in ours[1])
    assert_same(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dropout_follows_the_mode():
    model = tiny_model("gpt2", embd_pdrop=0.5, attn_pdrop=0.3, resid_pdrop=0.0).train()
    row = {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10], "rejected_ids": [9, 10, 11]}
    batch = PreferenceCollator()([row])
    torch.manual_seed(0)
    draws = [fastdpo.sequence_logps(model, batch).detach() for _ in range(3)]
    assert not torch.equal(draws[0], draws[1])
    model.eval()
    assert torch.equal(fastdpo.sequence_logps(model, batch), fastdpo.sequence_logps(model, batch))


def test_a_copied_model_stays_apart():
    model = tiny_model()
    fastdpo.models.extend_forward(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    batch = PreferenceCollator()(rows_with_refs())
    assert not torch.allclose(fastdpo.sequence_logps(model, batch), fastdpo.sequence_logps(other, batch))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp2-lora"])
def test_a_loop_of_ones_own_on_two_processes(tmp_path, way):
    """batch_loss on a wrapped or sharded model: the gradients of one process with all pairs."""
    run_script("tests/models/systems_run.py", way, tmp_path, processes=2, folder=tmp_path)
    assert len(list(tmp_path.glob("equal-*"))) == 2
