"""Batches cut by tokens, and the orders of the rows, in whole runs."""

import copy
from itertools import pairwise

import pytest
import torch
from tiny import naive_sequence_logps, random_rows, tiny_model
from trainer_runs import config, losses_of, trainer

from fastdpo.packing import MicroBatches
from fastdpo.types import DataError, UserError


def parameters_equal(a, b, **tolerance):
    for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("packing", ["prefix", "varlen", "padded"])
@pytest.mark.parametrize("precompute", [False, True])
def test_cut_batches_train_as_whole_ones(tmp_path, packing, precompute):
    rows = random_rows(12, seed=3, prompt=(3, 20), answer=(1, 12))
    runs = {}
    for budget in (None, 60, 1):
        model = tiny_model()
        run = trainer(
            tmp_path, model, rows, packing=packing, max_tokens_per_microbatch=budget, gradient_accumulation_steps=2,
            max_steps=3, train_sampling_strategy="sequential", precompute_ref_log_probs=precompute,
            eval_dataset=rows[:5], per_device_eval_batch_size=3,
        )  # fmt: skip
        run.train()
        if budget is not None:
            cut = run.data_collator(rows[:4])
            assert isinstance(cut, MicroBatches) and len(cut) == (4 if budget == 1 else len(cut)) > 1
        runs[budget] = (losses_of(run), model, run.evaluate(), run.state.log_history)
    for budget in (60, 1):
        assert runs[budget][0] == pytest.approx(runs[None][0], rel=1e-5)
        parameters_equal(runs[budget][1], runs[None][1], rtol=1e-4, atol=1e-5)
        for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
            assert runs[budget][2][name] == pytest.approx(runs[None][2][name], rel=1e-4)
        for ours, theirs in zip(runs[budget][3], runs[None][3], strict=False):
            for name in ("rewards/margins", "logps/rejected", "num_tokens"):
                if name in theirs:
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5)


def seen_rows(run):
    """Every batch's rows, as the collator gets them."""
    seen, collate = [], run.data_collator
    run.data_collator = lambda rows: seen.append(rows) or collate(rows)
    return seen


def key(row):
    return (tuple(row["prompt_ids"]), tuple(row["chosen_ids"]), tuple(row["rejected_ids"]))


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "group_by_prompt", "batch_rebalance"])
def test_orders_take_every_row_once_an_epoch_and_differ_between_epochs(tmp_path, strategy):
    rows = random_rows(22, seed=6, prompt=(2, 30))
    for i in range(0, 22, 2):
        rows[i + 1]["prompt_ids"] = rows[i]["prompt_ids"]
    budget = 80 if strategy == "random" else None
    run = trainer(
        tmp_path, rows=rows, train_sampling_strategy=strategy, max_tokens_per_microbatch=budget, max_steps=-1,
        num_train_epochs=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    seen = seen_rows(run)
    run.train()
    batches = seen[-12:]
    epochs = [[key(row) for batch in part for row in batch] for part in (batches[:6], batches[6:])]
    for epoch in epochs:
        assert sorted(epoch) == sorted(map(key, rows))
    assert epochs[0] != epochs[1]
    if strategy == "group_by_prompt":
        together = sum(a[0] == b[0] for epoch in epochs for a, b in pairwise(epoch))
        assert together >= 2 * 11 - 2
        assert run.state.log_history[0]["perf/saved_tokens_fraction"] > 0.3


@pytest.mark.parametrize("strategy", ["group_by_length", "group_by_prompt", "batch_rebalance"])
def test_a_resumed_run_takes_the_rows_that_are_left(tmp_path, strategy):
    options = {"train_sampling_strategy": strategy, "max_steps": 8, "per_device_train_batch_size": 4}
    whole = tiny_model()
    trainer(tmp_path, whole, save_strategy="steps", save_steps=6, **options).train()  # in the second epoch of 5 steps
    resumed = tiny_model()
    trainer(tmp_path, resumed, **options).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    parameters_equal(resumed, whole, rtol=0, atol=0)


def mixture(coefficient, **options):
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
            router_aux_loss_coef=coefficient, bos_token_id=1, eos_token_id=2, **options,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("packing", ["prefix", "padded"])
def test_the_balancing_loss_counts_every_token_once(tmp_path, packing):
    rows = random_rows(4, seed=2)
    model = mixture(0.05)
    start = copy.deepcopy(model)
    run = trainer(tmp_path, model, rows, packing=packing, max_steps=1)
    run.train()
    (logs,) = [entry for entry in run.state.log_history if "loss" in entry]
    # Switch Transformer, eq. 4 to 6, from the router logits of every token that is run, each sequence alone.
    counts, probabilities, tokens = torch.zeros(4), torch.zeros(4), 0
    with torch.no_grad():
        for row in rows:
            prompt = len(row["prompt_ids"])
            for side in ("chosen_ids", "rejected_ids"):
                ids = torch.tensor([row["prompt_ids"] + row[side]])
                first = prompt if packing == "prefix" and side == "rejected_ids" else 0
                for logits in start(ids, output_router_logits=True).router_logits:
                    weights = logits[first:].softmax(-1)
                    counts += torch.bincount(weights.topk(2).indices.flatten(), minlength=4)
                    probabilities += weights.sum(0)
                    tokens += len(weights)
        exact = 4 * (counts / tokens * probabilities / tokens).sum()
    assert logs["aux_loss"] == pytest.approx(exact.item(), rel=1e-4)
    assert run.aux_loss_enabled
    assert logs["loss"] == pytest.approx(0.693147 + 0.05 * exact.item(), rel=1e-4)


def test_the_balancing_loss_can_be_left_out(tmp_path):
    run = trainer(tmp_path, mixture(0.05), random_rows(4), router_aux_loss_coef=0.0, max_steps=1)
    assert not run.aux_loss_enabled
    run.train()
    assert losses_of(run) == pytest.approx([0.693147], abs=1e-4)
    assert all("aux_loss" not in entry for entry in run.state.log_history)
    with pytest.raises(UserError, match="is for a mixture of experts, and LlamaForCausalLM is none"):
        trainer(tmp_path, router_aux_loss_coef=0.1)


def test_rows_longer_than_the_model_are_refused_before_anything_runs(tmp_path, monkeypatch):
    import fastdpo.reference.fill as fill

    monkeypatch.setattr(fill, "score", lambda *a, **k: pytest.fail("ran"))
    rows = random_rows(6)
    rows[2]["chosen_ids"] = [5] * 300
    rows[4]["rejected_ids"] = [5] * 260
    message = (
        "2 of 6 rows of the train data set do not fit: the model has 256 positions, and the longest row, number 2 "
        r"\(counted from 0\), has 3\d\d tokens; set max_length=256"
    )
    with pytest.raises(DataError, match=message):
        trainer(tmp_path, rows=rows, precompute_ref_log_probs=True)
    with pytest.raises(DataError, match="of the eval data set do not fit"):
        trainer(tmp_path, eval_dataset=rows, max_length=None)
    monkeypatch.undo()
    trainer(tmp_path, rows=rows, max_length=256, max_steps=1).train()


def test_rows_that_are_cut_or_run_alone_are_counted(tmp_path, caplog):
    rows = random_rows(6, prompt=(2, 5), answer=(1, 4))
    rows[2]["chosen_ids"], rows[4]["rejected_ids"] = [5] * 40, [5] * 24
    trainer(tmp_path, rows=rows, max_length=30, max_tokens_per_microbatch=25)
    said = [record.getMessage() for record in caplog.records]
    assert any("1 of 6 rows of the train data set are longer than max_length=30 and are cut" in text for text in said)
    assert any("2 of 6 rows of the train data set run alone: they take more tokens (up to 3" in text for text in said)


def test_streamed_data_are_cut_too_but_have_no_order(tmp_path):
    from datasets import IterableDataset

    rows = random_rows(12, seed=3, prompt=(3, 20), answer=(1, 12))
    streamed = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="train_sampling_strategy='group_by_prompt' needs a data set whose rows"):
        trainer(tmp_path, rows=streamed, train_sampling_strategy="group_by_prompt")
    runs = [
        trainer(tmp_path, rows=data, max_tokens_per_microbatch=60, train_sampling_strategy=strategy, max_steps=3)
        for data, strategy in ((streamed, "random"), (rows, "sequential"))
    ]
    for run in runs:
        run.train()
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), rel=1e-5)


