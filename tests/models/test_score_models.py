"""Packed passes of reward models give each sequence the score that the model itself gives it alone."""

import pytest
import torch
from reward_models import END, own_scores, tiny_reward_model
from tiny import random_rows, tiny_model

from fastdpo import score_models
from fastdpo.models import through_forward
from fastdpo.packing import PreferenceCollator
from fastdpo.score_models import SCORES, extend_forward, sequence_classifier, sequence_scores
from fastdpo.types import LossOutput, UserError
from fastdpo.verify import choose_packing, verify_packing

PACKINGS = ["prefix", "varlen", "padded"]
KINDS = ["llama", "qwen2", "mistral", "gpt2"]


def rows_of(count=6, seed=0):
    """Ends as they come: some sequences end with the token that is padding, too, one with several, one has no other."""
    rows = random_rows(count, seed=seed, prompt=(2, 12), answer=(1, 9))
    rows[0]["chosen_ids"] += [END]
    rows[1]["rejected_ids"] += [END, END, END]
    rows[2]["chosen_ids"] = [END]
    rows[2]["prompt_ids"][1] = END
    rows[3] = {"prompt_ids": [END], "chosen_ids": [END, END], "rejected_ids": [5]}
    rows[4]["rejected_ids"] = [*rows[4]["chosen_ids"], 7, END]  # one answer begins as the whole other
    return rows


def batch_of(rows, packing="prefix", pad_token_id=END, **options):
    return PreferenceCollator(packing=packing, pad_token_id=pad_token_id, scores=True, **options)(rows)


def loss_of(model, batch, **options):
    """By the model's extended forward, as a trainer calls it."""
    extend_forward(sequence_classifier(model))
    given = {"loss_type": "reward", "attention_backend": "auto", **options}
    return LossOutput.from_dict(through_forward(model, batch, loss_options=given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_scores_are_the_models_own(kind, packing):
    model, rows = tiny_reward_model(kind, torch.float64), rows_of()
    exact = own_scores(model, rows)
    ours = sequence_scores(model, batch_of(rows, packing))
    assert ours.shape == (12,) and ours.dtype == torch.float64 and len(set(ours.tolist())) > 8
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own_scores(model, rows), exact)  # whose attention is another now


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("margin, centre", [(False, 0.0), (True, 0.3)])
def test_loss_and_all_gradients_equal_separate_sequences(kind, packing, margin, centre):
    model, rows = tiny_reward_model(kind, torch.float64), rows_of()
    if margin:
        rows = [{**row, "margin": 0.5 * i - 1.0} for i, row in enumerate(rows)]
    ours = loss_of(model, batch_of(rows, packing), center_rewards_coefficient=centre)
    ours.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    chosen, rejected = own_scores(model, rows).chunk(2)
    margins = torch.tensor([row.get("margin", 0.0) for row in rows], dtype=torch.float64)
    exact = (-torch.nn.functional.logsigmoid(chosen - rejected - margins) + centre * (chosen + rejected) ** 2).mean()
    exact.backward()
    torch.testing.assert_close(ours.loss, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.chosen_rewards, chosen.detach(), rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        assert (grads[name] - parameter.grad).abs().max() <= 1e-9 * max(1.0, parameter.grad.abs().max()), name


def test_weights_of_rows():
    model, rows = tiny_reward_model(dtype=torch.float64), rows_of(5)
    weighted = [{**row, "pair_weight": weight} for row, weight in zip(rows, (0.0, 2.0, 1.0, 0.5, 3.0), strict=True)]
    chosen, rejected = own_scores(model, rows).chunk(2)
    losses = -torch.nn.functional.logsigmoid(chosen - rejected)
    wanted = (losses * torch.tensor([0.0, 2.0, 1.0, 0.5, 3.0])).sum() / 6.5
    torch.testing.assert_close(loss_of(model, batch_of(weighted)).loss, wanted)


def test_a_prompt_is_run_once():
    rows = random_rows(4, prompt=(30, 40))
    batch = batch_of(rows)
    assert batch.num_tokens == batch.unshared_tokens - sum(len(row["prompt_ids"]) for row in rows)


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "v_proj", "score"]])
def test_lora(target):
    """The score head trained whole (PEFT's task SEQ_CLS adds it), or with an adapter of its own."""
    peft = pytest.importorskip("peft")
    whole = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if target == "all-linear" else {}
    lora = peft.LoraConfig(r=4, target_modules=target, init_lora_weights=False, **whole)
    model, rows = peft.get_peft_model(tiny_reward_model(dtype=torch.float64), lora).double(), rows_of()
    ours = loss_of(model, batch_of(rows))
    ours.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in grads)
    model.zero_grad()
    chosen, rejected = own_scores(model, rows).chunk(2)
    exact = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    exact.backward()
    torch.testing.assert_close(ours.loss, exact, rtol=1e-9, atol=1e-9)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["bloom", "bert"])
