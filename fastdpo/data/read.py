"""Rows from a JSON Lines or JSON file, each with the place it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastdpo.types import DataError


def read_rows(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a .jsonl file (one JSON object a line, empty lines skipped) or a .json file (an array of objects).

    Returns the rows and, for messages, where each stands: "FILE, row 3", with the line where it is another number.

    Raises:
        DataError: no such file, a line that is no JSON object, no rows at all; names file and line.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such file; check the path given as the data set.")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give a .jsonl or .json file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8, one JSON object a line."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None
    if path.suffix == ".json":
        rows = _json_array(path, text)
        places = [f"{path}, row {number}" for number in range(1, len(rows) + 1)]
    else:
        rows, places = _json_lines(path, text)
    if not rows:
        raise DataError(f"{path} holds no rows; it needs one JSON object a line with prompt, chosen and rejected.")
    return rows, places


def _json_lines(path: Path, text: str) -> tuple[list[dict[str, Any]], list[str]]:
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        number = len(rows) + 1
        place = f"{path}, row {number}" if number == line_number else f"{path}, row {number} (line {line_number})"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place}: this is no JSON ({error.msg}, column {error.colno}); each line must be one JSON object."
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{place}: this is a JSON {type(row).__name__}; each line must be an object "
                '{"prompt": ..., "chosen": ..., "rejected": ...}.'
            )
        rows.append(row)
        places.append(place)
    return rows, places


def _json_array(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: this is no JSON ({error.msg}, column {error.colno}); a .json "
                        "file must hold one array of objects.") from None  # fmt: skip
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: a .json file must hold one array of objects; use .jsonl for one object a line.")
    return rows
