"""Every loss in whole runs: against plain loops over sequences run alone, weights, references, and what is refused."""

import copy
import json
import random

import pytest
import torch
from loss_oracle import pair_losses, ranked_losses
from tiny import naive_sequence_logps, random_rows, tiny_model
from trainer_runs import config, losses_of, trainer

import fastdpo
from fastdpo.losses import REGISTRY
from fastdpo.reference import add_reference_columns, precompute
from fastdpo.types import DataError, UserError

PAIR_LOSSES = [name for name, spec in REGISTRY.items() if spec.data == "pairs"]
RUN = {
    "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1.0, "max_steps": 2, "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
}  # fmt: skip


def list_rows(count=8, seed=0, prompt=(2, 12), answer=(1, 8)):
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        size = draw.randint(2, 4)
        drawn = [random_rows(1, draw.random(), prompt, answer)[0] for _ in range(size)]
        completions = [row["chosen_ids"] for row in drawn]
        rows.append(
            {
                "prompt_ids": drawn[0]["prompt_ids"],
                "completions_ids": completions,
                "ranks": draw.sample(range(1, 9), size),
            }
        )
    return rows


def list_logps(model, rows):
    """(S,) of lists, from the best of each to its worst, every sequence run alone."""
    single = [
        {"prompt_ids": row["prompt_ids"], "chosen_ids": ids, "rejected_ids": ids}
        for row in rows
        for _, ids in sorted(zip(row["ranks"], row["completions_ids"], strict=True))
    ]
    return naive_sequence_logps(model, single)[: len(single)]


def plain_loop(model, batches, losses, reference=None, steps_per_update=1):
    """SGD with clipped gradients on the weighted mean of `losses(model, frozen, rows)`; the losses of the steps."""
    frozen = copy.deepcopy(model if reference is None else reference)
    optimizer = torch.optim.SGD(model.parameters(), lr=RUN["learning_rate"])
    values = []
    for rows in batches:
        weights = torch.tensor([row.get("pair_weight", 1.0) for row in rows], dtype=torch.float64)
        loss = (weights * losses(model, frozen, rows)).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RUN["max_grad_norm"])
        optimizer.step()
        values.append(loss.item())
    return values


def moved(model, start):
    return torch.cat([(a - b).detach().flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)])


def assert_same_run(run, values, model, start, tolerance=1e-3):
    """The losses of a trainer and the way its model went, against those of `plain_loop`."""
    assert losses_of(run) == pytest.approx(values, rel=1e-4, abs=1e-5)
    expected = moved(model, start)
    assert expected.norm() > 1e-3
    assert (moved(run.model, start) - expected).norm() <= tolerance * expected.norm()


def pair_loss_of(name, beta=0.1, **options):
    """For `plain_loop`: of pairs, by the formulas of the oracle."""

    def losses(model, frozen, rows):
        chosen, rejected = naive_sequence_logps(model, rows).view(2, -1)
        with torch.no_grad():
            refs = naive_sequence_logps(frozen, rows).view(2, -1)
        weights = torch.tensor([row.get("pair_weight", 1.0) for row in rows])
        lengths = torch.tensor([[len(row[side]) for row in rows] for side in ("chosen_ids", "rejected_ids")])
        return pair_losses(name, chosen, rejected, *refs, beta, lengths=lengths, pair_weights=weights, **options)

    return losses


def listwise(beta=0.1, **options):
    def losses(model, frozen, rows):
        with torch.no_grad():
            refs = list_logps(frozen, rows)
        return ranked_losses(list_logps(model, rows), refs, [len(row["ranks"]) for row in rows], beta, **options)

    return losses


def batches_of(rows, size=4):
    return [rows[first : first + size] for first in range(0, len(rows), size)]


# Losses of pairs