def test_what_cannot_pack_runs_padded(kind):
    """Attention written by hand, and one that sees what follows."""
    model, rows = tiny_reward_model(kind, torch.float64), random_rows(5, prompt=(2, 12))
    with pytest.raises(UserError, match="packing='prefix'"):
        choose_packing(model, "prefix", "auto", SCORES)
    assert choose_packing(model, "auto", "auto", SCORES) == "padded"
    tolerance = 1e-6 if kind == "bloom" else 1e-9  # whose softmax is in float32
    ours = sequence_scores(model, batch_of(rows, "padded"))
    torch.testing.assert_close(ours, own_scores(model, rows), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weight", [0.0, 1e-6])
def test_a_new_head_hides_no_mistake(weight, monkeypatch):
    """Where all scores are alike, what they are made of is compared none the less."""
    model = tiny_reward_model(dtype=torch.float64)
    torch.nn.init.constant_(model.score.weight, weight)
    verify_packing(model, "prefix", compared=SCORES)
    original = score_models.run_backbone

    def one_row_off(*args):
        hidden, output = original(*args)
        return hidden.roll(1, 0), output

    monkeypatch.setattr(score_models, "run_backbone", one_row_off)
    with pytest.raises(UserError, match=r"prefix' does not give the scores of LlamaFor.* standard deviations"):
        verify_packing(model, "prefix", compared=SCORES)


def test_scores_in_half_precision_come_from_a_head_in_single():
    model, rows = tiny_reward_model(), random_rows(4)
    batch = batch_of(rows)
    with torch.autocast("cpu", torch.bfloat16):
        ours = sequence_scores(model, batch)
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, ours.bfloat16().float())


def test_what_is_no_reward_model():
    from transformers import AutoModel, LlamaConfig

    with pytest.raises(UserError, match=r"LlamaForCausalLM is a language model.*AutoModelForSequenceClassification"):
        sequence_classifier(tiny_model())
    with pytest.raises(UserError, match="num_labels=3, and a reward is one score"):
        sequence_classifier(tiny_reward_model(num_labels=3))
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_labels=1)
    with pytest.raises(UserError, match="LlamaModel has no head that gives a score"):
        sequence_classifier(AutoModel.from_config(config))
    model = tiny_reward_model()
    model.config.pad_token_id = None
    with pytest.raises(UserError, match=r"config\.pad_token_id is not set"):
        verify_packing(model, "prefix", compared=SCORES)


def test_batches_of_another_kind():
    model, rows = tiny_reward_model(), random_rows(2)
    for batch in (PreferenceCollator()(rows), batch_of(rows, pad_token_id=0)):
        with pytest.raises(UserError, match=r"PreferenceCollator\(scores=True, pad_token_id=2\)"):
            sequence_scores(model, batch)
    with pytest.raises(ValueError, match="scores=True is for a reward model's pairs, and the batch holds answers"):
        batch_of([{"prompt_ids": [5], "completion_ids": [6], "label": True}], mismatched=False)
    with pytest.raises(ValueError, match="row 1 of the batch has no margin"):
        batch_of([{**rows[0], "margin": 0.1}, rows[1]])
    with pytest.raises(ValueError, match="row 0 of the batch: margin is nan"):
        batch_of([{**rows[0], "margin": float("nan")}])
    with pytest.raises(ValueError, match="holds no token, and has no score"):
        batch_of([{"prompt_ids": [], "chosen_ids": [], "rejected_ids": [5]}])
