"""The reference's log-probs of ranked lists and of single answers: computed once, and as columns of the rows."""

import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import naive_sequence_logps, random_rows, tiny_model, word_tokenizer, write_rows

import fastdpo
from fastdpo.cli import main
from fastdpo.data import tokenize_row
from fastdpo.packing import PreferenceCollator
from fastdpo.reference import (
    ReferenceCache,
    add_reference_columns,
    import_columns,
    model_fingerprint,
    precompute,
    reference_columns,
)
from fastdpo.types import DataError, UserError


def list_rows(count=6, seed=0, prompt=(1, 9), answer=(1, 8)):
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        size = draw.randint(2, 5)
        drawn = [random_rows(1, draw.random(), prompt, answer)[0] for _ in range(size)]
        completions = [row["chosen_ids"] for row in drawn]
        ranks = draw.sample(range(1, 20), size)
        rows.append({"prompt_ids": drawn[0]["prompt_ids"], "completions_ids": completions, "ranks": ranks})
    return rows


def answer_rows(count=6, seed=0):
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": number % 2 == 0}
        for number, row in enumerate(random_rows(count, seed))
    ]


def text_lists(count=4):
    words = ["a", "b", "c", "d"]
    return [
        {
            "prompt": f"why {words[i % 4]}",
            "completions": [" yes", " no no", f" hello {words[i % 3]}"],
            "ranks": [2, 3, 1],
        }
        for i in range(count)
    ]


def naive(model, prompt, completions, max_length=None):
    """Sums of the completions in the order in which they are given, each run alone, cut at the end."""
    kept = [(prompt, ids if max_length is None else ids[: max_length - len(prompt)]) for ids in completions]
    rows = [{"prompt_ids": prompt, "chosen_ids": ids, "rejected_ids": ids} for prompt, ids in kept]
    with torch.no_grad():
        return naive_sequence_logps(model, rows)[: len(rows)].tolist()


def expected_of(model, rows, **cut):
    """`reference_columns` of lists or answers."""
    if "completions_ids" in rows[0]:
        return [naive(model, row["prompt_ids"], row["completions_ids"], **cut) for row in rows]
    return [naive(model, row["prompt_ids"], [row["completion_ids"]], **cut)[0] for row in rows]


def flat(column):
    return [value for values in column for value in (values if isinstance(values, list) else [values])]


@pytest.mark.parametrize("packing", ["auto", "varlen", "padded"])
@pytest.mark.parametrize("rows", [list_rows(seed=1), answer_rows(seed=1)], ids=["lists", "answers"])
def test_columns_stand_in_the_order_of_the_rows(tmp_path, rows, packing):
    model = tiny_model()
    cache = precompute(model, rows, tmp_path / "c", packing=packing, progress=False)
    columns = reference_columns(cache, rows)
    exact = expected_of(model, rows)
    assert list(columns) == ["ref_logps"] and list(map(np.size, columns["ref_logps"])) == list(map(np.size, exact))
    assert flat(columns["ref_logps"]) == pytest.approx(flat(exact), rel=1e-5)
    assert reference_columns(cache, rows[::-1])["ref_logps"] == columns["ref_logps"][::-1]
    marked = add_reference_columns(cache, rows)
    assert marked == [{**row, "ref_logps": own} for row, own in zip(rows, columns["ref_logps"], strict=True)]
    assert "ref_logps" not in rows[0]


def test_a_batch_has_them_in_its_own_order(tmp_path):
    """From best to worst, as `sequence_logps` under the reference gives them."""
    model, rows = tiny_model(), list_rows(seed=2)
    rows = add_reference_columns(precompute(model, rows, tmp_path / "c", progress=False), rows)
    batch = PreferenceCollator()(rows)
    with torch.no_grad():
        torch.testing.assert_close(batch.ref_logps, fastdpo.sequence_logps(model, batch), rtol=1e-5, atol=1e-5)
    output = fastdpo.batch_loss(model, batch, loss_type="listwise")
    expected = np.mean([np.log(np.arange(2, len(row["ranks"]) + 1)).sum() for row in rows])
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    singles = answer_rows(seed=2)
    singles = add_reference_columns(precompute(model, singles, tmp_path / "c", progress=False), singles)
    output = fastdpo.batch_loss(model, PreferenceCollator(mismatched=False)(singles), loss_type="apo_zero_unpaired")
    assert output.loss.item() == pytest.approx(0.5, rel=1e-5)


