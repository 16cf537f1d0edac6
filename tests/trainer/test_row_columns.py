"""Optional columns that not every row has: none is lost because the first row lacks it."""

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from reward_models import tiny_reward_model
from tiny import naive_sequence_logps, random_rows, text_rows, tiny_model, word_tokenizer
from trainer_runs import losses_of, trainer

from fastdpo import KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from fastdpo.types import DataError

OPTIONS = {"bf16": False, "use_cpu": True, "report_to": [], "max_steps": 1, "per_device_train_batch_size": 4}


def kto(tmp_path, rows, **options):
    args = KTOConfig(output_dir=str(tmp_path), **{**OPTIONS, **options})
    return KTOTrainer(tiny_model(), args=args, train_dataset=rows, processing_class=word_tokenizer())


def reward(tmp_path, rows):
    args = RewardConfig(output_dir=str(tmp_path), **OPTIONS)
    return RewardTrainer(tiny_reward_model(), args=args, train_dataset=rows, processing_class=word_tokenizer())


def single(count):
    rows = random_rows(count)
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": number % 2 == 0}
        for number, row in enumerate(rows)
    ]


def ranked(count):
    rows = random_rows(count)
    return [
        {"prompt_ids": row["prompt_ids"], "completions_ids": [row["chosen_ids"], row["rejected_ids"], [7, 8]]}
        for row in rows
    ]


def with_some(rows, name, value):
    """The column in all rows but the first."""
    return [rows[0], *({**row, name: value} for row in rows[1:])]


@pytest.mark.parametrize("kind", ["list", "table", "stream"])
def test_weights_of_some_rows(tmp_path, kind):
    """A row without a weight weighs 1: the loss is that of weights written out."""
    weighted = with_some(random_rows(4), "pair_weight", 3.0)
    whole = [{"pair_weight": 1.0, **row} for row in weighted]
    given = {
        "list": weighted,
        "table": Dataset.from_list(random_rows(4)).add_column("pair_weight", [None, 3.0, 3.0, 3.0]),
        "stream": IterableDataset.from_generator(lambda: iter(weighted)),
    }[kind]
    policy, reference = tiny_model(), tiny_model(seed=1)
    options = {"max_steps": 1, "train_sampling_strategy": "sequential"}
    losses: list[float] = []
    for rows in (given, whole, random_rows(4)):
        run = trainer(tmp_path, tiny_model(), rows, ref_model=reference, **options)
        run.model.load_state_dict(policy.state_dict())
        run.train()
        losses += losses_of(run)
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)
    assert losses[0] != pytest.approx(losses[2], abs=1e-4)


