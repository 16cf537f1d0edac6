"""Ranked lists and single answers: what a row must hold, and its token ids."""

import json

import numpy as np
import pytest
from tiny import word_tokenizer, write_rows

from fastdpo.data import read_rows, tokenize_row, validate_rows
from fastdpo.data.validate import data_of, is_tokenized, row_problem
from fastdpo.packing import PreferenceCollator
from fastdpo.types import DataError, UserError


def chat(role, content):
    return {"role": role, "content": content}


def said(content):
    return [chat("assistant", content)]


LIST = {"prompt": "why a", "completions": [" yes", " no no", " hello"], "ranks": [2, 1, 3]}
ANSWER = {"prompt": "why a", "completion": " yes b", "label": False}
CHAT_LIST = {**LIST, "prompt": [chat("user", "why")], "completions": [said("yes"), said("no no"), said("hello")]}
CHAT_ANSWER = {**ANSWER, "prompt": [chat("user", "why")], "completion": said("yes b")}
ID_LIST = {"prompt_ids": [5, 6], "completions_ids": [[7, 8], [9], [10]], "ranks": [2, 1, 3]}
ID_ANSWER = {"prompt_ids": [5, 6], "completion_ids": [7, 8], "label": True}


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


# What a row must hold


@pytest.mark.parametrize(
    "row, data, token_ids",
    [
        (LIST, "lists", False),
        (ANSWER, "answers", False),
        (CHAT_LIST, "lists", False),
        (CHAT_ANSWER, "answers", False),
        (ID_LIST, "lists", True),
        (ID_ANSWER, "answers", True),
        (without(LIST, "ranks"), "lists", False),
        ({**LIST, "ranks": None}, "lists", False),
        ({**LIST, "ranks": (0.5, -1, 1e9)}, "lists", False),
        ({**LIST, "completions": tuple(LIST["completions"])}, "lists", False),
        ({**CHAT_LIST, "completions": [said("yes"), [{**said("")[0], "tool_calls": [{"name": "f"}]}], said("no")]},
         "lists", False),
        ({**ANSWER, "label": np.bool_(True)}, "answers", False),
        ({**ID_LIST, "prompt_ids": []}, "lists", True),
        ({**ID_LIST, "completions_ids": (np.array([7]), (8, 9), [3]), "ranks": np.array([3, 1, 2])}, "lists", True),
        ({**ID_ANSWER, "prompt_ids": np.array([1, 2], np.uint16), "completion_ids": (1,)}, "answers", True),
        ({**LIST, "pair_weight": 0.5, "tools": None, "extra": 1}, "lists", False),
    ],
)  # fmt: skip
def test_rows_that_can_be_used(row, data, token_ids):
    assert row_problem(row) is None
    assert (data_of(row), is_tokenized(row)) == (data, token_ids)
    validate_rows([row], ["here"])


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({**LIST, "completions": None}, "'completions' is NoneType; it must be a list of answers."),
        ({**LIST, "completions": "yes"}, "'completions' is str; it must be a list of answers."),
        ({**LIST, "completions": {"a": "yes"}}, "'completions' is dict; it must be a list of answers."),
        (without(LIST, "prompt"), "the field 'prompt' is missing; add it."),
        ({**LIST, "prompt": None}, "the field 'prompt' is missing; add it."),
        ({**LIST, "prompt": " \n"}, "'prompt' is empty; write the question or remove the row."),
        ({**LIST, "completions": [" yes"], "ranks": [1]},
         "a ranking needs at least two completions, and there are 1; add some or remove the row."),
        ({**LIST, "completions": [], "ranks": []},
         "a ranking needs at least two completions, and there are 0; add some or remove the row."),
        ({**LIST, "ranks": [1, 2]}, "there are 2 ranks for 3 completions; give each completion one."),
        ({**LIST, "ranks": [1, 2, 2]},
         "the ranks are [1, 2, 2], and no two may be alike; leave one completion of a tie out."),
        ({**LIST, "ranks": [1, 2, "3"]}, "the ranks are [1, 2, '3']; they must be numbers, the smallest for the best."),
        ({**LIST, "ranks": [1, 2, None]},
         "the ranks are [1, 2, None]; they must be numbers, the smallest for the best."),
        ({**LIST, "ranks": [True, False, 3]},
         "the ranks are [True, False, 3]; they must be numbers, the smallest for the best."),
        ({**LIST, "ranks": [1, 2, float("nan")]},
         "the ranks are [1, 2, nan]; they must be numbers, the smallest for the best."),
        ({**LIST, "completions": [" yes", 3, " no"]},
         "'completions[1]' is int; it must be text, or a list of messages {\"role\": ..., \"content\": ...}."),
        ({**LIST, "completions": [" yes", None, " no"]},
         "'completions[1]' is NoneType; it must be text, or a list of messages {\"role\": ..., \"content\": ...}."),
        ({**CHAT_LIST, "completions": [said("yes"), chat("assistant", "no"), said("b")]},
         "'completions[1]' is dict; it must be text, or a list of messages {\"role\": ..., \"content\": ...}."),
        ({**LIST, "completions": [" yes", said("no"), " b"]},
         "some fields are text and some are messages (prompt: text, completions[0]: text, completions[1]: messages, "
         "completions[2]: text); write all of them in one way."),
        ({**LIST, "completions": [" yes", "\t", " no"]}, "completions[1] is empty; write an answer or leave it out."),
        ({**CHAT_LIST, "completions": [said("yes"), [], said("b")]},
         "completions[1] is empty; write an answer or leave it out."),
        ({**CHAT_LIST, "completions": [said("yes"), said(" "), said("b")]},
         "completions[1] is empty; write an answer or leave it out."),
        ({**LIST, "completions": [" yes", " no", " yes"]},
         "completions[2] stands in the list before, too, so the two cannot be ranked; leave one out."),
        ({**CHAT_LIST, "completions": [said("yes"), said("yes"), said("b")]},
         "completions[1] stands in the list before, too, so the two cannot be ranked; leave one out."),
        (without(ANSWER, "prompt"),
         "the field 'prompt' is missing (found: completion, label); add it or remove the row."),
        ({**ANSWER, "completion": None},
         "the field 'completion' is missing (found: prompt, completion, label); add it or remove the row."),
        ({**ANSWER, "completion": 3},
         "'completion' is int; it must be text, or a list of messages {\"role\": ..., \"content\": ...}."),
        ({**ANSWER, "completion": said("yes")},
         "some fields are text and some are messages (prompt: text, completion: messages); write all of them in one "
         "way."),
        ({**ANSWER, "completion": " "}, "'completion' is empty; write an answer or remove the row."),
        ({**CHAT_ANSWER, "completion": []}, "'completion' is empty; write an answer or remove the row."),
        ({**ANSWER, "prompt": ""}, "'prompt' is empty; write the question or remove the row."),
        ({**ANSWER, "label": 1}, "'label' is 1; it must be true (a desirable answer) or false."),
        ({**ANSWER, "label": "true"}, "'label' is 'true'; it must be true (a desirable answer) or false."),
        (without(ANSWER, "label"), "'label' is None; it must be true (a desirable answer) or false."),
        (without(ID_LIST, "prompt_ids"),
         "the field 'prompt_ids' is missing; tokenized rows need prompt_ids, completions_ids."),
        ({**ID_LIST, "completions_ids": None},
         "the field 'completions_ids' is missing; tokenized rows need prompt_ids, completions_ids."),
        ({**ID_LIST, "completions_ids": [7, 8, 9]},
         "'completions_ids' must be a list of lists of token ids (integers from 0)."),
        ({**ID_LIST, "completions_ids": 7},
         "'completions_ids' must be a list of lists of token ids (integers from 0)."),
        ({**ID_LIST, "completions_ids": [[7], [-1], [3]]},
         "'completions_ids' must be a list of lists of token ids (integers from 0)."),
        ({**ID_LIST, "completions_ids": [[7], np.array([0.5]), [3]]},
         "'completions_ids' must be a list of lists of token ids (integers from 0)."),
        ({**ID_LIST, "completions_ids": [[7], [], [3]]},
         "'completions_ids' is empty; write an answer or remove the row."),
        ({**ID_LIST, "completions_ids": [[7]], "ranks": [1]},
         "a ranking needs at least two completions, and there are 1; add some or remove the row."),
        ({**ID_LIST, "completions_ids": []},
         "a ranking needs at least two completions, and there are 0; add some or remove the row."),
        ({**ID_LIST, "ranks": [1, 1, 2]},
         "the ranks are [1, 1, 2], and no two may be alike; leave one completion of a tie out."),
        (without(ID_ANSWER, "prompt_ids"),
         "the field 'prompt_ids' is missing; tokenized rows need prompt_ids, completion_ids."),
        ({**ID_ANSWER, "completion_ids": []}, "'completion_ids' is empty; write an answer or remove the row."),
        ({**ID_ANSWER, "completion_ids": ["a"]}, "'completion_ids' must be a list of token ids (integers from 0)."),
        ({**ID_ANSWER, "completion_ids": [[7]]}, "'completion_ids' must be a list of token ids (integers from 0)."),
        ({**ID_ANSWER, "label": 0}, "'label' is 0; it must be true (a desirable answer) or false."),
        (without(ID_ANSWER, "label"), "'label' is None; it must be true (a desirable answer) or false."),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(row, sentence):
    assert row_problem(row) == sentence
    with pytest.raises(DataError) as raised:
        validate_rows([ID_LIST, row, ID_ANSWER, row], ["a", "b", "c", "d"])
    assert str(raised.value) == f"b: {sentence} (1 more rows cannot be used, either.)"


