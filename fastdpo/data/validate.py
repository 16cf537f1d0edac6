"""What must hold of a row before anything is computed from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastdpo.types import DataError

SIDES = ("chosen", "rejected")
TOKENIZED = ("prompt_ids", "chosen_ids", "rejected_ids")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # sums of the reference's log-probs, where a row has them


def is_tokenized(row: Mapping[str, Any]) -> bool:
    return any(name in row for name in TOKENIZED)


def is_chat(value: Any) -> bool:
    """A list of messages, as opposed to plain text."""
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def validate_rows(rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> None:
    """Raises DataError for the first row that cannot be used, and says how many more there are.

    `places` says where each row stands, as `read_rows` returns it.
    """
    problems = [(place, problem) for row, place in zip(rows, places, strict=True) if (problem := row_problem(row))]
    if problems:
        place, problem = problems[0]
        raise bad_rows(f"{place}: {problem}", len(problems) - 1)


def bad_rows(first: str, more: int) -> DataError:
    """`first` says where the first bad row stands and what is wrong with it; `more` follow."""
    return DataError(first + (f" ({more} more rows cannot be used, either.)" if more else ""))


def row_problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the row and how to mend it, or None."""
    if is_tokenized(row):
        return _tokenized_problem(row)
    for side in SIDES:
        if row.get(side) is None:
            return f"the field {side!r} is missing (found: {', '.join(row) or 'nothing'}); add it or remove the row."
    kinds = {name: _kind(row[name]) for name in ("prompt", *SIDES) if row.get(name) is not None}
    for name, kind in kinds.items():
        if kind is None:
            return (
                f"{name!r} is {type(row[name]).__name__}; it must be text, or a list of messages "
                '{"role": ..., "content": ...}.'
            )
    if len(set(kinds.values())) > 1:
        return (
            "some fields are text and some are messages ("
            + ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
            + "); write all of them in one way."
        )
    for side in SIDES:
        if _is_empty(row[side]):
            return f"{side!r} is empty; write an answer or remove the row."
    if row["chosen"] == row["rejected"]:
        return "'chosen' and 'rejected' are the same, so there is no preference to learn; change one or remove the row."
    if row.get("prompt") is None:
        return _implicit_prompt_problem(row)
    if _is_empty(row["prompt"]):
        return "'prompt' is empty; write the question or remove the row."
    return None


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if is_chat(value) and all(isinstance(m.get("role"), str) and "content" in m for m in value):
        return "messages"
    return None


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    last = value[-1] if value else None
    if last is None:
        return True
    content = last["content"]
    blank = not content.strip() if isinstance(content, str) else not content
    return blank and not last.get("tool_calls")


def _implicit_prompt_problem(row: Mapping[str, Any]) -> str | None:
    chosen, rejected = row["chosen"], row["rejected"]
    shared = common_prefix_length(chosen, rejected)
    if isinstance(chosen, str):
        return "the field 'prompt' is missing; add it (for plain text, chosen and rejected hold the answers only)."
    if shared == 0:
        return "there is no 'prompt', and 'chosen' and 'rejected' share no first message to take it from; add 'prompt'."
    if shared in (len(chosen), len(rejected)):
        return (
            "one of 'chosen' and 'rejected' is the beginning of the other, which leaves an empty answer; mend the row."
        )
    return None


def _tokenized_problem(row: Mapping[str, Any]) -> str | None:
    for name in TOKENIZED:
        ids = row.get(name)
        if ids is None:
            return f"the field {name!r} is missing; tokenized rows need {', '.join(TOKENIZED)}."
        if not _are_ids(ids):
            return f"{name!r} must be a list of token ids (integers from 0)."
    for name in TOKENIZED[1:]:
        if not len(row[name]):
            return f"{name!r} is empty; write an answer or remove the row."
    if list(row["chosen_ids"]) == list(row["rejected_ids"]):
        return "'chosen_ids' and 'rejected_ids' are the same, so there is no preference to learn; remove the row."
    return None


def _are_ids(ids: Any) -> bool:
    if isinstance(ids, np.ndarray):
        return ids.ndim == 1 and (not len(ids) or (ids.dtype.kind in "iu" and bool(ids.min() >= 0)))
    return isinstance(ids, list | tuple) and all(isinstance(token, int) and token >= 0 for token in ids)


def common_prefix_length(a: Any, b: Any) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
