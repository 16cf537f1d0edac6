"""Evaluation and prediction: every row counts once, whatever went before, in however many processes."""

import json
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from processes import run_script
from tiny import naive_sequence_logps, random_rows, text_rows, tiny_model, word_tokenizer
from trainer_runs import losses_of, trainer

from fastdpo import CPOConfig, CPOTrainer
from fastdpo.types import UserError


def results(folder, processes):
    folder.mkdir()
    run_script("tests/trainer/evaluation_run.py", folder, processes=processes, folder=folder)
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path):
    """Numbers of rows that fill the last batches of both, of one, or of none."""
    (one,), two = results(tmp_path / "one", 1), results(tmp_path / "two", 2)
    rows = random_rows(5, seed=3)
    with torch.no_grad():
        delta = (naive_sequence_logps(tiny_model(), rows) - naive_sequence_logps(tiny_model(seed=1), rows)).view(2, -1)
    exact = -torch.nn.functional.logsigmoid(0.1 * (delta[0] - delta[1])).mean()
    assert one["dpo 5"]["metrics"]["eval_loss"] == pytest.approx(float(exact), abs=1e-5)
    for rank in two:
        assert rank.keys() == one.keys()
        for name, alone in one.items():
            ours, exact_metrics = rank[name]["metrics"], dict(alone["metrics"])
            if "reward" in name:  # means over batches of all processes, which are of other rows
                for end in ("min_reward", "max_reward"):
                    assert ours[f"eval_{end}"] <= max(map(max, alone["predictions"])) + 1e-5
                    ours.pop(f"eval_{end}"), exact_metrics.pop(f"eval_{end}")
            if "kl" in name:  # means over the tokens of a process's batch, as TRL has them: of other rows here
                for end in ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"):
                    ours.pop(f"eval_{end}"), exact_metrics.pop(f"eval_{end}")
                assert exact_metrics["eval_kl"] > 0.1
            assert ours == pytest.approx(exact_metrics, abs=2e-5, nan_ok=True), name
            assert len(rank[name]["predictions"]) == len(alone["predictions"]), name
            for row, other in zip(rank[name]["predictions"], alone["predictions"], strict=True):
                assert row == pytest.approx(other, abs=2e-5), name
            assert ours["eval_rows"] == int(name.split()[-1])


