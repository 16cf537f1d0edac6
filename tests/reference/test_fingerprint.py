"""What tells one reference model from another, and what does not."""

import copy
import functools

import numpy as np
import pytest
import torch
from tiny import tiny_model
from zoo import ARCHITECTURES, make

from fastdpo.models import evaluating
from fastdpo.reference import model_fingerprint
from fastdpo.reference.fingerprint import sequence_key
from fastdpo.types import UserError

SOME = [
    a for a in ARCHITECTURES if a.name in {"gemma2", "gpt2", "gpt-oss", "mixtral", "mamba", "qwen3", "bloom", "phi3"}
]


def make_or_skip(architecture):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if architecture.model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {architecture.model_type}")
    return make(architecture)


def differing(a, b):
    return {part for part in {**a, **b} if a.get(part) != b.get(part)}


@pytest.mark.parametrize("architecture", SOME, ids=lambda a: a.name)
def test_a_saved_model_is_the_same_model(tmp_path, architecture):
    from transformers import AutoModelForCausalLM

    model = make(architecture)
    own = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert model_fingerprint(loaded) == own
    loaded.config.use_cache = not loaded.config.use_cache
    loaded.config.pad_token_id = 3
    loaded.config._name_or_path = "elsewhere"
    assert model_fingerprint(loaded.train()) == own


def test_every_weight_counts():
    model = tiny_model()
    own = model_fingerprint(model)
    for parameter in model.parameters():
        with torch.no_grad():
            flat = parameter.view(-1)
            before = flat[-1].clone()
            flat[-1] = torch.nextafter(before, before + 1)
        assert differing(model_fingerprint(model), own) == {"weights"}
        with torch.no_grad():
            flat[-1] = before
    assert model_fingerprint(model) == own
    tensors = model.model.layers[0].self_attn
    tensors.q_proj.weight, tensors.o_proj.weight = tensors.o_proj.weight, tensors.q_proj.weight  # of one shape
    assert differing(model_fingerprint(model), own) == {"weights"}


def test_a_large_tensor_is_hashed_in_parts(monkeypatch):
    from fastdpo.reference import fingerprint

    model = tiny_model()
    own = model_fingerprint(model)
    monkeypatch.setattr(fingerprint, "_CHUNK", 100)
    parts = model_fingerprint(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[50, 7] += 1
    assert own != parts and differing(model_fingerprint(model), parts) == {"weights"}


@pytest.mark.parametrize(
    ("field", "value", "counts"),
    [("rms_norm_eps", 1e-3, True), ("rope_parameters", {"rope_type": "default", "rope_theta": 99.0}, True),
     ("output_logit_soft_cap", 3.0, True), ("router_jitter_noise", 0.3, True), ("output_attentions", False, False),
     ("attention_dropout", 0.5, False), ("pad_token_id", 7, False), ("initializer_range", 0.5, False)],
)  # fmt: skip
def test_fields_of_the_config(field, value, counts):
    own, other = model_fingerprint(tiny_model()), model_fingerprint(tiny_model(**{field: value}))
    assert differing(own, other) == ({"config"} if counts else set())


def test_values_count_and_not_the_dtype_that_they_are_stored_in():
    small = tiny_model().bfloat16()
    large = copy.deepcopy(small).float()
    assert differing(model_fingerprint(small), model_fingerprint(large)) == {"dtype"}
    assert model_fingerprint(small)["dtype"] == "bfloat16" and model_fingerprint(large)["dtype"] == "float32"
    assert model_fingerprint(large, torch.bfloat16)["dtype"] == "float32 in bfloat16 autocast"
    assert model_fingerprint(small, torch.bfloat16) == model_fingerprint(small)
    # Rotary frequencies that were rounded with the weights are no longer those of the config.
    assert differing(model_fingerprint(tiny_model()), model_fingerprint(small)) == {"dtype", "weights", "buffers"}
    head = tiny_model(tie_word_embeddings=False).bfloat16()
    head.lm_head.float()
    assert model_fingerprint(head)["dtype"] == "bfloat16 with a head of float32"
    half = tiny_model().half()
    assert differing(model_fingerprint(half), model_fingerprint(copy.deepcopy(half).float())) == {"dtype"}
    assert model_fingerprint(tiny_model(dtype=torch.float64))["dtype"] == "float64"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_nothing_is_unusual_of_a_model_as_its_config_makes_it(architecture):
    """So its fingerprint is that of versions that knew no unusual parts; and it stays so."""
    model = make_or_skip(architecture)
    own = model_fingerprint(model)
    assert own.keys() == {"weights", "adapter", "config", "dtype"}
    model.config.get_text_config().pad_token_id = 5
    with evaluating(model), torch.no_grad():
        model(input_ids=torch.arange(3, 11)[None], use_cache=False)
    assert model_fingerprint(model.train()) == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loaded_in_a_dtype_and_cast_to_it(tmp_path, kind, dtype):
    from transformers import AutoModelForCausalLM

    tiny_model(kind).bfloat16().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    cast = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=other).to(dtype)
    assert model_fingerprint(loaded).keys() == {"weights", "adapter", "config", "dtype"}
    rounded = kind == "llama" and dtype == torch.bfloat16  # GPT-2 has no rotary frequencies
    assert differing(model_fingerprint(loaded), model_fingerprint(cast)) == ({"buffers"} if rounded else set())


