"""Preference data: reading, checking, and tokenizing rows."""

from fastdpo.data.read import RowSource, open_rows, read_rows
from fastdpo.data.tokenize import tokenize_row
from fastdpo.data.validate import validate_rows

__all__ = ["RowSource", "open_rows", "read_rows", "tokenize_row", "validate_rows"]