class BrokenOff(RuntimeError):
    pass


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_an_evaluation_after_one_that_broke_off(tmp_path, method):
    """Nothing of the first three batches is left in the next means."""
    run = trainer(tmp_path, ref_model=tiny_model(seed=1), eval_dataset=random_rows(12), per_device_eval_batch_size=2)
    exact = run.evaluate()["eval_loss"]
    whole, calls = run.prediction_step, []

    def out_of_memory(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise BrokenOff
        return whole(*args, **kwargs)

    run.prediction_step = out_of_memory
    with pytest.raises(BrokenOff):
        run.evaluate() if method == "evaluate" else run.predict(random_rows(12))
    run.prediction_step = whole
    assert run.evaluate(random_rows(4, seed=5))["eval_loss"] != exact
    assert run.evaluate()["eval_loss"] == exact
    assert run.evaluate()["eval_num_tokens"] == 0  # trained


def exact_margins(model, rows):
    with torch.no_grad():
        delta = naive_sequence_logps(model, rows) - naive_sequence_logps(tiny_model(), rows)
    chosen, rejected = 0.1 * delta.view(2, -1)
    return float((chosen - rejected).mean()), float(-torch.nn.functional.logsigmoid(chosen - rejected).mean())


def test_predictions_by_the_true_reference_after_training(tmp_path):
    """Rows that the cache knows: those of the training set, as token ids."""
    rows = random_rows(12)
    run = trainer(tmp_path, rows=rows, precompute_ref_log_probs=True, max_steps=3)
    run.train()
    margin, loss = exact_margins(run.model, rows)
    assert margin > 0.02
    for metrics in (run.predict(rows).metrics, run.predict(Dataset.from_list(rows)).metrics):
        assert metrics["test_loss"] == pytest.approx(loss, abs=1e-4)
        assert metrics["test_rewards/margins"] == pytest.approx(margin, abs=1e-4)
    assert run.evaluate(rows)["eval_loss"] == pytest.approx(loss, abs=1e-4)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert run.evaluate(stream)["eval_loss"] == pytest.approx(loss, abs=1e-4)


def test_rows_of_which_no_reference_is_left(tmp_path):
    """The policy is never its own reference, whichever way the rows come."""
    rows, new = random_rows(8), random_rows(4, seed=9)
    run = trainer(tmp_path, rows=rows, precompute_ref_log_probs=True, max_steps=1)
    assert run.evaluate(new)["eval_rewards/margins"] == 0  # not trained yet: the policy is the reference
    later = random_rows(4, seed=10)
    run.train()
    margin, _ = exact_margins(run.model, new)
    assert run.evaluate(new)["eval_rewards/margins"] == pytest.approx(margin, abs=1e-4)  # kept
    for given in (later, Dataset.from_list(later), IterableDataset.from_generator(lambda: iter(later))):
        for method in (run.evaluate, run.predict):
            with pytest.raises(UserError, match="cannot be computed any more"):
                method(given)
    with pytest.raises(UserError, match="cannot be computed any more"):
        run.evaluate({"known": rows, "new": later})
    with pytest.raises(UserError, match="no other reference than the policy"):
        run.compute_loss(run.model, run.data_collator([{**row} for row in later]))
    given = [{**row, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0} for row in rows]
    run = trainer(tmp_path, rows=given, max_steps=1)
    run.train()
    for method in (run.evaluate, run.predict):
        with pytest.raises(UserError, match="no ref_chosen_logps"):
            method(later)


def test_weights_that_moved_before_training(tmp_path):
    """Also where it was not `train` that moved them."""
    run = trainer(tmp_path, precompute_ref_log_probs=True)
    run.train()
    run.state.global_step = 0
    with pytest.raises(UserError, match="cannot be computed any more"):
        run.evaluate(random_rows(4, seed=9))


@pytest.mark.parametrize("strategy", ["group_by_length", "group_by_prompt", "batch_rebalance", "sequential"])
def test_evaluation_whatever_the_order_of_training_rows(tmp_path, strategy):
    rows = random_rows(9, seed=2)
    run = trainer(
        tmp_path, eval_dataset=rows, train_sampling_strategy=strategy, eval_strategy="steps", eval_steps=1,
        max_steps=2, per_device_eval_batch_size=2, ref_model=tiny_model(seed=1),
    )  # fmt: skip
    run.train()
    assert len([entry for entry in run.state.log_history if "eval_loss" in entry]) == 2
    predicted = run.predict(rows).predictions
    with torch.no_grad():
        delta = naive_sequence_logps(run.model, rows) - naive_sequence_logps(tiny_model(seed=1), rows)
    torch.testing.assert_close(torch.tensor(predicted), 0.1 * delta.view(2, -1).T, rtol=1e-4, atol=1e-4)


def test_raw_rows_are_predicted_and_evaluated(tmp_path):
    rows = text_rows(6)
    run = trainer(tmp_path, rows=rows, eval_dataset=rows, ref_model=tiny_model(seed=1))
    loss = run.evaluate()["eval_loss"]
    assert run.evaluate(rows)["eval_loss"] == loss
    output = run.predict(rows)
    assert output.metrics["test_loss"] == loss and output.predictions.shape == (6, 2)
    assert run.predict(Dataset.from_list(rows)).metrics["test_loss"] == loss


@pytest.mark.parametrize("of", [list, Dataset.from_list], ids=["list", "table"])
def test_data_sets_keep_the_text_for_callbacks(tmp_path, of):
    rows = [{**row, "source": f"page {number}", "mixed": number if number else "none"}
            for number, row in enumerate(text_rows(6))]  # fmt: skip
    table = [{key: value for key, value in row.items() if key != "mixed"} for row in rows]
    run = trainer(tmp_path, rows=of(table), eval_dataset=of(rows if of is list else table), max_steps=1)
    for dataset in (run.train_dataset, run.eval_dataset):
        assert dataset["prompt"][:] == [row["prompt"] for row in rows]
        assert dataset["source"][2] == "page 2" and dataset["chosen"][1] == rows[1]["chosen"]
        assert "mixed" not in dataset.column_names
    run.train()
    assert losses_of(run) and run.evaluate()["eval_loss"] > 0


def test_text_of_a_selected_table_stays_with_its_ids(tmp_path):
    """Rows that were drawn from a larger table, of which some fall out here."""
    rows = text_rows(8)
    rows[5] = {"prompt": "why " * 20, "chosen": "yes", "rejected": "no"}
    run = trainer(tmp_path, rows=Dataset.from_list(rows).select([7, 5, 2, 3]), max_length=12, max_prompt_length=None)
    assert run.train_dataset["prompt"][:] == [rows[number]["prompt"] for number in (7, 2, 3)]
    tokenizer = word_tokenizer()
    for row in run.train_dataset:
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]


