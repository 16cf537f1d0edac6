"""Packed passes give each sequence exactly what it has alone."""

from functools import partial

import pytest
import torch
from drawing import draws
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import naive_sequence_logps, random_rows, tiny_model

import fastdpo
from fastdpo.attention import packed_forward
from fastdpo.models import causal_lm
from fastdpo.packing import PreferenceCollator
from fastdpo.scoring import completion_logps
from fastdpo.types import UserError
from fastdpo.verify import ensure_verified, verify_packing

PACKINGS = ["prefix", "varlen", "padded"]


def loss_and_grads(model, rows, packing, refs):
    model.zero_grad()
    batch = PreferenceCollator(packing=packing)(rows)
    out = fastdpo.batch_loss(model, batch, refs)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_loss_and_all_gradients_equal_separate_sequences(kind, packing, dtype, tolerance):
    model = tiny_model(kind, dtype)
    rows = random_rows(5, seed=1)
    refs = -30 * torch.rand(10, dtype=dtype)
    loss, grads = loss_and_grads(model, rows, packing, refs)
    model.zero_grad()
    chosen, rejected = naive_sequence_logps(model, rows).view(2, -1)
    margin = 0.1 * ((chosen - refs[:5]) - (rejected - refs[5:]))
    exact = -torch.nn.functional.logsigmoid(margin).mean()
    exact.backward()
    assert abs(loss - exact) <= tolerance * max(1, abs(exact))
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max()
        assert (grads[name] - parameter.grad).abs().max() <= tolerance * max(1.0, scale), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prefix_equals_padded_in_float32(kind):
    model, rows = tiny_model(kind), random_rows(8, seed=2, prompt=(3, 20), answer=(1, 15))
    refs = -30 * torch.rand(16)
    (loss_a, grads_a), (loss_b, grads_b) = (loss_and_grads(model, rows, p, refs) for p in ("prefix", "padded"))
    assert abs(loss_a - loss_b) <= 2e-6 * max(1, abs(loss_b))
    for name, grad in grads_b.items():
        assert (grads_a[name] - grad).norm() <= 1e-5 * max(1e-3, grad.norm()), name


def test_sliding_window():
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double().eval()
    rows = random_rows(4, seed=3, prompt=(2, 14), answer=(2, 12))
    exact = naive_sequence_logps(model, rows)
    for packing in PACKINGS:
        ours = fastdpo.sequence_logps(model, PreferenceCollator(packing=packing)(rows))
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_gradient_checkpointing_changes_nothing():
    model, rows, refs = tiny_model(), random_rows(4), torch.zeros(8)
    model.train()
    _, plain = loss_and_grads(model, rows, "prefix", refs)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    _, checkpointed = loss_and_grads(model, rows, "prefix", refs)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad)