CHANGES = {
    "frequencies": ("buffers", lambda model: model.model.rotary_emb.inv_freq.mul_(1.5)),
    "scale of attention": ("attributes", lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.5)),
    "scale of rotary": ("attributes", lambda model: setattr(model.model.rotary_emb, "attention_scaling", 1.5)),
    "epsilon": ("attributes", lambda model: setattr(model.model.norm, "variance_epsilon", 0.1)),
    "activation": ("attributes", lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.ReLU())),
    "cap of the head": ("config", lambda model: setattr(model.config, "final_logit_softcapping", 3.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_on_a_model_in_memory(name):
    part, change = CHANGES[name]
    model, own = tiny_model(), model_fingerprint(tiny_model())
    change(model)
    assert differing(model_fingerprint(model), own) == {part}


def test_a_model_that_cannot_be_made_anew():
    """Its unsaved tensors are hashed by value."""
    from transformers import LlamaForCausalLM

    class Odd(LlamaForCausalLM):
        def __init__(self, config, more):
            super().__init__(config)

    def made(base=10000.0):
        return Odd(tiny_model(rope_parameters={"rope_type": "default", "rope_theta": base}).config, None)

    torch.manual_seed(0)
    model = made()
    own = model_fingerprint(model)
    assert "buffers" in own
    model.model.rotary_emb.inv_freq.mul_(1.5)
    assert differing(model_fingerprint(model), own) == {"buffers"}


def test_code_that_hangs_on_a_model():
    """What only looks is let be; what changes the log-probs is refused, since nothing tells one from another."""
    model, seen = tiny_model(), []
    own = model_fingerprint(model)
    looks = model.model.layers[0].register_forward_hook(lambda *args: seen.append(args))
    assert model_fingerprint(model) == own
    steers = model.model.layers[1].register_forward_hook(lambda module, args, output: output + 0.01)
    with pytest.raises(UserError, match=r"the hook .*<lambda> on model.layers.1 changes"):
        model_fingerprint(model)
    assert list(model.model.layers[0]._forward_hooks) == [looks.id]
    assert list(model.model.layers[1]._forward_hooks) == [steers.id]
    steers.remove()
    assert model_fingerprint(model) == own
    pre = model.model.norm.register_forward_pre_hook(lambda module, args: (args[0] * 1.1,))
    with pytest.raises(UserError, match="changes what the model computes"):
        model_fingerprint(model)
    pre.remove()
    mlp = model.model.layers[0].mlp
    before = mlp.forward

    @functools.wraps(before)
    def louder(x):
        return 2 * before(x)

    mlp.forward = louder
    with pytest.raises(UserError, match=r"the forward .* that was set on model.layers.0.mlp"):
        model_fingerprint(model)
    assert mlp.forward is louder


def test_weights_that_are_elsewhere():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(UserError, match=r"mlp.up_proj.weight are not in memory"):
        model_fingerprint(model)


class TestAdapters:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    def wrapped(self, peft, name="default", seed=0, **options):
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
        model = tiny_model()
        torch.manual_seed(seed)
        return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options), adapter_name=name)

    def test_switched_off_they_leave_the_model_they_were_put_on(self, peft):
        plain = model_fingerprint(tiny_model())
        for options in ({}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"seed": 1, "r": 2}):
            model = self.wrapped(peft, **options)
            with model.disable_adapter():
                assert model_fingerprint(model) == plain, options
            assert differing(model_fingerprint(model), plain) == {"adapter"}, options

    def test_what_tells_adapters_apart(self, peft, tmp_path):
        own = model_fingerprint(self.wrapped(peft))
        assert model_fingerprint(self.wrapped(peft, name="other")) == own
        assert model_fingerprint(self.wrapped(peft, lora_dropout=0.5)) == own
        for change in ({"lora_alpha": 9}, {"seed": 1}, {"use_rslora": True}, {"target_modules": ["q_proj"]}):
            assert differing(model_fingerprint(self.wrapped(peft, **change)), own) == {"adapter"}, change
        model = self.wrapped(peft, modules_to_save=["lm_head"])
        saved = model_fingerprint(model)
        model.save_pretrained(tmp_path)
        assert model_fingerprint(peft.PeftModel.from_pretrained(tiny_model(), tmp_path, adapter_name="x")) == saved
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight[3, 3] += 1
        assert differing(model_fingerprint(model), saved) == {"adapter"}

    def test_scaling_that_was_set_at_run_time(self, peft):
        for options in ({}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"q_proj": 2}}):
            model = self.wrapped(peft, **options)
            own = model_fingerprint(model)
            layers = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
            for layer in layers[:1]:
                layer.scale_layer(2.0)
            first = model_fingerprint(model)
            assert differing(first, own) == {"adapter"}
            layers[0].unscale_layer()
            assert model_fingerprint(model) == own
            layers[1].set_scale("default", 2.0)
            assert differing(model_fingerprint(model), first) == {"adapter"}
            with model.disable_adapter():
                assert model_fingerprint(model) == model_fingerprint(tiny_model())

    def test_projections_that_are_not_saved(self, peft):
        config = peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False, init_weights=False)
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model(), config)
        own = model_fingerprint(model)
        with torch.no_grad():
            next(value for name, value in model.named_buffers() if "vera_A" in name).mul_(2)
        assert differing(model_fingerprint(model), own) == {"adapter"}

    def test_in_a_wrapper_and_loaded_by_transformers(self, peft):
        class Wrapper(torch.nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

        for alpha in (8, 64):
            model = self.wrapped(peft, lora_alpha=alpha)
            assert model_fingerprint(Wrapper(model)) == model_fingerprint(model)
        model = tiny_model()
        torch.manual_seed(0)
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
                                          init_lora_weights=False))  # fmt: skip
        assert model_fingerprint(model)["adapter"] not in ("none", None)

    def test_trained_tokens_are_an_adapter(self, peft):
        plain = model_fingerprint(tiny_model())
        model = self.wrapped(peft, trainable_token_indices=[3, 4])
        with model.disable_adapter():
            assert model_fingerprint(model) == plain
        assert differing(model_fingerprint(model), plain) == {"adapter"}

    def test_merged_and_switched_off(self, peft):
        model = self.wrapped(peft)
        model.merge_adapter()
        with model.disable_adapter(), pytest.raises(UserError, match="unmerge_adapter"):
            model_fingerprint(model)

    def test_the_one_of_several_that_is_in_use(self, peft):
        model = self.wrapped(peft)
        first = model_fingerprint(model)
        torch.manual_seed(5)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        assert model_fingerprint(model) == first
        model.set_adapter("second")
        second = model_fingerprint(model)
        assert differing(first, second) == {"adapter"}
        assert second["adapter"] != "none"

    def test_merged_weights_are_other_weights(self, peft):
        model = self.wrapped(peft)
        merged = model_fingerprint(copy.deepcopy(model).merge_and_unload())
        assert merged["adapter"] == "none" and "weights" in differing(merged, model_fingerprint(model))

    def test_tokens_before_the_prompt_are_refused(self, peft):
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        with pytest.raises(UserError, match="tokens of its own before the prompt"):
            model_fingerprint(peft.get_peft_model(tiny_model(), config))


def test_keys_tell_prompt_from_completion():
    assert sequence_key([1, 2], [3]) != sequence_key([1], [2, 3])
    assert sequence_key([1, 2], [3]) == sequence_key((1, 2), np.array([3])) == sequence_key(np.array([1, 2], "i4"), [3])
    assert len(sequence_key([], [])) == 16
