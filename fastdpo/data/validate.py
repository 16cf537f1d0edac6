"""What must hold of a row before anything is computed from it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastdpo.types import DataError

SIDES = ("chosen", "rejected")
TOKENIZED = ("prompt_ids", "chosen_ids", "rejected_ids")
# The columns of token ids by what a row is: a pair, K ranked completions of a prompt, a single answer.
ID_COLUMNS = {
    "pairs": TOKENIZED,
    "lists": ("prompt_ids", "completions_ids"),
    "answers": ("prompt_ids", "completion_ids"),
}
# Of text and messages those that must be there; a pair's prompt may be what both answers begin with.
TEXT_COLUMNS = {"pairs": SIDES, "lists": ("prompt", "completions"), "answers": ("prompt", "completion", "label")}
# Sums of the reference's log-probs, where a row has them; of a list K of them, in the order of its completions.
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
REFERENCES = {"pairs": REF_COLUMNS, "lists": ("ref_logps",), "answers": ("ref_logps",)}
# Of a single answer: the answer to another prompt, of which KTO estimates the KL divergence, and its sum.
MISMATCHED, REF_MISMATCHED = "KL_completion_ids", "ref_KL_logps"
# What else a row may carry for its batch.
ROW_COLUMNS = {
    "pairs": ("pair_weight",),
    "lists": ("ranks", "pair_weight"),
    "answers": ("label", "pair_weight", MISMATCHED, REF_MISMATCHED),
}

# Of messages; a chat template leaves out what it does not know, or renders it as nothing it has learnt.
ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython", "observation", "model")
LARGEST_WEIGHT = 1e9  # sums of these, and of losses times these, stay far within float32
LARGEST_MARGIN = 1e6
LARGEST_ID = 2**31 - 1
# A sum of log-probs, in nats: above 0 by rounding alone, and no lower than that of text that means nothing to a model.
_HIGHEST_SUM, _LOWEST_SUM, _LOWEST_PER_TOKEN = 1e-3, -1e6, -200.0


def is_tokenized(row: Mapping[str, Any]) -> bool:
    return any(name in row for columns in ID_COLUMNS.values() for name in columns)


def data_of(row: Mapping[str, Any]) -> str:
    """What a row is, by its fields: "lists" (completions), "answers" (completion) or "pairs" (chosen, rejected).

    Fields that are None, as tables fill in what a row lacks, are not there.
    """
    given = [name for name, value in row.items() if value is not None]
    answers = ("completions", "completions_ids", "completion", "completion_ids", *SIDES, *TOKENIZED[1:])
    return data_of_fields(given if any(name in given for name in answers) else row)


def data_of_fields(names: Iterable[str]) -> str:
    """`data_of` by the names alone: of columns, say."""
    names = set(names)
    if names & {"completions", "completions_ids"}:
        return "lists"
    return "answers" if names & {"completion", "completion_ids"} else "pairs"


def is_chat(value: Any) -> bool:
    """A list of messages, as opposed to plain text."""
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def reference_names(fields: Iterable[str]) -> tuple[str, ...]:
    """The columns of the reference's sums that a row with these fields would have."""
    fields = set(fields)
    names = REFERENCES[data_of_fields(fields)]
    return (*names, REF_MISMATCHED) if MISMATCHED in fields else names