def test_nothing_is_computed_twice(tmp_path, scored):
    """Not for rows in another order, other ranks, or the same completions as pairs and single answers."""
    model, rows = tiny_model(), list_rows(seed=3)
    count = sum(len(row["ranks"]) for row in rows)
    precompute(model, rows, tmp_path / "c", progress=False)
    assert sum(scored) == count
    again = [
        {**row, "ranks": row["ranks"][::-1], "completions_ids": row["completions_ids"][::-1]} for row in rows[::-1]
    ]
    cache = precompute(model, again, tmp_path / "c", progress=False)
    pairs = [
        {
            "prompt_ids": row["prompt_ids"],
            "chosen_ids": row["completions_ids"][0],
            "rejected_ids": row["completions_ids"][1],
        }
        for row in rows
    ]
    singles = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": ids, "label": True}
        for row in rows
        for ids in row["completions_ids"]
    ]
    for others in (pairs, singles):
        precompute(model, others, tmp_path / "c", progress=False)
    assert sum(scored) == count == len(cache)
    of_lists, of_pairs = reference_columns(cache, rows)["ref_logps"], reference_columns(cache, pairs)
    assert [[values[0], values[1]] for values in of_lists] == [
        list(both) for both in zip(*of_pairs.values(), strict=True)
    ]
    assert flat(of_lists) == reference_columns(cache, singles)["ref_logps"]
    precompute(model, [*rows, *list_rows(1, seed=30)], tmp_path / "c", progress=False)
    assert sum(scored) > count


def test_the_same_completion_or_row_twice(tmp_path, scored):
    model = tiny_model()
    row = {"prompt_ids": [5, 6], "completions_ids": [[7, 8], [9], [7, 8]]}
    cache = precompute(model, [row, row], tmp_path / "c", progress=False)
    assert sum(scored) == 2
    (first, second) = reference_columns(cache, [row, row])["ref_logps"]
    assert first == second and first[0] == first[2] != first[1]


@pytest.mark.parametrize("rows", [list_rows(seed=4), answer_rows(seed=4)], ids=["lists", "answers"])
def test_tables(tmp_path, rows):
    from datasets import Dataset, IterableDataset

    model, table = tiny_model(), Dataset.from_list(rows)
    cache = precompute(model, table, tmp_path / "c", progress=False)
    columns = reference_columns(cache, table)
    assert flat(columns["ref_logps"]) == pytest.approx(flat(expected_of(model, rows)), rel=1e-5)
    assert columns == reference_columns(cache, rows)
    with_columns = table.add_column("ref_logps", columns["ref_logps"])
    assert with_columns[:]["ref_logps"] == columns["ref_logps"]
    batch = PreferenceCollator(mismatched=False)(list(with_columns))
    assert batch.ref_logps.shape == (batch.num_sequences,)
    streamed = IterableDataset.from_generator(lambda: iter(rows))
    precompute(model, streamed, tmp_path / "s", progress=False)
    assert reference_columns(ReferenceCache(tmp_path / "s"), streamed) == columns


def test_a_table_in_which_some_rows_have_no_ranks(tmp_path):
    from datasets import Dataset

    rows = list_rows(seed=5)
    for row in rows[::2]:
        del row["ranks"]
    model, table = tiny_model(), Dataset.from_list(rows)
    columns = reference_columns(precompute(model, table, tmp_path / "c", progress=False), table)
    assert flat(columns["ref_logps"]) == pytest.approx(flat(expected_of(model, rows)), rel=1e-5)


def test_arrays(tmp_path):
    rows = [
        {
            "prompt_ids": np.array(row["prompt_ids"], np.int32),
            "completions_ids": [np.array(ids, np.uint16) for ids in row["completions_ids"]],
            "ranks": np.array(row["ranks"]),
        }
        for row in list_rows(seed=6)
    ]
    rows.append({"prompt_ids": [4], "completions_ids": np.array([[7, 8], [9, 10]])})
    model = tiny_model()
    columns = reference_columns(precompute(model, rows, tmp_path / "c", progress=False), rows)
    plain = [{**row, "completions_ids": [list(map(int, ids)) for ids in row["completions_ids"]]} for row in rows]
    plain = [{**row, "prompt_ids": list(map(int, row["prompt_ids"]))} for row in plain]
    assert flat(columns["ref_logps"]) == pytest.approx(flat(expected_of(model, plain)), rel=1e-5)