# Where policy and reference are one, all log-ratios are 0.
FIRST = {
    **dict.fromkeys(["sigmoid", "robust", "sigmoid_norm", "dpop", "aot", "aot_unpaired"], 0.693147),
    **dict.fromkeys(["hinge", "apo_zero", "apo_down"], 1.0),
    **dict.fromkeys(["nca_pair", "bco_pair"], 2 * 0.693147),
    "ipo": 25.0,
    "sppo_hard": 50.0,
    "discopop": 0.846574,
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_of_pairs_is_that_of_a_plain_loop(tmp_path, name):
    rows = random_rows(8, seed=1)
    smoothing = {"exo_pair": 0.05, "robust": 0.1, "simpo": 0.1, "aot": 0.2}.get(name, 0.0)
    model, plain, start = tiny_model(), tiny_model(), tiny_model()
    run = trainer(tmp_path, model, rows, loss_type=name, label_smoothing=smoothing, **RUN)
    assert (run.ref_model is None) == (not REGISTRY[name].needs_reference)
    run.train()
    values = plain_loop(plain, batches_of(rows), pair_loss_of(name, label_smoothing=smoothing))
    assert values[0] == pytest.approx(FIRST.get(name, values[0]), rel=1e-4)
    assert_same_run(run, values, plain, start)


@pytest.mark.parametrize("packing", ["prefix", "padded"])
def test_a_weighted_mix(tmp_path, packing):
    rows = random_rows(8, seed=3)
    model, plain, start = tiny_model(), tiny_model(), tiny_model()
    mix = {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [1.0, 0.5, 0.1]}
    run = trainer(tmp_path, model, rows, packing=packing, **mix, **RUN)
    run.train()
    parts = [(pair_loss_of(name), weight) for name, weight in zip(*mix.values(), strict=True)]
    values = plain_loop(plain, batches_of(rows), lambda *of: sum(weight * losses(*of) for losses, weight in parts))
    assert_same_run(run, values, plain, start)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_other_divergences(tmp_path, divergence):
    rows = random_rows(8, seed=4)
    coefficient = 0.3 if divergence == "alpha_divergence" else 0.5
    options = {"f_divergence_type": divergence, "f_alpha_divergence_coef": coefficient}
    model, plain, start = tiny_model(), tiny_model(), tiny_model()
    run = trainer(tmp_path, model, rows, **options, **RUN)
    run.train()
    values = plain_loop(plain, batches_of(rows), pair_loss_of("sigmoid", divergence=divergence, alpha=coefficient))
    assert_same_run(run, values, plain, start)


def token_logps(model, prompt, completion):
    """(tokens,) log-probs and log sum_v p_v^2 of a completion run alone."""
    ids = torch.tensor([[*prompt, *completion]])
    rows = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(1, ids[0, len(prompt) :, None]).squeeze(1), (2 * rows).logsumexp(-1)


def test_pairs_weigh_what_the_policy_gives_them(tmp_path):
    """WPO: exp of the sum over both answers of mean_t(logp_t - log sum p^2), without gradient."""
    rows = random_rows(8, seed=5)

    def losses(model, frozen, rows):
        plain = pair_loss_of("sigmoid")(model, frozen, rows)
        weights = []
        for row in rows:
            both = [token_logps(model, row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids")]
            weights.append(sum((logps - squares).mean() for logps, squares in both).exp().detach())
        return torch.stack(weights).double() * plain

    model, plain, start = tiny_model(), tiny_model(), tiny_model()
    run = trainer(tmp_path, model, rows, use_weighting=True, **RUN)
    run.train()
    assert_same_run(run, plain_loop(plain, batches_of(rows), losses), plain, start)


@pytest.mark.parametrize("reference", ["online", "cache", "explicit"])
def test_length_desensitization(tmp_path, reference):
    rows, alpha = random_rows(8, seed=6, answer=(1, 14)), 0.25

    def sums(model, rows):
        values = []
        for side, other in (("chosen_ids", "rejected_ids"), ("rejected_ids", "chosen_ids")):
            for row in rows:
                logps, _ = token_logps(model, row["prompt_ids"], row[side])
                shared = min(len(row[side]), len(row[other]))
                values.append(logps[:shared].sum() + alpha * logps[shared:].sum())
        return torch.stack(values).view(2, -1)

    def losses(model, frozen, rows):
        with torch.no_grad():
            refs = sums(frozen, rows)
        return pair_losses("sigmoid", *sums(model, rows), *refs, 0.1)

    other = tiny_model(seed=3) if reference == "explicit" else None
    model, plain, start = tiny_model(), tiny_model(), tiny_model()
    run = trainer(
        tmp_path, model, rows, ld_alpha=alpha, precompute_ref_log_probs=reference == "cache", ref_model=other,
        eval_dataset=rows[:4], **RUN,
    )  # fmt: skip
    before = run.evaluate()["eval_loss"]
    run.train()
    frozen = start if other is None else other
    with torch.no_grad():
        assert before == pytest.approx(losses(start, frozen, rows[:4]).mean().item(), rel=1e-5)
    assert_same_run(run, plain_loop(plain, batches_of(rows), losses, frozen), plain, start)


def test_length_desensitization_needs_a_reference_of_tokens(tmp_path):
    rows = [{**row, "ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0} for row in random_rows(4)]
    for columns in ({"rows": rows}, {"eval_dataset": rows}):
        with pytest.raises(DataError, match=r"ld_alpha=0.5 weighs tokens; drop the columns and set ref_logps to a"):
            trainer(tmp_path, ld_alpha=0.5, **columns)
    with pytest.raises(DataError, match="weighs tokens"):
        trainer(tmp_path, ld_alpha=0.5).evaluate(rows)


def test_without_a_reference_none_is_held_or_run(tmp_path, monkeypatch):
    import fastdpo.scoring as scoring

    monkeypatch.setattr(scoring, "forward_logps", lambda *of, **options: pytest.fail("ran a reference"))
    rows = random_rows(8, seed=7)

    def losses(model, frozen, rows):
        return pair_losses("sigmoid", *naive_sequence_logps(model, rows).view(2, -1), None, None, 0.1)

    model, plain, start = tiny_model(), tiny_model(), tiny_model()
    run = trainer(tmp_path, model, rows, reference_free=True, eval_dataset=rows[:4], **RUN)
    assert run.ref_model is None
    run.train()
    assert_same_run(run, plain_loop(plain, batches_of(rows), losses), plain, start)
    with torch.no_grad():
        assert run.evaluate()["eval_loss"] == pytest.approx(losses(run.model, None, rows[:4]).mean().item(), rel=1e-4)


@pytest.mark.parametrize("options", [{"simpo_gamma": 1.5}, '{"simpo_gamma": 1.5}'])
def test_options_of_a_loss(tmp_path, options):
    rows = random_rows(4, seed=8)
    run = trainer(tmp_path, rows=rows, loss_type="simpo", beta=2.0, loss_options=options, **(RUN | {"max_steps": 1}))
    assert run.args.loss_options == {"simpo_gamma": 1.5}
    assert json.loads(run.args.to_json_string())["loss_options"] == {"simpo_gamma": 1.5}
    run.train()
    with torch.no_grad():
        exact = pair_loss_of("simpo", 2.0, simpo_gamma=1.5)(tiny_model(), tiny_model(), rows).mean().item()
    assert losses_of(run) == pytest.approx([exact], rel=1e-5)


def test_a_loss_of_ones_own(tmp_path):
    try:  # whatever is added goes again

        @fastdpo.register_loss("trainer_squared", options={"shift": 1.0}, pieces={"ld_alpha"})
        def squared(terms, *, beta, shift):
            return (shift - beta * terms.delta) ** 2

        rows = random_rows(8, seed=9)

        def losses(model, frozen, rows):
            chosen, rejected = naive_sequence_logps(model, rows).view(2, -1)
            with torch.no_grad():
                ref_chosen, ref_rejected = naive_sequence_logps(frozen, rows).view(2, -1)
            return (0.5 - 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected)).double()) ** 2

        model, plain, start = tiny_model(), tiny_model(), tiny_model()
        run = trainer(
            tmp_path, model, rows, loss_type=["trainer_squared"], loss_options={"shift": 0.5},
            max_tokens_per_microbatch=40, **RUN,
        )  # fmt: skip
        run.train()
        assert_same_run(run, plain_loop(plain, batches_of(rows), losses), plain, start)
    finally:
        REGISTRY.pop("trainer_squared", None)


# Ranked lists


@pytest.mark.parametrize("reference", ["online", "cache", "columns", "explicit"])
@pytest.mark.parametrize("packing", ["prefix", "padded"])
def test_ranked_lists(tmp_path, reference, packing):
    rows = list_rows(seed=10)
    model, plain, start = tiny_model(), tiny_model(), tiny_model()
    other = tiny_model(seed=4) if reference == "explicit" else None
    data = rows
    if reference == "columns":
        data = add_reference_columns(precompute(model, rows, tmp_path / "c", progress=False), rows)
    run = trainer(
        tmp_path, model, data, loss_type=["listwise"], packing=packing, ref_model=other,
        precompute_ref_log_probs=reference == "cache", eval_dataset=data[:3], **RUN,
    )  # fmt: skip
    assert (run.ref_model is None) == (reference in ("cache", "columns"))
    run.train()
    frozen = start if other is None else other
    assert_same_run(run, plain_loop(plain, batches_of(rows), listwise(), frozen), plain, start)
    with torch.no_grad():
        exact = listwise()(run.model, frozen, rows[:3]).mean().item()
    assert run.evaluate()["eval_loss"] == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"f_divergence_type": "js_divergence"}, {"reference_free": True}, {"beta": 0.5, "memory_budget": 2000}],
    ids=str,
)
def test_options_of_ranked_lists(tmp_path, options):
    rows = list_rows(seed=11)
    model, plain, start = tiny_model(), tiny_model(), tiny_model()
    run = trainer(tmp_path, model, rows, loss_type="listwise", **options, **RUN)
    run.train()
    losses = listwise(options.get("beta", 0.1), divergence=options.get("f_divergence_type", "reverse_kl"))
    if "reference_free" in options:
        assert run.ref_model is None

        def losses(model, frozen, rows):
            return ranked_losses(list_logps(model, rows), None, [len(row["ranks"]) for row in rows], 0.1)

    assert_same_run(run, plain_loop(plain, batches_of(rows), losses), plain, start)


