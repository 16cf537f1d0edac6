"""Values of a cache against the model, run plainly."""

import numpy as np
import pytest
import torch
from cache_contents import contents
from tiny import random_rows, tiny_model, word_tokenizer

from fastdpo.reference import ReferenceCache, model_fingerprint, precompute
from fastdpo.reference.recheck import recheck
from fastdpo.types import UserError


def moved(folder, into, model, change):
    """A cache with the contents of another, each value changed."""
    cache = ReferenceCache(into, model_fingerprint(model))
    cache.add({key: change(value) for key, value in contents(folder).items()})
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_values_agree_and_wrong_ones_do_not(tmp_path, dtype):
    model, rows = tiny_model().to(dtype), random_rows(40, seed=3)
    rows.append({"prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6, 7]})
    cache = precompute(model, rows, tmp_path / "c", progress=False)
    found = recheck(model, rows, cache, rows=100)
    assert found.agrees and found.sequences == 82 and (found.largest > 0) == (dtype == torch.float32)
    few = recheck(model, iter(rows), cache, rows=5)
    assert few.agrees and few.sequences == 10
    off = moved(tmp_path / "c", tmp_path / "off", model, lambda value: value - np.float32(0.4))
    found = recheck(model, rows, off, rows=100)
    assert not found.agrees and found.largest == pytest.approx(0.4, abs=0.1)


def test_one_wrong_row_is_named(tmp_path):
    model, rows = tiny_model(), random_rows(12, seed=4)
    precompute(model, rows, tmp_path / "c", progress=False)
    from fastdpo.reference.fingerprint import sequence_key

    wrong = sequence_key(rows[7]["prompt_ids"], rows[7]["rejected_ids"])
    values = contents(tmp_path / "c")
    cache = ReferenceCache(tmp_path / "d", model_fingerprint(model))
    cache.add({key: value * np.float32(1.01 if key == wrong else 1) for key, value in values.items()})
    found = recheck(model, rows, cache, rows=12)
    assert (found.agrees, found.row) == (False, 7)


def test_rows_of_text_and_autocast(tmp_path):
    model, tokenizer = tiny_model(), word_tokenizer()
    texts = [{"prompt": "why a b", "chosen": " yes c", "rejected": " no"}]
    options = {"tokenizer": tokenizer, "autocast_dtype": torch.bfloat16}
    cache = precompute(model, texts, tmp_path / "c", progress=False, **options)
    found = recheck(model, texts, cache, **options)
    assert found.agrees and found.tolerance == 0.05
    with pytest.raises(UserError, match="no row of this data set"):
        recheck(model, random_rows(3), cache, autocast_dtype=torch.bfloat16)
    with pytest.raises(UserError, match="wanted in float32"):
        recheck(model, texts, cache, tokenizer=tokenizer)
