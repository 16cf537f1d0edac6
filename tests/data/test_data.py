"""Reading, checking and tokenizing rows."""

import json

import pytest
from tiny import word_tokenizer

from fastdpo.data import read_rows, tokenize_row
from fastdpo.data.validate import row_problem
from fastdpo.types import DataError, UserError

GOOD = {"prompt": "a b", "chosen": "yes", "rejected": "no"}


def chat(role, content):
    return {"role": role, "content": content}


CHAT = {"prompt": [chat("user", "why")], "chosen": [chat("assistant", "yes")], "rejected": [chat("assistant", "no")]}


def test_json_lines_and_json(tmp_path):
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("\ufeff" + json.dumps(GOOD) + "\n\n" + json.dumps(CHAT) + "\r\n", encoding="utf-8")
    array.write_text(json.dumps([GOOD, CHAT]))
    rows, places = read_rows(lines)
    assert rows == read_rows(array)[0] == [GOOD, CHAT]
    assert places == [f"{lines}, row 1", f"{lines}, row 2 (line 3)"]


def test_line_separators_inside_a_text_do_not_split_the_row(tmp_path):
    row = {**GOOD, "chosen": "yes\u2028and \x85 no"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path)[0] == [row]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.jsonl", None, "there is no such file"),
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", '{"prompt": 1}\n{"prompt": ', r"a.jsonl, row 2: this is no JSON"),
        ("a.jsonl", "[1, 2]", "row 1: this is a JSON list"),
        ("a.json", '{"prompt": 1}', "one array of objects"),
        ("a.json", "[1, ", "a.json, line 1: this is no JSON"),
        ("a.jsonl", b"\xff\xfe\x00", "is not UTF-8"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_rows(path)


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        CHAT,
        {"chosen": CHAT["prompt"] + CHAT["chosen"], "rejected": CHAT["prompt"] + CHAT["rejected"]},
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]},
        {**CHAT, "chosen": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
    ],
)
def test_good_rows(row):
    assert row_problem(row) is None


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "rejected": "no"}, "'chosen' is missing"),
        ({"prompt": "a", "chosen": "yes", "rejected": None}, "'rejected' is missing"),
        ({"chosen": "yes", "rejected": "no"}, "share no beginning to take it from; add 'prompt'"),
        ({"chosen": "why yes", "rejected": "why yes no"}, "the beginning of the other"),
        ({**GOOD, "chosen": "  \n"}, "'chosen' is empty"),
        ({**GOOD, "prompt": ""}, "'prompt' is empty"),
        ({**GOOD, "rejected": "yes"}, "are the same"),
        ({**GOOD, "chosen": 3}, "'chosen' is int"),
        ({**GOOD, "chosen": CHAT["chosen"]}, "some fields are text and some are messages"),
        ({**CHAT, "chosen": []}, "'chosen' is empty"),
        ({**CHAT, "rejected": [chat("assistant", " ")]}, "'rejected' is empty"),
        ({**CHAT, "rejected": CHAT["chosen"]}, "are the same"),
        ({**CHAT, "chosen": [{"text": "yes"}]}, "'chosen' is list"),
        ({"chosen": [chat("user", "a")], "rejected": [chat("user", "b")]}, "share no first message"),
        ({"chosen": CHAT["prompt"], "rejected": CHAT["prompt"] + CHAT["rejected"]}, "beginning of the other"),
        ({"prompt_ids": [1], "chosen_ids": [2]}, "'rejected_ids' is missing"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []}, "'rejected_ids' is empty"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}, "are the same"),
        ({"prompt_ids": ["a"], "chosen_ids": [2], "rejected_ids": [3]}, "list of token ids"),
    ],
)
def test_bad_rows(row, message):
    assert message in row_problem(row)


def decode(tokenizer, tokens):
    return {name: tokenizer.convert_ids_to_tokens(ids) for name, ids in tokens.items()}


def test_plain_text_ends_with_the_end_token_once():
    tokenizer = word_tokenizer()
    row = {"prompt": "a b", "chosen": " yes", "rejected": " no </s>"}
    assert decode(tokenizer, tokenize_row(row, tokenizer)) == {
        "prompt_ids": ["a", "b"],
        "chosen_ids": ["yes", "</s>"],
        "rejected_ids": ["no", "</s>"],
    }


def test_tokens_that_merge_across_the_border_belong_to_the_answer():
    tokenizer = word_tokenizer()  # words: "b" + "yes" without a space is one unknown word
    row = {"prompt": "a b", "chosen": "yes", "rejected": "no"}
    assert decode(tokenizer, tokenize_row(row, tokenizer)) == {
        "prompt_ids": ["a"],
        "chosen_ids": ["<unk>", "</s>"],
        "rejected_ids": ["<unk>", "</s>"],
    }


@pytest.mark.parametrize("implicit", [False, True])
def test_chat(implicit):
    tokenizer = word_tokenizer(chat=True)
    row = CHAT
    if implicit:
        row = {side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}
    assert decode(tokenizer, tokenize_row(row, tokenizer)) == {
        "prompt_ids": ["user", ":", "why", "</s>", "assistant", ":"],
        "chosen_ids": ["yes", "</s>"],
        "rejected_ids": ["no", "</s>"],
    }


def test_a_template_that_renders_the_prompt_differently_alone():
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant : '", "'assistant : hello '")
    tokens = decode(tokenizer, tokenize_row(CHAT, tokenizer))
    assert tokens["prompt_ids"] == ["user", ":", "why", "</s>", "assistant", ":"]
    assert tokens["chosen_ids"] == ["yes", "</s>"]


def test_template_options_of_a_row():
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = "{{ mood ~ ' ' }}" + tokenizer.chat_template
    row = {**CHAT, "chat_template_kwargs": {"mood": "hello"}}
    assert decode(tokenizer, tokenize_row(row, tokenizer))["prompt_ids"][0] == "hello"


def test_chat_without_template():
    with pytest.raises(UserError, match="no chat template"):
        tokenize_row(CHAT, word_tokenizer())


def test_tokenized_rows_pass_through():
    row = {"prompt_ids": (1, 2), "chosen_ids": [3], "rejected_ids": [4], "extra": 1}
    assert tokenize_row(row, None) == {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