def test_ranked_lists_with_adapters_take_their_base_as_reference(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    rows = list_rows(4, seed=12)
    curves = []
    for precomputed in (False, True):
        torch.manual_seed(0)
        run = trainer(
            tmp_path, tiny_model(), rows, loss_type="listwise", peft_config=copy.deepcopy(lora),
            precompute_ref_log_probs=precomputed, **RUN,
        )  # fmt: skip
        assert run.ref_model is None
        with torch.no_grad():
            first = listwise()(run.model, tiny_model(), rows).mean().item()
        run.train()
        curves.append(losses_of(run))
        assert curves[-1][0] == pytest.approx(first, rel=1e-4)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_the_names_of_the_metrics(tmp_path):
    rows = list_rows(4, seed=13)
    run = trainer(tmp_path, rows=rows, loss_type="listwise", eval_dataset=rows, **(RUN | {"max_steps": 1}))
    run.train()
    (logs,) = [entry for entry in run.state.log_history if "loss" in entry]
    names = {
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
        "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "num_tokens",
    }  # fmt: skip
    assert names <= set(logs)
    assert {f"eval_{name}" for name in names - {"num_tokens"}} | {"eval_loss"} <= set(run.evaluate())
    with torch.no_grad():
        logps = list_logps(tiny_model(), rows).split([len(row["ranks"]) for row in rows])
    best = [values[0].item() for values in logps]
    rest = [values[1:].mean().item() for values in logps]
    assert logs["logps/chosen"] == pytest.approx(sum(best) / 4, rel=1e-5)
    assert logs["logps/rejected"] == pytest.approx(sum(rest) / 4, rel=1e-5)
    assert logs["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    again = sum(len(row["prompt_ids"]) * len(row["ranks"]) + sum(map(len, row["completions_ids"])) for row in rows)
    assert logs["num_tokens"] == again
    once = sum(len(row["prompt_ids"]) + sum(map(len, row["completions_ids"])) for row in rows)
    assert logs["perf/saved_tokens_fraction"] == pytest.approx(1 - once / again, abs=0.02)
    results = run.evaluate()
    with torch.no_grad():
        now = list_logps(run.model, rows).split([len(row["ranks"]) for row in rows])
    right = []
    for after, before in zip(now, logps, strict=True):
        rewards = (after - before).tolist()
        right.append([a > b for i, a in enumerate(rewards) for b in rewards[i + 1 :]])
    exact = sum(sum(own) / len(own) for own in right) / 4
    assert results["eval_rewards/accuracies"] == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("budget", [50, 1])
@pytest.mark.parametrize("packing", ["prefix", "padded"])
def test_cut_batches_of_lists_train_as_whole_ones(tmp_path, packing, budget):
    rows = [{**row, "pair_weight": 0.5 + i % 3} for i, row in enumerate(list_rows(16, seed=14))]
    runs = []
    for tokens in (None, budget):
        run = trainer(
            tmp_path, tiny_model(), rows, loss_type="listwise", packing=packing, max_tokens_per_microbatch=tokens,
            gradient_accumulation_steps=2, eval_dataset=rows[:5], **RUN,
        )  # fmt: skip
        run.train()
        runs.append((run, run.evaluate()))
    (whole, evaluated), (cut, theirs) = runs
    assert_same_run(cut, losses_of(whole), whole.model, tiny_model())
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert theirs[name] == pytest.approx(evaluated[name], rel=1e-4)


@pytest.mark.parametrize("strategy", ["group_by_length", "group_by_prompt", "batch_rebalance"])
def test_orders_of_lists_take_every_row_once_an_epoch(tmp_path, strategy):
    rows = list_rows(12, seed=15)
    for i in range(0, 12, 2):
        rows[i + 1]["prompt_ids"] = rows[i]["prompt_ids"]
    run = trainer(
        tmp_path, rows=rows, loss_type="listwise",
        **(RUN | {"train_sampling_strategy": strategy, "max_steps": -1, "num_train_epochs": 1}),
    )  # fmt: skip
    seen, collate = [], run.data_collator
    run.data_collator = lambda some: seen.append(some) or collate(some)
    run.train()
    keys = [
        json.dumps([row["prompt_ids"], row["completions_ids"], row["ranks"]]) for batch in seen[-3:] for row in batch
    ]
    assert sorted(keys) == sorted(
        json.dumps([row["prompt_ids"], row["completions_ids"], row["ranks"]]) for row in rows
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("precompute_ref", [False, True])
def test_lists_that_are_cut(tmp_path, caplog, mode, precompute_ref):
    rows = [*list_rows(6, seed=16, prompt=(2, 5), answer=(1, 9)), *list_rows(2, seed=17, prompt=(9, 9))]
    run = trainer(
        tmp_path, rows=rows, loss_type="listwise", max_length=8, truncation_mode=mode,
        precompute_ref_log_probs=precompute_ref, **(RUN | {"max_steps": 1, "per_device_train_batch_size": 8}),
    )  # fmt: skip
    assert any("are longer than max_length=8 and are cut" in record.getMessage() for record in caplog.records)
    kept = rows[:6] if mode == "keep_start" else rows
    assert len(run.train_dataset) == len(kept)
    run.train()
    assert losses_of(run) == pytest.approx(
        [sum(torch.arange(2, len(row["ranks"]) + 1).log().sum().item() for row in kept) / len(kept)], rel=1e-4
    )
    with pytest.raises(DataError, match="every prompt fills max_length=8"):
        trainer(tmp_path, rows=rows[6:], loss_type="listwise", max_length=8)


@pytest.mark.parametrize("precomputed", [False, True])
def test_streamed_lists(tmp_path, precomputed):
    from datasets import IterableDataset

    rows = list_rows(8, seed=18)
    runs = []
    for data in (rows, IterableDataset.from_generator(lambda: iter(rows))):
        run = trainer(tmp_path, rows=data, loss_type="listwise", precompute_ref_log_probs=precomputed, **RUN)
        run.train()
        runs.append(losses_of(run))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_lists_of_text(tmp_path):
    rows = [
        {"prompt": f"why {word}", "completions": [" yes", " no no", f" {word}"], "ranks": [3, 1, 2]} for word in "abcde"
    ]
    run = trainer(tmp_path, rows=rows, loss_type="listwise", **RUN)
    assert {"prompt_ids", "completions_ids", "ranks"} <= set(run.train_dataset.column_names)
    assert run.train_dataset["prompt"][:] == [row["prompt"] for row in rows]
    run.train()
    assert losses_of(run)[0] == pytest.approx(1.791759, rel=1e-4)


# Weights


def weighted(rows, weights=(0.5, 2.0, 0.0, 1.0, 3.0)):
    return [{**row, "pair_weight": weights[number % len(weights)]} for number, row in enumerate(rows)]


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["sigmoid", "sft"], ["orpo"]])
def test_weights_are_those_of_a_plain_loop(tmp_path, loss_type):
    rows = weighted(random_rows(8, seed=19))
    model, plain, start = tiny_model(), tiny_model(), tiny_model()
    run = trainer(tmp_path, model, rows, loss_type=loss_type, eval_dataset=rows[:5], **RUN)
    run.train()
    parts = [pair_loss_of(name) for name in loss_type]

    def losses(*of):
        return sum(part(*of) for part in parts)

    assert_same_run(run, plain_loop(plain, batches_of(rows), losses), plain, start)
    if loss_type == ["sigmoid"]:
        weights = torch.tensor([row["pair_weight"] for row in rows[:5]])
        with torch.no_grad():
            exact = (weights * losses(run.model, start, rows[:5])).sum() / weights.sum()
        for size in (2, 8):
            run.args.per_device_eval_batch_size = size
            assert run.evaluate()["eval_loss"] == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["sigmoid", "sft"], ["cpo"], ["orpo"], ["listwise"]])