@pytest.mark.parametrize("row", [LIST, ID_LIST])
@pytest.mark.parametrize("ranks", [3, 0.5, True])
def test_ranks_that_are_no_list(row, ranks):
    assert "rank" in row_problem({**row, "ranks": ranks})


def test_the_same_completion_twice_in_token_ids():
    assert "cannot be ranked" in row_problem({**ID_LIST, "completions_ids": [[7, 8], [9], [7, 8]]})


def test_completions_of_equal_lengths_may_come_as_one_array():
    assert row_problem({**ID_LIST, "completions_ids": np.array([[7, 8], [9, 4], [3, 5]])}) is None


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "x", [1.0]])
def test_weights_that_are_no_weights(weight):
    for row in (LIST, ANSWER, ID_LIST, ID_ANSWER, {"prompt": "a", "chosen": "b", "rejected": "c"}):
        assert "pair_weight" in str(row_problem({**row, "pair_weight": weight}))


# Token ids


def words(tokenizer, value):
    """Token ids, or lists of them, as words."""
    if value and isinstance(value[0], list):
        return [words(tokenizer, ids) for ids in value]
    return tokenizer.convert_ids_to_tokens(value)


def test_plain_text_lists():
    tokenizer = word_tokenizer()
    row = {**LIST, "completions": [" yes", " no no </s>", " hello"], "pair_weight": 0.5, "extra": "x"}
    tokens = tokenize_row(row, tokenizer)
    assert words(tokenizer, tokens.pop("prompt_ids")) == ["why", "a"]
    assert words(tokenizer, tokens.pop("completions_ids")) == [["yes", "</s>"], ["no", "no", "</s>"], ["hello", "</s>"]]
    assert tokens == {"ranks": [2, 1, 3], "pair_weight": 0.5}
    assert set(tokenize_row(without(LIST, "ranks"), tokenizer)) == {"prompt_ids", "completions_ids"}