def test_a_pair_does_not_see_the_others():
    model = tiny_model(dtype=torch.float64)
    rows, others = random_rows(3, seed=4), random_rows(3, seed=5)
    collator = PreferenceCollator(packing="prefix")
    first = fastdpo.sequence_logps(model, collator([rows[0], *others]))
    second = fastdpo.sequence_logps(model, collator([rows[0], *rows[1:]]))
    torch.testing.assert_close(first[[0, 4]], second[[0, 3]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packing", PACKINGS)
def test_edges_of_length(packing):
    """One-token prompts and answers, equal answers, an empty prompt."""
    model = tiny_model(dtype=torch.float64)
    rows = [
        {"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [8]},
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [7, 8, 9]},
        {"prompt_ids": [], "chosen_ids": [7, 8, 9], "rejected_ids": [9, 4]},
    ]
    ours = fastdpo.sequence_logps(model, PreferenceCollator(packing=packing)(rows))
    torch.testing.assert_close(ours, naive_sequence_logps(model, rows), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packing", PACKINGS)
def test_completion_logps_of_many_completions(packing):
    model = tiny_model(dtype=torch.float64)
    one, two = [3, 4, 5], [12]
    sequences = [(one, [6, 7]), (one, [8]), (one, [9, 10, 11]), (two, [13, 14])]
    scored = completion_logps(model, sequences, packing=packing)
    assert [len(values) for values in scored] == [2, 1, 3, 2]
    rows = [{"prompt_ids": prompt, "chosen_ids": ids, "rejected_ids": ids} for prompt, ids in sequences]
    exact = naive_sequence_logps(model, rows)[:4]
    torch.testing.assert_close(torch.stack([values.sum() for values in scored]), exact, rtol=1e-10, atol=1e-10)


def test_generation_still_works_after_a_packed_pass():
    model = tiny_model()
    prompt = torch.tensor([[5, 6, 7, 8], [2, 2, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    before = model.generate(prompt, **options)
    verify_packing(model, "prefix")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(prompt, **options), before)


@pytest.mark.parametrize("packing", PACKINGS)
def test_verify_packing_accepts_what_is_right(packing):
    verify_packing(tiny_model(), packing)
    verify_packing(tiny_model("gpt2"), packing)


def test_verify_packing_refuses_what_it_cannot_pack():
    from transformers import AutoModelForCausalLM, BloomConfig

    model = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    )
    for packing in ("prefix", "varlen"):
        with pytest.raises(UserError, match="only 0 of its 2 layers"):
            verify_packing(model, packing)
    verify_packing(model, "padded")


def test_verify_packing_notices_a_head_it_does_not_know():
    model = tiny_model()
    original = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 3.0 * original(hidden)
    with pytest.raises(UserError, match="does not give the log-probs"):
        verify_packing(model, "padded")


@pytest.mark.parametrize("packing", ["prefix", "varlen"])
def test_no_number_comes_from_a_model_that_cannot_run_so(packing):
    """Not in a loop of one's own either: the first pass of a model verifies it."""
    from transformers import AutoModelForCausalLM, BloomConfig

    model = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    )
    batch = PreferenceCollator(packing=packing)(random_rows(2))
    with pytest.raises(UserError, match="cannot serve BloomForCausalLM"):
        fastdpo.sequence_logps(model, batch)
    with pytest.raises(UserError, match="cannot serve BloomForCausalLM"):
        fastdpo.batch_loss(model, batch, torch.zeros(4))
    with pytest.raises(UserError, match="cannot serve BloomForCausalLM"):
        completion_logps(model, [([5, 6], [7])], packing=packing)


def test_a_model_is_verified_once(monkeypatch):
    from fastdpo import verify

    calls, original = [], verify.verify_packing
    monkeypatch.setattr(verify, "verify_packing", lambda *a, **k: calls.append(a[1]) or original(*a, **k))
    model = tiny_model().train()
    for packing in ("prefix", "prefix", "padded", "prefix"):
        fastdpo.sequence_logps(model, PreferenceCollator(packing=packing)(random_rows(2)))
    assert calls == ["prefix", "padded"] and model.training
    fastdpo.sequence_logps(model.double(), PreferenceCollator()(random_rows(2)))
    assert calls == ["prefix", "padded", "prefix"]


def test_a_model_without_head():
    from transformers import AutoModel, LlamaConfig

    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(UserError, match="no language-model head"):
        causal_lm(AutoModel.from_config(config))


few_tokens = st.lists(st.integers(3, 5), max_size=7)
drawn_rows = st.lists(
    st.fixed_dictionaries({"prompt_ids": few_tokens, "chosen_ids": few_tokens, "rejected_ids": few_tokens}),
    min_size=1, max_size=4,
)  # fmt: skip


@draws(40)
@given(rows=drawn_rows, packing=st.sampled_from(PACKINGS), kind=st.sampled_from(["llama", "gpt2"]))
def test_drawn_trees_equal_separate_sequences(rows, packing, kind):
    """Few different tokens: beginnings coincide in prompts and answers, at any depth; some are empty, or equal."""
    rows = [row for row in rows if all(row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids"))]
    assume(rows)
    model = tiny_model(kind, torch.float64)
    batch = PreferenceCollator(packing=packing)(rows)
    weights = torch.arange(1.0, 2 * len(rows) + 1, dtype=torch.float64)
    ours, exact = fastdpo.sequence_logps(model, batch), naive_sequence_logps(model, rows)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    assume(exact.requires_grad and len(batch.target_ids))
    grads = (torch.autograd.grad((sums * weights).sum(), list(model.parameters())) for sums in (ours, exact))
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, b.abs().max())


def test_a_mask_passed_by_hand_is_refused():
    model, batch = tiny_model(), PreferenceCollator()(random_rows(2))
    batch["attention_mask"] = torch.ones_like(batch.input_ids)
    with pytest.raises(ValueError, match="a packed batch takes no attention_mask"):
        fastdpo.sequence_logps(model, batch)
    mask = torch.zeros(1, 1, batch.num_tokens, batch.num_tokens)
    with packed_forward(model), pytest.raises(ValueError, match="packed attention takes no attention_mask"):
        model(batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, packed_layout=batch.layout)


def test_a_sequence_longer_than_the_model_is_refused():
    rows = [{"prompt_ids": [5] * 250, "chosen_ids": [6] * 10, "rejected_ids": [7]}]
    for packing in PACKINGS:
        with pytest.raises(UserError, match="a sequence of 260 tokens, and LlamaForCausalLM has 256 positions"):
            fastdpo.sequence_logps(tiny_model(), PreferenceCollator(packing=packing)(rows))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "phi3", "gpt-oss"])
def test_architectures_on_a_gpu(name):
    """By the backends that auto takes: float32 as padded, bfloat16 no further from float64 than padded, by twice."""
    import zoo

    (architecture,) = (each for each in zoo.ARCHITECTURES if each.name == name)
    rows = zoo.rows()

    def gradients(dtype, packing):
        model = zoo.make(architecture).to("cuda", dtype)
        verify_packing(model, packing)
        refs = torch.full((2 * len(rows),), -20.0, device="cuda", dtype=torch.promote_types(dtype, torch.float32))
        batch = PreferenceCollator(packing=packing)(rows).to("cuda")
        fastdpo.batch_loss(model, batch, refs, reduction="sum").loss.backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])

    single, exact = gradients(torch.float32, "padded"), gradients(torch.float64, "padded")
    assert (gradients(torch.float32, "prefix") - single).norm() <= 1e-3 * single.norm()
    if name != "gpt-oss":  # in half precision a router may choose another expert
        padded, ours = (gradients(torch.bfloat16, packing) for packing in ("padded", "prefix"))
        assert (ours - exact).norm() <= 2 * (padded - exact).norm() + 1e-3 * exact.norm()


