"""Rows of text or messages into token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastdpo.data.validate import (
    ID_COLUMNS,
    common_prefix_length,
    data_of,
    implicit_prompt_length,
    is_chat,
    is_tokenized,
)
from fastdpo.types import DataError, UserError

_KEPT = {"pairs": ("pair_weight",), "lists": ("ranks", "pair_weight"), "answers": ("label", "pair_weight")}


def tokenize_row(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Token ids of one row: {"prompt_ids", "chosen_ids", "rejected_ids"} of a pair.

    Of a ranked list (`prompt`, `completions`, `ranks`) {"prompt_ids", "completions_ids", "ranks"}, of a single answer
    (`prompt`, `completion`, `label`) {"prompt_ids", "completion_ids", "label"}. A `pair_weight` is kept.

    Messages are rendered by the tokenizer's chat template: the prompt with the generation prompt, and the whole
    conversation with each answer. Plain text is tokenized as prompt and as prompt + answer, the answer ended by the
    end-of-sequence token. The completion begins where prompt and whole part ways: a template may render the prompt
    differently alone (with an empty thinking block, say) than in context, and tokens may merge across the border.
    """
    data = data_of(row)
    kept = {name: row[name] for name in _KEPT[data] if row.get(name) is not None}
    if is_tokenized(row):
        return {**{name: _lists(row[name]) for name in ID_COLUMNS[data]}, **kept}
    prompt, answers = _parts(row, data)
    if is_chat(prompt):
        options = _template_options(row)
        prompt_ids = _render(tokenizer, prompt, add_generation_prompt=True, **options)
        whole = [_render(tokenizer, prompt + answer, **options) for answer in answers]
    else:
        end = tokenizer.eos_token or ""
        prompt_ids = tokenizer(prompt)["input_ids"]
        if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id and not prompt.endswith(end):
            prompt_ids = prompt_ids[:-1]  # a tokenizer that ends every text would end the prompt, too
        whole = []
        for answer in answers:
            ids = tokenizer(prompt + (answer if end and answer.endswith(end) else answer + end))["input_ids"]
            if len(ids) > 1 and ids[-1] == ids[-2] == tokenizer.eos_token_id:
                ids = ids[:-1]
            whole.append(ids)
    shared = min(common_prefix_length(prompt_ids, ids) for ids in whole)
    completions = [ids[shared:] for ids in whole]
    names = ID_COLUMNS[data][1:]
    columns = [completions] if data == "lists" else completions
    return {"prompt_ids": prompt_ids[:shared], **dict(zip(names, columns, strict=True)), **kept}


def _lists(ids: Any) -> list[Any]:
    """Token ids, or lists of them, as lists."""
    return [_lists(each) if isinstance(each, list | tuple | np.ndarray) else each for each in ids]


def tokenized(row: Mapping[str, Any], tokenizer: Any, where: str) -> dict[str, Any]:
    """`tokenize_row`, where whatever the tokenizer or its chat template cannot take, or loses, is told with the row.

    Raises:
        DataError: that.
    """
    try:
        ids = tokenize_row(row, tokenizer)
    except UserError:
        raise
    except Exception as error:  # templates raise what they like, tokenizers TypeError, tools JSONDecodeError
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{where}: it cannot be tokenized ({what}); mend the row or remove it.") from error
    if not is_tokenized(row) and (problem := _lost(row, ids, tokenizer)):
        raise DataError(f"{where}: {problem}")
    return ids


# What a template adds to an answer, and no more, may be an answer that it has dropped. Longer ones hold some text.
_SHORT = 16


def _lost(row: Mapping[str, Any], ids: Mapping[str, Any], tokenizer: Any) -> str | None:
    """What of the row's answers is not in their tokens, or None."""
    data = data_of(row)
    prompt, answers = _parts(row, data)
    completions = ids["completions_ids"] if data == "lists" else [ids[name] for name in ID_COLUMNS[data][1:]]
    names = [f"completions[{place}]" for place in range(len(answers))] if data == "lists" else _SIDES[data]
    chat = is_chat(prompt)
    by = "chat template" if chat else "tokenizer"
    for name, answer, completion in zip(names, answers, completions, strict=True):
        short = chat and len(completion) <= _SHORT
        if not completion or (
            short and [*ids["prompt_ids"], *completion] == _without_text(row, prompt, answer, tokenizer)
        ):
            return f"the {by} leaves nothing of what {name!r} says; mend the {by} or the row, or remove the row."
    for place, completion in enumerate(completions):
        if completion in completions[:place]:
            other = names[completions.index(completion)]
            return (
                f"the {by} makes the same tokens of {other!r} and {names[place]!r}, so there is no preference to "
                f"learn; mend the {by} or the row, or remove the row."
            )
    return None


_SIDES = {"pairs": ("chosen", "rejected"), "answers": ("completion",)}


def _without_text(row: Mapping[str, Any], prompt: Any, answer: Any, tokenizer: Any) -> list[int] | None:
    """The conversation's tokens with the answer's last text left out; None where it has none, or has to have one."""
    last = answer[-1]
    if not isinstance(last["content"], str) or not last["content"].strip() or last.get("tool_calls"):
        return None
    silent = [*prompt, *answer[:-1], {**last, "content": ""}]
    try:
        return _render(tokenizer, silent, **_template_options(row))
    except Exception:  # a template may refuse it
        return None


def _parts(row: Mapping[str, Any], data: str) -> tuple[Any, list[Any]]:
    """Prompt and answers; a missing prompt of a pair is what both answers begin with."""
    if data == "lists":
        return row["prompt"], list(row["completions"])
    if data == "answers":
        return row["prompt"], [row["completion"]]
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is not None:
        return row["prompt"], [chosen, rejected]
    shared = implicit_prompt_length(chosen, rejected)
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def _template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools)
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def _render(tokenizer: Any, messages: list[Mapping[str, Any]], **options: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise UserError(
            "the data holds chat messages, but the tokenizer has no chat template; "
            "use the tokenizer of a chat model, set tokenizer.chat_template, or write the rows as plain text."
        )
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return list(rendered["input_ids"])