def test_a_row_of_weight_0_might_as_well_not_be_there(tmp_path, loss_type):
    rows = list_rows(8, seed=20) if loss_type == ["listwise"] else random_rows(8, seed=20)
    marked = weighted(rows, (1.0, 0.0))
    start = tiny_model()
    few = trainer(tmp_path, tiny_model(), rows[::2], loss_type=loss_type, **(RUN | {"per_device_train_batch_size": 2}))
    few.train()
    run = trainer(tmp_path, tiny_model(), marked, loss_type=loss_type, **RUN)
    run.train()
    assert_same_run(run, losses_of(few), few.model, start)


def test_a_step_in_which_nothing_weighs_anything_changes_nothing(tmp_path):
    rows = weighted(random_rows(8, seed=21), (0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0))
    model = tiny_model()
    run = trainer(tmp_path, model, rows, **(RUN | {"max_steps": 1}))
    run.train()
    assert losses_of(run) == [0.0]
    assert moved(model, tiny_model()).abs().max() == 0


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["sigmoid", "sft"], ["cpo"], ["orpo"]])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_cut_batches_of_weighted_pairs_train_as_whole_ones(tmp_path, loss_type, accumulate):
    """Whole batches and cut ones hold the same pairs: their steps are the same to rounding."""
    rows = weighted(random_rows(16, seed=22, answer=(1, 14)))
    runs = []
    for budget in (None, 60 if accumulate == 2 else 1):
        run = trainer(
            tmp_path, tiny_model(), rows, loss_type=loss_type, max_tokens_per_microbatch=budget, eval_dataset=rows[:6],
            gradient_accumulation_steps=accumulate, per_device_eval_batch_size=4, **RUN,
        )  # fmt: skip
        run.train()
        runs.append((run, run.evaluate()["eval_loss"]))
    (whole, evaluated), (cut, theirs) = runs
    assert_same_run(cut, losses_of(whole), whole.model, tiny_model())
    assert theirs == pytest.approx(evaluated, rel=1e-4)


