"""Log-probs of the reference model: computed once, kept on disk by content."""

from fastdpo.reference.cache import ReferenceCache
from fastdpo.reference.columns import add_reference_columns, import_columns, reference_columns
from fastdpo.reference.fill import fill_cache, precompute
from fastdpo.reference.fingerprint import model_fingerprint

__all__ = [
    "ReferenceCache",
    "add_reference_columns",
    "fill_cache",
    "import_columns",
    "model_fingerprint",
    "precompute",
    "reference_columns",
]