def test_text(tmp_path):
    model, tokenizer, rows = tiny_model(), word_tokenizer(), text_lists()
    cache = precompute(model, rows, tmp_path / "c", tokenizer=tokenizer, progress=False)
    columns = reference_columns(cache, rows, tokenizer=tokenizer)
    ids = [tokenize_row(row, tokenizer) for row in rows]
    assert columns == reference_columns(cache, ids)
    assert flat(columns["ref_logps"]) == pytest.approx(flat(expected_of(model, ids)), rel=1e-5)
    singles = [
        {"prompt": "why a", "completion": " yes", "label": True},
        {"prompt": "why b", "completion": " no", "label": False},
    ]
    cache = precompute(model, singles, tmp_path / "c", tokenizer=tokenizer, progress=False)
    ids = [tokenize_row(row, tokenizer) for row in singles]
    marked = add_reference_columns(cache, singles, tokenizer=tokenizer)
    assert [row["ref_logps"] for row in marked] == pytest.approx(expected_of(model, ids), rel=1e-5)
    with pytest.raises(DataError, match="it holds text, not token ids; pass the tokenizer"):
        precompute(model, rows, tmp_path / "c", progress=False)


@pytest.mark.parametrize("rows", [list_rows(seed=7, prompt=(1, 4)), answer_rows(seed=7)], ids=["lists", "answers"])
def test_truncation(tmp_path, rows):
    model = tiny_model()
    rows = [row for row in rows if len(row["prompt_ids"]) < 6]
    cache = precompute(model, rows, tmp_path / "c", max_length=6, progress=False)
    columns = reference_columns(cache, rows, max_length=6)
    assert flat(columns["ref_logps"]) == pytest.approx(flat(expected_of(model, rows, max_length=6)), rel=1e-5)
    with pytest.raises(UserError, match="lacks"):
        reference_columns(cache, rows)


def test_no_prompt_and_answers_of_one_token(tmp_path):
    model = tiny_model()
    rows = [{"prompt_ids": [], "completions_ids": [[7], [8, 9], [8]]}]
    cache = precompute(model, rows, tmp_path / "c", progress=False)
    ((one, two, three),) = reference_columns(cache, rows)["ref_logps"]
    assert one == three == 0.0 and two == pytest.approx(naive(model, [], [[8, 9]])[0], rel=1e-5)


def test_no_rows(tmp_path):
    cache = ReferenceCache(tmp_path / "c", model_fingerprint(tiny_model()))
    assert add_reference_columns(cache, []) == []


# What is refused


def test_rows_of_several_kinds(tmp_path):
    model, pairs, lists, answers = tiny_model(), random_rows(2), list_rows(2), answer_rows(2)
    cache = precompute(model, [*pairs, *lists, *answers], tmp_path / "c", progress=False)  # its rows may be any
    for rows, told in (([*lists, *pairs], "pairs"), ([*pairs, *lists], "lists"), ([*lists, *answers], "answers")):
        with pytest.raises(DataError, match=rf"row 2 of the data set \(counted from 0\) is one of {told}"):
            reference_columns(cache, rows)


@pytest.mark.parametrize("rows", [list_rows(2), answer_rows(2)], ids=["lists", "answers"])
def test_length_desensitization_is_for_pairs(tmp_path, rows):
    cache = precompute(tiny_model(), rows, tmp_path / "c", progress=False)
    with pytest.raises(UserError, match=r"ld_alpha=0.5 compares the two answers of a pair, and the rows are"):
        reference_columns(cache, rows, ld_alpha=0.5)


@pytest.mark.parametrize("rows", [list_rows(2), answer_rows(2)], ids=["lists", "answers"])
def test_columns_are_imported_of_pairs_only(tmp_path, rows):
    marked = add_reference_columns(precompute(tiny_model(), rows, tmp_path / "c", progress=False), rows)
    cache = ReferenceCache(tmp_path / "d", model_fingerprint(tiny_model()), per_token=False)
    with pytest.raises(UserError, match="columns are taken from pairs only"):
        import_columns(cache, marked)