def test_several_gpus_in_one_process_are_not_used(tmp_path, caplog):
    made = config(tmp_path)
    made._n_gpu = 3
    made._use_one_gpu()
    assert made.n_gpu == 1 and made.train_batch_size == made.per_device_train_batch_size
    assert "accelerate launch" in caplog.text


@pytest.mark.parametrize("kind, limit", [("dynamic", 256), ("longrope", 32)])
def test_rotary_positions_that_depend_on_the_batch(tmp_path, kind, limit):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **(factors if kind == "longrope" else {})}
    rows = random_rows(4)
    rows[1]["chosen_ids"] = [5] * (limit + 1)
    with pytest.raises(DataError, match=f"1 of 4 rows .* (rotary positions .{kind}.|{limit} positions)"):
        trainer(tmp_path, tiny_model(rope_parameters=rope), rows)
    model = tiny_model(rope_parameters=rope, dtype=torch.float32)
    run = trainer(tmp_path, model, rows, max_length=limit, max_steps=1, max_grad_norm=0.0)
    cut = [{**row, "chosen_ids": row["chosen_ids"][: limit - len(row["prompt_ids"])]} for row in rows]
    with torch.no_grad():
        exact = naive_sequence_logps(model, cut).view(2, -1).mean(1)
    run.train()
    assert run.state.log_history[0]["logps/chosen"] == pytest.approx(exact[0].item(), rel=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch is 0"),
        ({"max_tokens_per_microbatch": 100, "loss_type": "aot"}, "needs a whole batch at once"),
        ({"train_sampling_strategy": "by_mood"}, "train_sampling_strategy is 'by_mood'; it must be one of: random"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef is -1.0"),
        ({"attention_backend": "flash"}, "one of: auto, flash_attn, torch_varlen, flex, sdpa"),
    ],
)
def test_options_are_refused_when_the_config_is_built(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_backend_that_is_not_there_is_refused_at_construction(tmp_path):
    with pytest.raises(UserError, match=r"'flash_attn' (is not there; pip install .*fastdpo|runs on GPUs only)"):
        trainer(tmp_path, packing="prefix", attention_backend="flash_attn")


@pytest.mark.slow
def test_a_compiled_run_has_the_same_curve_and_compiles_no_more_for_new_lengths(tmp_path):
    from torch._dynamo.utils import counters

    options = {"max_steps": 5, "train_sampling_strategy": "sequential"}
    plain = trainer(tmp_path, **options)
    plain.train()
    torch._dynamo.reset()
    counters.clear()
    run = trainer(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", **options)
    graphs, step = [], run.training_step
    run.training_step = lambda *args: (step(*args), graphs.append(counters["stats"]["unique_graphs"]))[0]
    run.train()
    assert losses_of(run) == pytest.approx(losses_of(plain), rel=1e-5)
    assert 0 < graphs[1] == graphs[-1]
