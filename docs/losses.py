"""Writes the table of docs/losses.md from the registry; with --check, only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from fastdpo.losses.catalogue import markdown  # noqa: E402

PAGE = ROOT / "docs" / "losses.md"
BEGIN, END = "<!-- losses -->\n", "<!-- end -->"


def with_table(text: str) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + markdown() + END + rest.split(END, 1)[1]


def main(arguments: list[str]) -> int:
    text = PAGE.read_text()
    if "--check" in arguments:
        if with_table(text) == text:
            return 0
        print("docs/losses.md does not show the registry; run: python docs/losses.py")
        return 1
    PAGE.write_text(with_table(text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
