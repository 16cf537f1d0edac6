"""Runs on quantized weights: those of the same run on dense weights of the same values."""

import copy

import pytest
import torch
from tiny import random_rows, tiny_model
from trainer_runs import losses_of, trainer

from fastdpo.models import evaluating
from fastdpo.reference import model_fingerprint

bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

KINDS = ["nf4", "nested", "int8"]
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}


def layer(child, kind):
    sizes = child.in_features, child.out_features
    if kind == "int8":
        made = bitsandbytes.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0)
        made.weight = bitsandbytes.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": "nf4", "compress_statistics": kind == "nested"}
        made = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, **options)
        made.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False, **options)
        made.support_avx512bf16_for_cpu = True  # so that it repacks its weights on every processor
    return made.to("cpu")


def models(kind, seed=0):
    """One with quantized layers, and one with the numbers that these stand for."""
    from peft.utils.integrations import dequantize_module_weight

    quantized = tiny_model(seed=seed, **SHAPE)
    dense = copy.deepcopy(quantized)
    for block, other in zip(quantized.model.layers, dense.model.layers, strict=True):
        for part in ("self_attn", "mlp"):
            for name, child in list(getattr(block, part).named_children()):
                if isinstance(child, torch.nn.Linear):
                    made = layer(child, kind)
                    setattr(getattr(block, part), name, made)
                    with torch.no_grad():
                        getattr(getattr(other, part), name).weight.copy_(dequantize_module_weight(made))
    return quantized.eval(), dense


def packed(model):
    return [
        name
        for name, module in model.named_modules()
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False)
    ]


def curves(tmp_path, model, **options):
    rows = random_rows(12, seed=1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    run = trainer(tmp_path, model, rows, peft_config=config, max_steps=3, optim="sgd", learning_rate=0.05, **options)
    run.train()
    history = run.state.log_history
    norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    evals = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return losses_of(run), norms, evals, run


@pytest.mark.parametrize("way", ["online", "cache", "evaluating"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_quantized_weights(tmp_path, kind, way):
    options = {
        "online": {},
        "cache": {"precompute_ref_log_probs": True},
        "evaluating": {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": random_rows(4, seed=3)},
    }[way]
    if way == "cache":
        options["ref_logps"] = str(tmp_path / "cache")
    quantized, dense = models(kind)
    *ours, run = curves(tmp_path / "a", quantized, **options)
    if way == "cache":
        options["ref_logps"] = str(tmp_path / "cache of dense")
    *theirs, _ = curves(tmp_path / "b", dense, **options)
    assert min(theirs[1]) > 0.01
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)
    assert not packed(run.model)


def test_a_callback_that_generates_in_the_middle(tmp_path):
    """In evaluation mode, as transformers has it, where nobody keeps layers from repacking."""
    from transformers import TrainerCallback

    class Generates(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.eval()
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 6, 7]]))
            model.train()

    rows = random_rows(12, seed=1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    run = trainer(tmp_path, models("nf4")[0], rows, peft_config=config, max_steps=3)
    run.add_callback(Generates())
    run.train()
    assert all(entry["grad_norm"] > 0.01 for entry in run.state.log_history if "grad_norm" in entry)
    assert not packed(run.model)
    four = next(module for module in run.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit))
    assert four.support_avx512bf16_for_cpu  # as it was


@pytest.mark.parametrize("kind", ["nf4", "nested"])
def test_weights_that_come_repacked(kind):
    """They are unpacked for a pass of ours, and for a fingerprint; scales have been rounded to bfloat16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    from peft.utils.integrations import dequantize_module_weight

    model, _ = models(kind)
    four = model.model.layers[0].mlp.up_proj
    before = dequantize_module_weight(four)

    def pass_of_ours():
        with evaluating(model):
            pass

    for use in (pass_of_ours, lambda: model_fingerprint(model)):
        four.weight.data, _ = _convert_weight_packed_for_cpu(four.weight.data, four.weight.quant_state)
        assert packed(model)
        use()
        assert not packed(model)
        torch.testing.assert_close(dequantize_module_weight(four).float(), before, rtol=2e-2, atol=2e-2)


def test_each_module_gets_its_mode_back():
    model = tiny_model().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before


def test_the_fingerprint_of_quantized_weights():
    """It is the same before and after passes, and tells scales, and the dtype of the arithmetic."""
    for kind in KINDS:
        model, _ = models(kind)
        own = model_fingerprint(model)
        with evaluating(model), torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]))
        assert model_fingerprint(model) == own
        assert model_fingerprint(models(kind, seed=1)[0])["weights"] != own["weights"]
        first = model.model.layers[0].mlp.up_proj
        if kind == "int8":
            first.state.threshold = 1.0
        else:
            first.compute_dtype = torch.bfloat16
        changed = model_fingerprint(model)
        assert {part for part in changed if changed[part] != own.get(part)} == {"quantization"}
        if kind == "nf4":
            first.compute_dtype = torch.float32
            first.weight.quant_state.absmax.mul_(1.01)
            assert model_fingerprint(model)["weights"] != own["weights"]