def test_plain_text_answers():
    tokenizer = word_tokenizer()
    tokens = tokenize_row({**ANSWER, "pair_weight": 0, "ranks": None}, tokenizer)
    assert words(tokenizer, tokens.pop("prompt_ids")) == ["why", "a"]
    assert words(tokenizer, tokens.pop("completion_ids")) == ["yes", "b", "</s>"]
    assert tokens == {"label": False, "pair_weight": 0}


def test_messages_through_a_chat_template():
    tokenizer = word_tokenizer(chat=True)
    tokens = tokenize_row(CHAT_LIST, tokenizer)
    assert words(tokenizer, tokens["prompt_ids"]) == ["user", ":", "why", "</s>", "assistant", ":"]
    assert words(tokenizer, tokens["completions_ids"]) == [["yes", "</s>"], ["no", "no", "</s>"], ["hello", "</s>"]]
    assert tokens["ranks"] == [2, 1, 3]
    tokens = tokenize_row(CHAT_ANSWER, tokenizer)
    assert words(tokenizer, tokens["prompt_ids"]) == ["user", ":", "why", "</s>", "assistant", ":"]
    assert words(tokenizer, tokens["completion_ids"]) == ["yes", "b", "</s>"] and tokens["label"] is False
    long = [said("yes"), [*said("a"), chat("user", "why"), *said("b")], said("no")]
    tokens = tokenize_row({**CHAT_LIST, "completions": long}, tokenizer)
    assert len(words(tokenizer, tokens["completions_ids"])[1]) == 2 + 4 + 4


