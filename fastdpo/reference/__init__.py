"""Log-probs of the reference model: computed once, kept on disk by content."""

from fastdpo.reference.cache import ReferenceCache
from fastdpo.reference.fill import precompute, reference_columns
from fastdpo.reference.fingerprint import model_fingerprint

__all__ = ["ReferenceCache", "model_fingerprint", "precompute", "reference_columns"]