LIST = {"prompt_ids": [5, 6], "completions_ids": [[7, 8], [9]]}


@pytest.mark.parametrize(
    "row, message",
    [
        ({**LIST, "completions_ids": [[7]]}, "at least two completions, and there are 1"),
        ({**LIST, "ranks": [1, 1]}, "no two may be alike"),
        ({**LIST, "ranks": [1]}, "there are 1 ranks for 2 completions"),
        ({**LIST, "prompt_ids": None}, "the field 'prompt_ids' is missing; tokenized rows need"),
        ({**LIST, "completions_ids": [[7], ["a"]]}, "'completions_ids' must be a list of token ids"),
        ({**LIST, "completions_ids": [[7], [97]]}, "'completions_ids' holds the id 97, and the model knows 97 tokens"),
        ({**LIST, "completions_ids": [[7], [-1]]}, "'completions_ids' holds the id -1"),
        ({**LIST, "completions_ids": [[7], [5] * 300]}, "has 302 tokens, and the model has 256 positions"),
        ({"prompt_ids": [5], "completion_ids": [1.5], "label": True}, "'completion_ids' must be a list of token ids"),
        ({"completion_ids": [5], "label": True}, "the field 'prompt_ids' is missing"),
        ({**LIST, "ranks": 1}, "rank"),
        ({**LIST, "completions_ids": 5}, "completions_ids"),
        ({**LIST, "completions_ids": [7, 8]}, "'completions_ids' must be a list"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"row 1 of the data set \(counted from 0\).*{message}"):
        precompute(tiny_model(), [LIST, row], tmp_path / "c", progress=False)


def test_a_table_that_has_columns_of_another_kind_without_values(tmp_path):
    """Two tables joined: what is None is not there."""
    model, pairs = tiny_model(), random_rows(2)
    rows = [{**row, "completions_ids": None, "ranks": None, "completion_ids": None} for row in pairs]
    cache = precompute(model, pairs, tmp_path / "c", progress=False)
    assert reference_columns(cache, rows) == reference_columns(cache, pairs)


# The command


@pytest.fixture
def run(model_folder, tmp_path, capsys):
    """Runs `fastdpo precompute` on rows or a file; exit code, stdout and stderr."""

    def command(rows, *arguments):
        file = str(rows) if isinstance(rows, Path) else write_rows(tmp_path / "rows.jsonl", rows)
        words = ["--model", model_folder, "--dataset", file, "--output", str(tmp_path / "c"), *arguments]
        capsys.readouterr()
        try:
            code = main(["precompute", *words])
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return code, capsys.readouterr()

    return command


@pytest.mark.parametrize("kind", ["text lists", "lists", "answers"])
def test_the_command(tmp_path, run, kind):
    rows = {"text lists": text_lists(), "lists": list_rows(seed=8), "answers": answer_rows(seed=8)}[kind]
    code, said = run(rows, "--columns", str(tmp_path / "out.jsonl"))
    assert not code, said.err
    count = sum(len(row.get("completions_ids", row.get("completions", [0]))) for row in rows)
    cache = ReferenceCache(tmp_path / "c")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    columns = reference_columns(cache, rows, tokenizer=word_tokenizer())
    assert written == [{**row, "ref_logps": own} for row, own in zip(rows, columns["ref_logps"], strict=True)]
    ids = [tokenize_row(row, word_tokenizer()) for row in rows]
    assert flat(columns["ref_logps"]) == pytest.approx(flat(expected_of(tiny_model(), ids)), rel=1e-4)
    code, said = run(rows)
    assert not code and f"{len(cache):,} found, 0 computed" in said.out and len(cache) <= count


def test_the_command_names_the_row_that_cannot_be_used(run):
    code, said = run([*list_rows(2), {**LIST, "ranks": [1, 1]}])
    assert code == 2 and "row 3: the ranks are [1, 1], and no two may be alike" in said.err


def test_the_command_on_a_table(tmp_path, run):
    from datasets import Dataset

    Dataset.from_list(list_rows(seed=9)).to_parquet(tmp_path / "rows.parquet")
    code, said = run(tmp_path / "rows.parquet")
    assert not code, said.err
