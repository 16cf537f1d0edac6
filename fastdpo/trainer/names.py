"""Names that scripts use: of folders, and of arguments that are called otherwise by now."""

from __future__ import annotations

import warnings
from typing import Any


def default_output_dir(model: Any, method: str) -> str:
    """As TRL names it: the model and the method."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
    return f"{name.rstrip('/').split('/')[-1]}-{method}"


def named_tokenizer(processing_class: Any, tokenizer: Any) -> Any:
    """`processing_class`, or the older `tokenizer`, with a warning."""
    if tokenizer is None:
        return processing_class
    if processing_class is not None:
        raise ValueError("tokenizer is the older name of processing_class, and both are given; leave tokenizer out.")
    warnings.warn("tokenizer is deprecated: pass it as processing_class.", FutureWarning, stacklevel=3)
    return tokenizer
