"""`dtype` of model_init_kwargs, under its older name too."""

import pytest
import torch
from tiny import random_rows, tiny_model, word_tokenizer
from trainer_runs import config

import fastdpo


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def loaded(saved, tmp_path, ref_model=None, **keywords):
    return fastdpo.DPOTrainer(
        saved, ref_model, args=config(tmp_path, model_init_kwargs=keywords or None), train_dataset=random_rows(4),
        processing_class=word_tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16", torch.bfloat16, "auto", "float16"], ids=str)
def test_honoured(saved, tmp_path, name, value):
    run = loaded(saved, tmp_path, saved, **{name: value})
    wanted = torch.float16 if value == "float16" else torch.bfloat16
    assert run.model.dtype == run.ref_model.dtype == wanted


def test_both_names(saved, tmp_path):
    assert loaded(saved, tmp_path, dtype="bfloat16", torch_dtype=torch.bfloat16).model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype='float32' and torch_dtype='bfloat16'"):
        loaded(saved, tmp_path, dtype="float32", torch_dtype="bfloat16")


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat17", "int8", -1, torch.int32], ids=str)
def test_no_dtype(saved, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"model_init_kwargs has {name}="):
        loaded(saved, tmp_path, **{name: value})


def test_float32_without_keywords(saved, tmp_path):
    assert loaded(saved, tmp_path).model.dtype == torch.float32
    assert loaded(saved, tmp_path, torch_dtype=None).model.dtype == torch.float32