def validate_rows(rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> None:
    """Raises DataError for the first row that cannot be used, and says how many more there are.

    `places` says where each row stands, as `read_rows` returns it. The reference's sums are looked at, too.
    """
    problems = [
        (place, problem)
        for row, place in zip(rows, places, strict=True)
        if (problem := row_problem(row) or references_problem(row))
    ]
    if problems:
        place, problem = problems[0]
        raise bad_rows(f"{place}: {problem}", len(problems) - 1)


def bad_rows(first: str, more: int) -> DataError:
    """`first` says where the first bad row stands and what is wrong with it; `more` follow."""
    return DataError(first + (f" ({more} more rows cannot be used, either.)" if more else ""))


def row_problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the row and how to mend it, or None."""
    weight = row.get("pair_weight")
    if weight is not None and (problem := weight_problem(weight)):
        return problem
    if is_tokenized(row):
        return _tokenized_problem(row)
    problem = {"pairs": _pair_problem, "lists": _list_problem, "answers": _answer_problem}[data_of(row)](row)
    if problem is None and row.get("prompt") is not None and _is_empty(row["prompt"]):
        problem = "'prompt' is empty; write the question or remove the row."
    return problem or _role_problem(row)


def _is_number(value: Any) -> bool:
    """Finite, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def weight_problem(value: Any) -> str | None:
    """What is wrong with a `pair_weight`, or None."""
    if not _is_number(value) or value < 0:
        return f"'pair_weight' is {value!r}; it must be a finite number, not below 0."
    if value > LARGEST_WEIGHT:
        return (
            f"'pair_weight' is {value!r}, and sums of such weights leave the numbers of float32; divide all weights "
            f"(only their ratios count) until none is above {LARGEST_WEIGHT:g}."
        )
    return None


def margin_problem(value: Any) -> str | None:
    """What is wrong with the `margin` of a reward model's pair, or None."""
    if not _is_number(value):
        return f"'margin' is {value!r}; it must be a finite number."
    if abs(value) > LARGEST_MARGIN:
        return f"'margin' is {value!r}, and no score reaches that; it must lie within {LARGEST_MARGIN:g} of 0."
    return None


def references_problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the sums of the reference's log-probs that the row carries, or None."""
    data = data_of(row)
    for name, tokens in _reference_tokens(row, data).items():
        values = row.get(name)
        if values is None:
            continue
        if data != "lists":
            problem = sum_problem(values, name, tokens[0])
        elif not isinstance(values, list | tuple | np.ndarray) or len(values) != len(tokens):
            problem = f"{name!r} is {values!r}; it must be a list, one sum a completion ({len(tokens)})."
        else:
            problems = (sum_problem(value, name, count) for value, count in zip(values, tokens, strict=True))
            problem = next(filter(None, problems), None)
        if problem is not None:
            return problem
    return None


def _reference_tokens(row: Mapping[str, Any], data: str) -> dict[str, list[int | None]]:
    """Of each column of sums the tokens of its completions; None where they are not known yet."""
    if data == "lists":
        completions = row.get("completions_ids") or row.get("completions") or ()
        return {"ref_logps": [len(each) if "completions_ids" in row else None for each in completions]}
    columns = {**dict(zip(REFERENCES[data], ID_COLUMNS[data][1:], strict=True))}
    if data == "answers":
        columns[REF_MISMATCHED] = MISMATCHED
    return {name: [None if row.get(ids) is None else len(row[ids])] for name, ids in columns.items()}


def sum_problem(value: Any, name: str, tokens: int | None = None) -> str | None:
    """What is wrong with a sum of log-probs over `tokens` tokens, or None."""
    if not _is_number(value):
        return f"{name!r} is {value!r}; it must be a sum of log-probs, a finite number."
    if value > _HIGHEST_SUM:
        return f"{name!r} is {value!r}; it must be a sum of log-probs, and none is above 0. Compute it again."
    lowest = _LOWEST_SUM if tokens is None else max(_LOWEST_SUM, _LOWEST_PER_TOKEN * max(tokens, 1))
    if value < lowest:
        what = "" if tokens is None else f" of {tokens} tokens"
        return (
            f"{name!r} is {value!r}, which no model gives a completion{what} (the least taken is {lowest:g}); compute "
            "it again."
        )
    return None


def _role_problem(row: Mapping[str, Any]) -> str | None:
    completions = row.get("completions")
    several = completions if isinstance(completions, list | tuple) else []
    fields = {name: row.get(name) for name in ("prompt", *SIDES, "completion")}
    for name, value in (fields | {f"completions[{place}]": answer for place, answer in enumerate(several)}).items():
        for message in value if isinstance(value, list) else ():
            if message["role"] not in ROLES:
                return f"{name!r} has a message of the role {message['role']!r}; roles are {', '.join(ROLES)}."
    return None


def _pair_problem(row: Mapping[str, Any]) -> str | None:
    for side in SIDES:
        if row.get(side) is None:
            return f"the field {side!r} is missing (found: {', '.join(row) or 'nothing'}); add it or remove the row."
    problem = _kinds_problem({name: row[name] for name in ("prompt", *SIDES) if row.get(name) is not None})
    if problem is not None:
        return problem
    for side in SIDES:
        if _is_empty(row[side]):
            return f"{side!r} is empty; write an answer or remove the row."
    if row["chosen"] == row["rejected"]:
        return "'chosen' and 'rejected' are the same, so there is no preference to learn; change one or remove the row."
    return _implicit_prompt_problem(row) if row.get("prompt") is None else None


def _list_problem(row: Mapping[str, Any]) -> str | None:
    completions = row.get("completions")
    if not isinstance(completions, list | tuple):
        return f"'completions' is {type(completions).__name__}; it must be a list of answers."
    if row.get("prompt") is None:
        return "the field 'prompt' is missing; add it."
    problem = ranks_problem(len(completions), row.get("ranks"))
    if problem is not None:
        return problem
    named = {f"completions[{place}]": answer for place, answer in enumerate(completions)}
    problem = _kinds_problem({"prompt": row["prompt"], **named})
    if problem is not None:
        return problem
    for place, (name, answer) in enumerate(named.items()):
        if _is_empty(answer):
            return f"{name} is empty; write an answer or leave it out."
        if answer in completions[:place]:
            return f"{name} stands in the list before, too, so the two cannot be ranked; leave one out."
    return None


def _answer_problem(row: Mapping[str, Any]) -> str | None:
    for name in ("prompt", "completion"):
        if row.get(name) is None:
            return f"the field {name!r} is missing (found: {', '.join(row)}); add it or remove the row."
    problem = _kinds_problem({name: row[name] for name in ("prompt", "completion")})
    if problem is not None:
        return problem
    if _is_empty(row["completion"]):
        return "'completion' is empty; write an answer or remove the row."
    return _mismatched_problem(row) or _label_problem(row)


def _label_problem(row: Mapping[str, Any]) -> str | None:
    if isinstance(row.get("label"), bool | np.bool_):
        return None
    return f"'label' is {row.get('label')!r}; it must be true (a desirable answer) or false."


def ranks_problem(count: int, ranks: Any) -> str | None:
    """What is wrong with the ranks of `count` completions (1 is the best; without ranks, the first is), or None."""
    if count < 2:
        return f"a ranking needs at least two completions, and there are {count}; add some or remove the row."
    if ranks is None:
        return None
    if not isinstance(ranks, list | tuple | np.ndarray):
        return f"'ranks' is {ranks!r}; it must be a list, one number for each completion."
    ranks = list(ranks)
    if len(ranks) != count:
        return f"there are {len(ranks)} ranks for {count} completions; give each completion one."
    if any(isinstance(rank, bool) or not isinstance(rank, int | float | np.number) or rank != rank for rank in ranks):
        return f"the ranks are {ranks}; they must be numbers, the smallest for the best."
    if len(set(ranks)) < count:
        return f"the ranks are {ranks}, and no two may be alike; leave one completion of a tie out."
    return None


def _kinds_problem(fields: Mapping[str, Any]) -> str | None:
    """All of them text, or all of them messages."""
    kinds = {name: _kind(value) for name, value in fields.items()}
    for name, kind in kinds.items():
        if kind is None:
            return (
                f"{name!r} is {type(fields[name]).__name__}; it must be text, or a list of messages "
                '{"role": ..., "content": ...}.'
            )
    if len(set(kinds.values())) > 1:
        return (
            "some fields are text and some are messages ("
            + ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
            + "); write all of them in one way."
        )
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
    shared = implicit_prompt_length(chosen, rejected)
    if shared == 0:
        what = "beginning" if isinstance(chosen, str) else "first message"
        return f"there is no 'prompt', and 'chosen' and 'rejected' share no {what} to take it from; add 'prompt'."
    if shared in (len(chosen), len(rejected)):
        return (
            "one of 'chosen' and 'rejected' is the beginning of the other, which leaves an empty answer; mend the row."
        )
    return None


def _tokenized_problem(row: Mapping[str, Any]) -> str | None:
    data = data_of(row)
    for name in ID_COLUMNS[data]:
        ids = row.get(name)
        if ids is None:
            return f"the field {name!r} is missing; tokenized rows need {', '.join(ID_COLUMNS[data])}."
        if name == "completions_ids":
            if not (isinstance(ids, list | tuple | np.ndarray) and all(_are_ids(each) for each in ids)):
                return f"{name!r} must be a list of lists of token ids (integers from 0)."
        elif problem := _ids_problem(ids, name):
            return problem
        if name != "prompt_ids" and not all(map(len, ids if name == "completions_ids" else [ids])):
            return f"{name!r} is empty; write an answer or remove the row."
    if data == "answers":
        return _mismatched_problem(row) or _label_problem(row)
    if data == "lists":
        known = [tuple(ids) for ids in row["completions_ids"]]
        if len(set(known)) < len(known):
            place = next(place for place, ids in enumerate(known) if ids in known[:place])
            return (
                f"completions_ids[{place}] stands in the list before, too, so the two cannot be ranked; leave one out."
            )
        return ranks_problem(len(known), row.get("ranks"))
    if list(row["chosen_ids"]) == list(row["rejected_ids"]):
        return "'chosen_ids' and 'rejected_ids' are the same, so there is no preference to learn; remove the row."
    return None


def _mismatched_problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the token ids of the answer to another prompt, or None."""
    ids = row.get(MISMATCHED)
    if ids is None:
        return None
    return _ids_problem(ids, MISMATCHED) or (None if len(ids) else f"{MISMATCHED!r} is empty; write an answer.")


def _ids_problem(ids: Any, name: str) -> str | None:
    return None if _are_ids(ids) else f"{name!r} must be a list of token ids (integers from 0)."


def _are_ids(ids: Any) -> bool:
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or not len(ids):
            return ids.ndim == 1
        return ids.dtype.kind in "iu" and bool(ids.min() >= 0 and ids.max() <= LARGEST_ID)
    if not isinstance(ids, list | tuple) or not all(
        issubclass(kind, int | np.integer) and kind is not bool for kind in set(map(type, ids))
    ):
        return False
    return not ids or (min(ids) >= 0 and max(ids) <= LARGEST_ID)


def implicit_prompt_length(chosen: Any, rejected: Any) -> int:
    """How much of both answers is the prompt that a row does not have: messages, or characters up to a space."""
    shared = common_prefix_length(chosen, rejected)
    return shared - 1 if shared and isinstance(chosen, str) and chosen[shared - 1] == " " else shared


def common_prefix_length(a: Any, b: Any) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