@pytest.mark.parametrize("row", [CHAT_LIST, CHAT_ANSWER])
def test_options_of_the_template_and_its_absence(row):
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = "{{ mood ~ ' ' }}" + tokenizer.chat_template
    tokens = tokenize_row({**row, "chat_template_kwargs": {"mood": "hello"}}, tokenizer)
    assert words(tokenizer, tokens["prompt_ids"])[0] == "hello"
    with pytest.raises(UserError, match="no chat template"):
        tokenize_row(row, word_tokenizer())


def test_a_template_that_renders_the_prompt_differently_alone():
    """The prompt is what the prompt alone and all the whole conversations begin with."""
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant : '", "'assistant : hello '")
    tokens = tokenize_row(CHAT_LIST, tokenizer)
    assert words(tokenizer, tokens["prompt_ids"]) == ["user", ":", "why", "</s>", "assistant", ":"]
    # Where one answer goes on as the prompt alone did, it keeps that token: the prompt must be the same for all.
    assert words(tokenizer, tokens["completions_ids"]) == [["yes", "</s>"], ["no", "no", "</s>"], ["hello", "</s>"]]


def test_tokens_that_merge_across_the_border_belong_to_all_answers():
    tokenizer = word_tokenizer()  # words: "a" + "yes" without a space is one unknown word
    tokens = tokenize_row({**LIST, "completions": ["yes", " no", " hello"]}, tokenizer)
    assert words(tokenizer, tokens["prompt_ids"]) == ["why"]
    assert words(tokenizer, tokens["completions_ids"]) == [
        ["<unk>", "</s>"],
        ["a", "no", "</s>"],
        ["a", "hello", "</s>"],
    ]


def test_a_prompt_of_which_no_token_is_left():
    tokenizer = word_tokenizer()
    tokens = tokenize_row({**LIST, "prompt": "a", "completions": ["yes", " no", " b"]}, tokenizer)
    assert tokens["prompt_ids"] == []
    assert words(tokenizer, tokens["completions_ids"]) == [["<unk>", "</s>"], ["a", "no", "</s>"], ["a", "b", "</s>"]]
    batch = PreferenceCollator()([tokens])
    assert batch.tokens_per_pair == (1 + 2 + 2,)  # nothing predicts the very first


def test_token_ids_pass_through_as_lists():
    row = {"prompt_ids": (5, 6), "completions_ids": (np.array([7, 8]), (9,), [10]), "ranks": (2, 1, 3), "extra": 1}
    tokens = tokenize_row(row, None)
    assert json.dumps(tokens, default=int) == json.dumps({**ID_LIST, "ranks": [2, 1, 3]})
    assert tokenize_row({**ID_ANSWER, "extra": 1, "pair_weight": 2}, None) == {**ID_ANSWER, "pair_weight": 2}
    square = tokenize_row({**ID_LIST, "completions_ids": np.array([[7, 8], [9, 4]]), "ranks": None}, None)
    assert square == {"prompt_ids": [5, 6], "completions_ids": [[7, 8], [9, 4]]}


def test_a_pair_keeps_its_weight_and_nothing_of_other_kinds():
    row = {"prompt": "why a", "chosen": " yes", "rejected": " no", "pair_weight": 0.5, "label": "x", "ranks": "y"}
    assert set(tokenize_row(row, word_tokenizer())) == {"prompt_ids", "chosen_ids", "rejected_ids", "pair_weight"}


# Files


@pytest.mark.parametrize("rows", [[LIST, CHAT_LIST], [ANSWER, CHAT_ANSWER], [ID_LIST, without(ID_LIST, "ranks")]])
def test_json_files(tmp_path, rows):
    assert read_rows(write_rows(tmp_path / "a.jsonl", rows))[0] == rows
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert read_rows(tmp_path / "a.json")[0] == rows
    path = write_rows(tmp_path / "b.jsonl", [*rows, {**LIST, "ranks": [1, 1, 2]}])
    read, places = read_rows(path)
    with pytest.raises(DataError, match=r"row 3: the ranks are \[1, 1, 2\], and no two may be alike"):
        validate_rows(read, places)


@pytest.mark.parametrize("row", [LIST, ANSWER, ID_LIST, ID_ANSWER])
def test_tables(tmp_path, row):
    from datasets import Dataset

    Dataset.from_list([row, row]).to_parquet(tmp_path / "a.parquet")
    rows, places = read_rows(tmp_path / "a.parquet")
    validate_rows(rows, places)
    assert rows == [row, row]