@pytest.mark.parametrize(("steps", "every"), [(5, 3), (3, 10), (4, 2)])
def test_the_last_record_has_the_metrics_of_the_last_steps(tmp_path, steps, every):
    run = trainer(tmp_path, max_steps=steps, logging_steps=every)
    run.train()
    each = trainer(tmp_path, max_steps=steps, logging_steps=1)
    each.train()
    last = run.state.log_history[-1]
    single = [entry["rewards/margins"] for entry in each.state.log_history if "loss" in entry]
    left = single[steps - steps % every :]
    assert "train_loss" in last and ("num_tokens" in last) == bool(left)
    if left:
        assert last["rewards/margins"] == pytest.approx(math.fsum(left) / len(left), abs=1e-6)
    else:
        assert "rewards/margins" not in last


def test_a_second_training_counts_its_own_tokens(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    counts = []
    for _ in range(2):
        run.train()
        counts.append([entry["num_tokens"] for entry in run.state.log_history if "loss" in entry])
    assert counts[0] == counts[1] and counts[0][0] > 0


@pytest.mark.parametrize("packing", ["prefix", "varlen", "padded"])
def test_tokens_seen_are_those_of_the_sequences(tmp_path, packing):
    """Whatever is shared or filled up; with "all", the padding of padded batches counts, too."""
    rows = random_rows(4)
    own = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    widest = max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows)
    for which, expected in (("non_padding", own), ("all", 8 * widest if packing == "padded" else own)):
        for budget in (None, 40):
            run = trainer(
                tmp_path, rows=rows, packing=packing, max_steps=2, include_num_input_tokens_seen=which,
                max_tokens_per_microbatch=budget,
            )  # fmt: skip
            run.train()
            if budget is None or which == "non_padding" or packing != "padded":
                assert run.state.num_input_tokens_seen == 2 * expected
    assert run.state.log_history[0]["num_input_tokens_seen"] > 0


def test_prepared_data_are_found_again(tmp_path, monkeypatch):
    """In datasets' cache, by another run with another output folder and learning rate."""
    Dataset.from_list(text_rows(6)).save_to_disk(tmp_path / "data")
    from datasets import load_from_disk

    files = []
    for number in range(2):
        run = trainer(tmp_path / str(number), rows=load_from_disk(tmp_path / "data"), learning_rate=1e-3 / (1 + number))
        files.append({file["filename"] for file in run.train_dataset.cache_files})
    assert files[0] == files[1] and any("cache-" in name for name in files[0])


def test_every_training_begins_with_a_new_model(tmp_path):
    """With model_init: the second as the first, and with other arguments that the trial sets."""
    made = []

    def model_init(trial=None):
        made.append(trial)
        return tiny_model()

    args = CPOConfig(
        str(tmp_path), max_steps=3, logging_steps=1, bf16=False, use_cpu=True, report_to=[], learning_rate=1e-3,
        disable_tqdm=True, save_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    run = CPOTrainer(model_init=model_init, args=args, train_dataset=random_rows(20), processing_class=word_tokenizer())
    curves = []
    for _ in range(2):
        run.train()
        curves.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        run.model = None  # as a search leaves it between two trials
    assert curves[0] == curves[1] and len(curves[0]) == 3 and len(made) == 3
    plain = CPOTrainer(tiny_model(), args=args, train_dataset=random_rows(20), processing_class=word_tokenizer())
    plain.train()
    assert [entry["loss"] for entry in plain.state.log_history if "loss" in entry] == curves[0]


def test_a_search_for_hyperparameters(tmp_path):
    pytest.importorskip("optuna")
    args = CPOConfig(
        str(tmp_path), max_steps=2, logging_steps=1, bf16=False, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    run = CPOTrainer(
        model_init=lambda trial: tiny_model(), args=args, train_dataset=random_rows(8), eval_dataset=random_rows(4),
        processing_class=word_tokenizer(),
    )  # fmt: skip
    best = run.hyperparameter_search(
        lambda trial: {"beta": trial.suggest_categorical("beta", [0.1, 5.0])}, n_trials=2,
        compute_objective=lambda metrics: metrics["eval_loss"], backend="optuna",
    )  # fmt: skip
    assert set(best.hyperparameters) == {"beta"}