def test_accumulated_steps_of_weighted_pairs_equal_one_large_batch(tmp_path):
    rows = weighted(random_rows(8, seed=23))
    runs = []
    for size, accumulate in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path, tiny_model(), rows, gradient_accumulation_steps=accumulate,
            **(RUN | {"per_device_train_batch_size": size, "max_steps": 1}),
        )  # fmt: skip
        run.train()
        runs.append(run)
    assert_same_run(runs[1], losses_of(runs[0]), runs[0].model, tiny_model())


def test_rows_without_a_weight_weigh_1(tmp_path):
    rows = random_rows(8, seed=24)
    some = [{**row, "pair_weight": 2.0} if number < 4 else row for number, row in enumerate(rows)]
    all_ = [{**row, "pair_weight": 2.0 if number < 4 else 1.0} for number, row in enumerate(rows)]
    runs = [trainer(tmp_path, rows=data, **(RUN | {"per_device_train_batch_size": 8})) for data in (some, all_)]
    for run in runs:
        run.train()
    assert losses_of(runs[0]) == losses_of(runs[1])


def mixture(coefficient):
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
            router_aux_loss_coef=coefficient, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_the_balancing_loss_does_not_depend_on_the_scale_of_the_weights(tmp_path, weight):
    rows = [{**row, "pair_weight": weight} for row in random_rows(4, seed=25)]
    rows += [{**row, "pair_weight": 1.0} for row in random_rows(4, seed=26)]  # of which the step takes none
    options = RUN | {"max_steps": 1, "train_sampling_strategy": "sequential"}
    run = trainer(tmp_path, mixture(0.05), rows, **options)
    run.train()
    (logs,) = [entry for entry in run.state.log_history if "loss" in entry]
    expected = 0.693147 + 0.05 * logs["aux_loss"] if weight else 0.0  # in which nothing weighs anything
    assert logs["loss"] == pytest.approx(expected, rel=1e-4)


