"""Sequences into rows without padding, each prompt once; and the collator that makes batches of them."""

from fastdpo.packing.batch import PreferenceBatch
from fastdpo.packing.collator import PACKINGS, PreferenceCollator
from fastdpo.packing.layout import PackedLayout, PackedRow, pack
from fastdpo.packing.microbatch import MicroBatches
from fastdpo.packing.padding import pad

__all__ = [
    "PACKINGS",
    "MicroBatches",
    "PackedLayout",
    "PackedRow",
    "PreferenceBatch",
    "PreferenceCollator",
    "pack",
    "pad",
]