class TestAdaptersAreVerified:
    @pytest.fixture
    def config(self):
        peft = pytest.importorskip("peft")
        return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])

    def reads_the_row(self, model):
        """Its adapter, which has learnt nothing yet, takes from each token the mean of the row."""
        layer = model.base_model.model.model.layers[0].self_attn.v_proj.lora_A["default"]
        layer.register_forward_hook(lambda module, args, output: output - output.mean(1, keepdim=True))
        return model

    def test_one_that_reads_the_row_is_seen_before_it_has_learnt(self, config):
        from peft import get_peft_model

        for packing in ("prefix", "varlen"):
            with pytest.raises(UserError, match=r"cannot serve LlamaForCausalLM|does not give the log-probs"):
                verify_packing(self.reads_the_row(get_peft_model(tiny_model(), config)), packing)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_its_values_are_left_as_they_were(self, config, dtype):
        from peft import get_peft_model

        model = get_peft_model(tiny_model(), config).to(dtype)
        with torch.no_grad():
            first = next(value for name, value in model.named_parameters() if "lora_B" in name)
            first.fill_(-0.0)
        before = {name: (value.clone(), value._version) for name, value in model.named_parameters()}
        loss = model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum()
        verify_packing(model, "prefix")
        for name, value in model.named_parameters():
            values, version = before[name]
            assert value.equal(values) and value.signbit().equal(values.signbit()), name
            assert value._version == version
        loss.backward()  # a graph from before is still valid

    def test_an_adapter_upon_a_verified_base(self, config):
        from peft import get_peft_model

        base = tiny_model()
        ensure_verified(base, "prefix", "auto")
        with pytest.raises(UserError):
            ensure_verified(self.reads_the_row(get_peft_model(base, config)), "prefix", "auto")
