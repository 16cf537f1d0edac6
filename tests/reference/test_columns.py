"""Sums of log-probs as columns of a data set, out of a cache and into one."""

import pytest
import torch
from tiny import naive_sequence_logps, random_rows, tiny_model, word_tokenizer

from fastdpo.reference import ReferenceCache, import_columns, model_fingerprint, precompute, reference_columns
from fastdpo.reference.fingerprint import sequence_key
from fastdpo.types import UserError


def with_columns(rows, columns):
    return [{**row, **dict(zip(columns, sums, strict=True))}
            for row, *sums in zip(rows, *columns.values(), strict=True)]  # fmt: skip


def test_columns_of_rows_that_the_cache_lacks(tmp_path):
    model, rows = tiny_model(), random_rows(4, seed=2)
    cache = precompute(model, rows[:3], tmp_path / "c", progress=False)
    with pytest.raises(UserError, match="lacks 2 of 8 sequences; compute them"):
        reference_columns(cache, rows)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_length_desensitization_needs_nothing_new(tmp_path, alpha):
    model, rows = tiny_model(), random_rows(30, seed=3)
    rows[4]["rejected_ids"] = [*rows[4]["chosen_ids"][:1], 9]
    cache = precompute(model, rows, tmp_path / "c", progress=False)
    columns = reference_columns(cache, rows, ld_alpha=alpha)
    for number, row in enumerate(rows):
        shorter = min(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for side in ("chosen", "rejected"):
            logps = cache[sequence_key(row["prompt_ids"], row[f"{side}_ids"])].astype("float64")
            exact = logps[:shorter].sum() + alpha * logps[shorter:].sum()
            assert columns[f"ref_{side}_logps"][number] == pytest.approx(exact, rel=1e-9)
    assert (columns == reference_columns(cache, rows)) == (alpha == 1.0)
    sums = precompute(model, rows, tmp_path / "sums", per_token=False, progress=False)
    if alpha < 1:
        with pytest.raises(UserError, match="keeps only the sums"):
            reference_columns(sums, rows, ld_alpha=alpha)


def test_there_and_back(tmp_path):
    model, rows = tiny_model(), random_rows(8, seed=4)
    columns = reference_columns(precompute(model, rows, tmp_path / "a", progress=False), rows)
    cache = ReferenceCache(tmp_path / "b", model_fingerprint(model), per_token=False)
    marked = with_columns(rows, columns)
    assert import_columns(cache, [*marked, marked[0]]) == 16
    assert import_columns(cache, marked) == 0
    again = ReferenceCache(tmp_path / "b")
    assert len(again) == 16 and reference_columns(again, rows[::-1]) == {k: v[::-1] for k, v in columns.items()}
    _, _, tokens = again.lookup([sequence_key(row["prompt_ids"], row["chosen_ids"]) for row in rows])
    assert tokens.tolist() == [len(row["chosen_ids"]) for row in rows]
    with pytest.raises(UserError, match="each token"):
        import_columns(ReferenceCache(tmp_path / "a"), with_columns(random_rows(8, seed=5), columns))


def test_columns_of_a_table_and_of_text(tmp_path):
    from datasets import Dataset

    model, rows = tiny_model(), random_rows(8, seed=4)
    columns = reference_columns(precompute(model, rows, tmp_path / "a", progress=False), rows)
    table = Dataset.from_list(rows)
    for name, values in columns.items():
        table = table.add_column(name, values)
    cache = ReferenceCache(tmp_path / "b", model_fingerprint(model), per_token=False)
    assert import_columns(cache, table) == 16 and reference_columns(cache, table) == columns
    text = {"prompt": "why a", "chosen": " yes", "rejected": " no", "ref_chosen_logps": -1.5, "ref_rejected_logps": -2}
    assert import_columns(cache, [text], tokenizer=word_tokenizer()) == 2
    assert reference_columns(cache, [text], tokenizer=word_tokenizer()) == {
        "ref_chosen_logps": [-1.5], "ref_rejected_logps": [-2.0],
    }  # fmt: skip


@pytest.mark.parametrize("value", [None, "x", float("nan"), float("-inf")])
def test_what_is_no_sum_is_refused(tmp_path, value):
    rows = [dict(row, ref_chosen_logps=-1.0, ref_rejected_logps=-2.0) for row in random_rows(3)]
    rows[2]["ref_rejected_logps"] = value
    cache = ReferenceCache(tmp_path / "c", model_fingerprint(tiny_model()), per_token=False)
    with pytest.raises(UserError, match=r"row 2 of the data set \(counted from 0\): 'ref_rejected_logps' is"):
        import_columns(cache, rows)
    assert not len(cache)


def test_sums_are_those_of_an_online_reference(tmp_path):
    """Float32, 500 tokens an answer: 1e-5 of the sum, whichever pass it ran in."""
    from fastdpo import PreferenceCollator, sequence_logps

    model = tiny_model(max_position_embeddings=1024)
    rows = random_rows(6, seed=6, prompt=(50, 300), answer=(500, 500))
    cache = precompute(model, rows, tmp_path / "c", progress=False)
    cached = torch.tensor([*reference_columns(cache, rows).values()], dtype=torch.float64).view(-1)
    with torch.no_grad():
        online = sequence_logps(model, PreferenceCollator(packing="padded")(rows)).double()
    exact = naive_sequence_logps(model.double(), rows)
    assert ((cached - online) / exact).abs().max() < 1e-5
    assert ((cached - exact) / exact).abs().max() < 2e-6