@pytest.mark.parametrize(
    "rows", [single(6), ranked(6), random_rows(6), text_rows(6)], ids=["kto", "lists", "ids", "text"]
)
def test_weights_of_all_kinds_of_rows(tmp_path, rows):
    rows = with_some(rows, "pair_weight", 2.0)
    if "label" in rows[1]:
        run = kto(tmp_path, rows)
    else:
        run = trainer(tmp_path, rows=rows, loss_type="listwise" if "completions_ids" in rows[0] else "sigmoid")
    assert run.train_dataset["pair_weight"][:] == [None, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_ranks_of_some_lists(tmp_path):
    """A list without ranks comes best first."""
    run = trainer(tmp_path, rows=with_some(ranked(4), "ranks", [3, 1, 2]), loss_type="listwise", max_steps=1)
    batch = run._collator()(list(run.train_dataset))
    first, second = (
        tuple(row) for row in (run.train_dataset[0]["completions_ids"], run.train_dataset[1]["completions_ids"])
    )
    starts = [batch["target_ids"][batch["sequence_ids"] == number].tolist() for number in range(6)]
    assert starts == [*map(list, first), list(second[1]), list(second[2]), list(second[0])]


def test_margins_and_weights_of_reward_rows(tmp_path):
    rows = with_some(random_rows(4), "pair_weight", 2.0)
    assert reward(tmp_path, rows).train_dataset["pair_weight"][:] == [None, 2.0, 2.0, 2.0]
    with pytest.raises(DataError, match=r"1 of 4 rows of the train data set have no margin \(the first is row 0"):
        reward(tmp_path, with_some(random_rows(4), "margin", 0.5))


@pytest.mark.parametrize("of", [list, "stream"])
@pytest.mark.parametrize(
    ("make", "rows", "columns"),
    [
        (trainer, random_rows(4), {"ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}),
        (kto, single(4), {"ref_logps": -3.0}),
        (kto, single(4), {"KL_completion_ids": [5, 6]}),
        (reward, random_rows(4), {"margin": 0.5}),
    ],
    ids=["pairs", "answers", "mismatched", "margin"],
)
def test_columns_that_all_rows_need(tmp_path, make, rows, columns, of):
    """Also where the first row has one and a later one has not."""
    for mixed in (
        [rows[0], *({**row, **columns} for row in rows[1:])],
        [{**row, **columns} for row in rows[:3]] + rows[3:],
    ):
        given = IterableDataset.from_generator(lambda mixed=mixed: iter(mixed)) if of == "stream" else mixed
        with pytest.raises(DataError, match=next(iter(columns))):
            run = make(tmp_path, rows=given)
            list(run.train_dataset)


def test_pairs_of_which_only_some_have_columns_for_single_answers(tmp_path):
    rows = with_some(random_rows(4), "pair_weight", 2.0)
    assert kto(tmp_path, rows).train_dataset["pair_weight"][:] == [None, 2.0, 2.0, 2.0] * 2
    assert kto(tmp_path, Dataset.from_list(rows[::-1])).train_dataset["pair_weight"][:] == [2.0, 2.0, 2.0, None] * 2


def test_pairs_and_single_answers_are_not_mixed(tmp_path):
    mixed = [single(1)[0], random_rows(1)[0]]
    for rows in (mixed, mixed[::-1]):
        with pytest.raises(DataError, match="part them"):
            kto(tmp_path, rows)
    with pytest.raises(DataError, match=r"row 1 .*'rejected_ids' is missing"):
        kto(tmp_path, [random_rows(1)[0], {"prompt_ids": [3], "chosen_ids": [4]}])


def test_data_sets_that_are_none(tmp_path):
    """Several under names, as `load_dataset` gives them without a split, and a path: said at once, by the argument."""
    splits = DatasetDict({"train": Dataset.from_list(random_rows(4)), "test": Dataset.from_list(random_rows(2))})
    for make in (trainer, kto, reward):
        with pytest.raises(TypeError, match=r"train_dataset is DatasetDict with train, test.*as data\['train'\]"):
            make(tmp_path, rows=splits)
        with pytest.raises(TypeError, match=r"train_dataset is str; it must be a datasets\.Dataset"):
            make(tmp_path, rows="rows.jsonl")
    with pytest.raises(TypeError, match="eval_dataset is str"):
        trainer(tmp_path, eval_dataset={"one": "rows.jsonl"})
    run = trainer(tmp_path, eval_dataset=splits)
    assert set(run.eval_dataset) == {"train", "test"}
    with pytest.raises(TypeError, match="the data set is DatasetDict with train, test"):
        run.predict(splits)


def test_first_rows_that_do_not_tell_a_type(tmp_path):
    """More rows than datasets writes at once, of which the first have empty prompts and no weights."""
    rows = [{"prompt_ids": [], "chosen_ids": [5, 6], "rejected_ids": [7], "pair_weight": None} for _ in range(1001)]
    rows += [{"prompt_ids": [3], "chosen_ids": [5], "rejected_ids": [7], "pair_weight": 2.0}]
    run = trainer(tmp_path, rows=Dataset.from_list(rows))
    assert run.train_dataset[1001]["prompt_ids"] == [3] and run.train_dataset[1001]["pair_weight"] == 2.0
    assert kto(tmp_path, Dataset.from_list(rows)).train_dataset[-1]["pair_weight"] == 2.0
    whole = [{"chosen": f"{'a' if number < 1001 else 'why'} b", "rejected": "why a"} for number in range(1002)]
    prepared = reward(tmp_path, Dataset.from_list(whole)).train_dataset
    assert prepared[0]["prompt_ids"] == [] and prepared[1001]["prompt_ids"] == [13]


def test_the_loss_weighs_as_a_plain_loop_does(tmp_path):
    """weights 1, 2, 3, 4 with the first left out, against sum(w * loss) / sum(w) written out."""
    rows = random_rows(4)
    given = [rows[0], *({**row, "pair_weight": number + 2.0} for number, row in enumerate(rows[1:]))]
    policy, reference = tiny_model(), tiny_model(seed=1)
    run = trainer(tmp_path, policy, given, ref_model=reference, max_steps=1)
    with torch.no_grad():
        delta = (naive_sequence_logps(policy, rows) - naive_sequence_logps(reference, rows)).view(2, -1)
    each = -torch.nn.functional.logsigmoid(0.1 * (delta[0] - delta[1]))
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    run.train()
    assert losses_of(run)[0] == pytest.approx(float((weights * each).sum() / weights.sum()), abs=1e-5)
