"""Policy and reference as two adapters of one model, by their names."""

import copy

import pytest
import torch
from tiny import random_rows, tiny_model
from trainer_runs import losses_of, trainer

peft = pytest.importorskip("peft")


def two_adapters(active="policy"):
    """Both have learnt something."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(), config, adapter_name="policy")
    model.add_adapter("anchor", config)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            value.data.normal_(0.0, 0.2, generator=generator)
    model.set_adapter(active)
    return model


@pytest.mark.parametrize("ahead", [False, True], ids=["online", "ahead"])
def test_the_reference_runs_under_the_named_adapter(tmp_path, ahead):
    options = {"max_steps": 3, "beta": 1.0}
    run = trainer(tmp_path / "a", two_adapters(), ref_adapter_name="anchor", precompute_ref_log_probs=ahead,
                  ref_logps=str(tmp_path / "cache") if ahead else None, **options)  # fmt: skip
    anchor = copy.deepcopy({name: value for name, value in run.model.named_parameters() if ".anchor." in name})
    run.train()
    exact = trainer(tmp_path / "b", two_adapters(), ref_model=two_adapters("anchor"), **options)
    exact.train()
    assert losses_of(run) == pytest.approx(losses_of(exact), rel=1e-5) and losses_of(run)[0] != pytest.approx(0.6931)
    assert all(torch.equal(value, run.model.get_parameter(name)) for name, value in anchor.items())
    assert run.model.active_adapters == ["policy"]


def test_the_adapter_to_train(tmp_path):
    run = trainer(tmp_path, two_adapters("anchor"), model_adapter_name="policy", ref_adapter_name="anchor", max_steps=1)
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    run.train()
    moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all(".policy." in name for name in moved)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ref_adapter_name": "other"}, "ref_adapter_name is 'other', which is no adapter .*policy, anchor"),
        ({"model_adapter_name": "other"}, "model_adapter_name is 'other', which is no adapter"),
        ({"ref_adapter_name": "policy"}, "it is the adapter to be trained"),
        ({"ref_model_init_kwargs": {"dtype": "float32"}}, "ref_model_init_kwargs is for a ref_model given by name"),
    ],
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, two_adapters(), **options)


def test_two_references(tmp_path):
    with pytest.raises(ValueError, match="ref_model is given"):
        trainer(tmp_path, two_adapters(), ref_model=tiny_model(), ref_adapter_name="anchor")
    with pytest.raises(ValueError, match="the model has none"):
        trainer(tmp_path, ref_adapter_name="anchor")


def test_keywords_of_the_reference(tmp_path):
    tiny_model().save_pretrained(tmp_path / "saved")
    run = trainer(tmp_path, rows=random_rows(4), ref_model=str(tmp_path / "saved"),
                  ref_model_init_kwargs={"torch_dtype": "bfloat16"})  # fmt: skip
    assert run.ref_model.dtype == torch.bfloat16 and run.model.dtype == torch.float32