# What is refused


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (list_rows(4), {}, "the train data set holds lists, and loss_type sigmoid is a loss of pairs; choose a loss"),
        (list_rows(4), {"loss_type": ["ipo"]}, "the train data set holds lists, and loss_type ipo is a loss of pairs"),
        (random_rows(4), {"loss_type": "listwise"}, "train data set holds pairs, and loss_type listwise is a loss"),
        ([{"prompt_ids": [4], "completion_ids": [5], "label": True}] * 4, {}, "the train data set holds answers"),
        (random_rows(4), {"eval_dataset": list_rows(4)}, "the eval data set holds lists, and loss_type sigmoid"),
        (random_rows(4), {"eval_dataset": {"a": random_rows(2), "b": list_rows(2)}}, "the b data set holds lists"),
        ([{**list_rows(1)[0], "ranks": [1] * 9}], {"loss_type": "listwise"}, "row 0 .* there are 9 ranks"),
        ([{"prompt": "a", "completions": [" b"]}], {"loss_type": "listwise"}, "row 0 .*at least two completions"),
        ([{**row, "ref_logps": ["x"] * len(row["ranks"])} for row in list_rows(2)], {"loss_type": "listwise"},
         "row 0 .*'ref_logps' is 'x'; it must be a sum of log-probs"),
        ([{**list_rows(1)[0], "ref_logps": [-1.0] * len(list_rows(1)[0]["ranks"])}, *list_rows(1, seed=1)],
         {"loss_type": "listwise"}, "1 of 2 rows of the train data set have no ref_logps"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_the_loss_are_refused_before_training(tmp_path, rows, options, message):
    with pytest.raises(DataError, match=message):
        trainer(tmp_path, rows=rows, **options)


def test_a_later_evaluation_set_of_other_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="the eval data set holds lists, and loss_type sigmoid is a loss of pairs"):
        trainer(tmp_path).evaluate(list_rows(2))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": ["sigmoid", "listwise"]}, "loss_type mixes sigmoid .of pairs. and listwise .of lists."),
        ({"loss_type": ["kto"]}, "is a loss of answers; DPOTrainer trains on pairs and ranked lists"),
        ({"loss_type": ["listwise"], "ld_alpha": 0.5}, "ld_alpha=0.5 has no meaning for loss_type listwise"),
        ({"loss_type": ["listwise"], "use_weighting": True}, "use_weighting=True has no meaning"),
        ({"loss_type": ["listwise"], "label_smoothing": 0.1}, "label_smoothing=0.1 has no meaning"),
        ({"loss_type": ["sigmoid"], "loss_weights": [1.0, 2.0]}, "loss_weights has 2 values and loss_type 1 losses"),
        ({"loss_type": ["sft"], "ld_alpha": 0.5}, "ld_alpha=0.5 has no meaning for loss_type sft"),
        ({"loss_options": {"ld_alpha": 0.5}}, "loss_options has 'ld_alpha', which is a field of the config"),
        ({"loss_options": {"dpop_lambda": 1.0}}, "dpop_lambda=1.0 has no meaning for loss_type sigmoid"),
        ({"loss_options": {"dpop_lambda": -1.0}, "loss_type": "dpop"}, "dpop_lambda is -1.0; it must be"),
        ({"loss_options": "[1]"}, "must be a JSON object"),
        ({"loss_options": '{"dpop_lambda": '}, "must be a JSON object"),
        ({"loss_type": "nothing"}, "loss_type is 'nothing'"),
        ({"reference_free": True, "loss_type": ["simpo", "ipo"], "ref_logps": "x"}, "contradict each other"),
        ({"loss_type": ["nca_pair"], "max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch is 0"),
        ({"loss_type": ["aot_unpaired"], "max_tokens_per_microbatch": 9}, "would change loss_type"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused_when_the_config_is_built(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


REFS = {"ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0}


@pytest.mark.parametrize(
    "rows, options",
    [
        ([{**row, "pair_weight": -1.0} for row in random_rows(4)], {}),
        ([{**row, "pair_weight": float("nan")} for row in random_rows(4)], {}),
        ([{**row, "pair_weight": "x"} for row in random_rows(4)], {}),
        ([{**row, "pair_weight": 2.0} for row in random_rows(4)], {"loss_type": "aot"}),
        ([{**row, **REFS} for row in random_rows(4)], {"reference_free": True}),
        ([{**row, "ref_logps": [-1.0] * 9} for row in list_rows(4)], {"loss_type": "listwise"}),
        ([{**row, "ref_logps": -1.0} for row in list_rows(4)], {"loss_type": "listwise"}),
        ([{**row, "ranks": 1} for row in list_rows(4)], {"loss_type": "listwise"}),
        ([*random_rows(4), *list_rows(4)], {}),
        ([*list_rows(4), *random_rows(4)], {"loss_type": "listwise"}),
    ],
    ids=["weight below 0", "weight nan", "weight text", "weights of aot", "columns without reference",
         "ref_logps count", "ref_logps number", "ranks number", "lists among pairs", "pairs among lists"],
)  # fmt: skip
def test_rows_that_would_stop_the_training_are_refused_before_it(tmp_path, rows, options):
    """The constructor raises ValueError for data that do not fit, "before any training"."""
    with pytest.raises(ValueError):
        trainer(tmp_path, rows=rows, **options)


@pytest.mark.parametrize("rows, loss_type", [(random_rows(8), "sigmoid"), (list_rows(8), "listwise")])
@pytest.mark.parametrize("strategy", ["group_by_prompt", "group_by_length", "batch_rebalance"])
def test_rows_without_any_prompt(tmp_path, rows, loss_type, strategy):
    bare = [{**row, "prompt_ids": []} for row in rows]
    run = trainer(tmp_path, rows=bare, loss_type=loss_type, **(RUN | {"train_sampling_strategy": strategy}))
    run.train()
    assert len(losses_of(run)) == 2


def test_a_column_that_only_other_rows_have_a_meaning_for(tmp_path):
    """Such as a label of pairs: it is left out, as every other column is."""
    rows = [{**row, "label": "x" if number % 2 else 3} for number, row in enumerate(random_rows(4))]
    assert "label" not in trainer(tmp_path, rows=rows).train_dataset.column_names


def test_a_reference_that_is_gone_is_told_by_the_names_of_lists(tmp_path):
    rows = list_rows(4, seed=26)
    data = add_reference_columns(precompute(tiny_model(), rows, tmp_path / "c", progress=False), rows)
    run = trainer(tmp_path, rows=data, loss_type="listwise", **RUN)
    with pytest.raises((ValueError, UserError), match="ref_logps"):
        run.evaluate(rows)
