"""Log-probs of the reference model: computed once, kept on disk by content."""

from fastdpo.reference.cache import ReferenceCache
from fastdpo.reference.fingerprint import model_fingerprint
from fastdpo.reference.precompute import precompute, reference_columns

__all__ = ["ReferenceCache", "model_fingerprint", "precompute", "reference_columns"]
