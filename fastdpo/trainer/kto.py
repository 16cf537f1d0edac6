"""KTOTrainer: single answers, each desirable or not (Ethayarajh et al. 2024, arXiv:2402.01306)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, Value
from torch import Tensor

from fastdpo.data.validate import MISMATCHED, SIDES, data_of, implicit_prompt_length, is_tokenized
from fastdpo.trainer.config import ReferenceConfig, option
from fastdpo.trainer.constructors import ReferenceTrainer
from fastdpo.trainer.dataset import columns_of, own_number
from fastdpo.types import DataError, LossOutput

logger = logging.getLogger(__name__)

_CHUNK = 1000  # rows of pairs that are parted at a time: first all chosen answers, then all rejected ones


@dataclass
class KTOConfig(ReferenceConfig):
    """Options of KTOTrainer: names and defaults of TRL's KTOConfig, and a few of our own (PreferenceConfig)."""

    train_sampling_strategy: str = option("Order of the training rows, as in DPOConfig.", "sequential")
    loss_type: str = option("kto or apo_zero_unpaired, or a registered loss of answers.", "kto")
    beta: float = option("Strength of the pull towards the reference.", 0.1)
    desirable_weight: float = option("Weight of desirable answers.", 1.0)
    undesirable_weight: float = option("Weight of undesirable answers.", 1.0)

    def loss_arguments(self) -> dict[str, Any]:
        names = ("loss_type", "beta", "desirable_weight", "undesirable_weight")
        return {name: getattr(self, name) for name in names}

    def _check(self) -> None:
        losses = self.losses()
        if losses.data != "answers":
            raise ValueError(
                f"loss_type {self.loss_type!r} is a loss of {losses.data}; KTOTrainer trains on single answers."
            )
        if losses.needs_kl and self.per_device_train_batch_size < 2:
            raise ValueError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size}, and loss_type {self.loss_type!r} "
                "estimates a KL divergence from the batch's answers to other prompts; set it to 2 or more, or take "
                "loss_type='apo_zero_unpaired'."
            )
        super()._check()


class KTOTrainer(ReferenceTrainer):
    """Trains on single answers; the constructor is that of TRL's KTOTrainer.

    Rows have `prompt`, `completion` and `label` (True: desirable); rows of pairs are parted into two. The KL estimate
    takes for each prompt the answer of another row, of the rows before it in the data; in the packed row it is one more
    branch behind the prompt. Arguments and errors are those of PreferenceTrainer.
    """

    args: KTOConfig
    _tags: ClassVar[list[str]] = ["fastdpo", "kto"]
    _config, _method = KTOConfig, "KTO"

    def _metrics_of(self, output: LossOutput) -> dict[str, Tensor]:
        return {"kl": torch.zeros_like(output.loss), **super()._metrics_of(output)}

    def _prepared(self, dataset: Any, tokenizer: Any, args: Any, name: str) -> Any:
        if dataset is None:
            return None
        prepared = super()._prepared(as_answers(dataset, name), tokenizer, args, name)
        if name == "train":
            check_labels(prepared, args)
        if not self._losses.needs_kl or MISMATCHED in columns_of(prepared):
            return prepared
        return with_mismatched(prepared, args.per_device_train_batch_size)


def check_labels(dataset: Any, args: Any) -> None:
    """Says where a training set has answers of one label only: there is a loss, but it compares nothing.

    It pulls all answers the same way, held by the reference alone, as TRL's does; so it is not refused.

    Raises:
        DataError: the only label there is has the weight 0.
    """
    if not isinstance(dataset, Dataset) or not len(dataset):
        return
    tables = dataset.select_columns(["label"]).with_format("arrow").iter(10_000)
    desirable = sum(pc.sum(table["label"]).as_py() or 0 for table in tables)
    if 0 < desirable < len(dataset):
        return
    what, other = ("desirable", "undesirable") if desirable else ("undesirable", "desirable")
    if not getattr(args, f"{what}_weight"):
        raise DataError(
            f"all {len(dataset)} rows of the train data set are {what} (row 0 on), and {what}_weight is 0, so there is "
            f"nothing to learn; add {other} answers, or set {what}_weight above 0."
        )
    logger.warning(
        "All %d rows of the train data set are %s (label=%s from row 0 on): the loss contrasts them with nothing and "
        "pulls every answer the same way. Add %s answers, unless that is meant.",
        len(dataset), what, bool(desirable), other,
    )  # fmt: skip


def as_answers(dataset: Any, name: str) -> Any:
    """Rows of pairs as rows of single answers, the chosen ones desirable; other rows as they are.

    Raises:
        DataError: a row of pairs that cannot be used, or pairs and single answers in one data set.
    """
    if isinstance(dataset, list):
        if not any(map(_are_pairs, dataset)):
            return dataset
        starts = range(0, len(dataset), _CHUNK)
        return [row for start in starts for row in _parted_rows(dataset[start : start + _CHUNK], start, name)]
    columns = columns_of(dataset)
    if not _are_pairs(columns):
        return dataset
    options: dict[str, Any] = {"features": _features_of_answers(dataset)} if isinstance(dataset, Dataset) else {}
    options |= {"fn_kwargs": {"name": name}, "remove_columns": columns, "with_indices": True}
    return dataset.map(_parted, batched=True, batch_size=_CHUNK, **options)


def _parted(batch: dict[str, list[Any]], numbers: list[int], name: str) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    answers = list(_parted_rows(rows, numbers[0], name))
    names = dict.fromkeys(name for row in answers for name in row)
    return {name: [row.get(name) for row in answers] for name in names}


def same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(a == b for a, b in zip(one, other, strict=True))


def _are_pairs(fields: Any) -> bool:
    return any(name in fields for side in SIDES for name in (side, f"{side}_ids"))


# What becomes of the columns of a side.
_RENAMED = {
    side: {side: "completion", f"{side}_ids": "completion_ids", f"ref_{side}_logps": "ref_logps"} for side in SIDES
}
_OF_SIDES = [name for names in _RENAMED.values() for name in names]


def _features_of_answers(dataset: Dataset) -> Features:
    """datasets would take the types of columns from the first rows, in which they may all be None."""
    kinds = dataset.features
    features = {name: kind for name, kind in kinds.items() if name not in _OF_SIDES}
    if "chosen" in kinds and features.get("prompt", Value("null")) == Value("null"):
        features["prompt"] = kinds["chosen"]
    features |= {new: kinds[old] for old, new in _RENAMED["chosen"].items() if old in kinds}
    return Features(features | {"label": Value("bool"), "row_number": Value("int64")})


def _parted_rows(rows: list[dict[str, Any]], first: int, name: str) -> Iterator[dict[str, Any]]:
    """`first`: the number of the first of them in its data set, for messages."""
    for number, row in enumerate(rows, first):
        given = {key: value for key, value in row.items() if value is not None}
        wanted = [f"{side}_ids" for side in SIDES] if is_tokenized(given) else SIDES
        missing = next((column for column in wanted if column not in given), None)
        if data_of(given) != "pairs":
            problem = f"it is one of {data_of(given)}, and others are pairs; part them."
        elif missing:
            problem = f"the field {missing!r} is missing; add it or remove the row."
        elif same(*(given[column] for column in wanted)):
            problem = f"{wanted[0]!r} and {wanted[1]!r} are the same, so one of them contradicts the other; remove it."
        else:  # what its two answers are is looked at when they are tokenized
            problem = None
        if problem is not None:
            raise DataError(f"{name} data set, row {number} (counted from 0): {problem}")
    for side, label in zip(SIDES, (True, False), strict=True):
        for number, row in enumerate(rows, first):
            answer = {**row, "row_number": own_number(row, number)}
            if answer.get("prompt") is None and answer.get(side) is not None:
                shared = implicit_prompt_length(row["chosen"], row["rejected"])
                answer["prompt"], answer[side] = answer[side][:shared], answer[side][shared:]
            kept = {key: value for key, value in answer.items() if key not in _OF_SIDES}
            own = {new: answer[old] for old, new in _RENAMED[side].items() if old in answer}
            yield {**kept, **own, "label": label}


def with_mismatched(dataset: Any, batch_size: int) -> Any:
    """Each row with the answer of the row before it among every `batch_size` rows, the first with that of the last.

    So the answers of which a batch's KL divergence is estimated are those of the batch, each behind another prompt, if
    the rows come in order.
    """
    options: dict[str, Any] = {"batched": True, "batch_size": batch_size, "input_columns": ["completion_ids"]}
    if isinstance(dataset, Dataset):
        if len(dataset) == 1:
            raise DataError("the data set holds one row, and the KL estimate needs answers to other prompts; add rows.")
        completions = dataset.features["completion_ids"]
        options |= {
            "features": Features({**dataset.features, MISMATCHED: completions}),
            "fn_kwargs": {"before_the_last": dataset[len(dataset) - 2]["completion_ids"]},
        }
    return dataset.map(_rotated, **options)


def _rotated(completions: list[list[int]], before_the_last: list[int] | None = None) -> dict[str, list[Any]]:
    if len(completions) == 1 and before_the_last is not None:  # a row left over: the completion of the row before it
        return {MISMATCHED: [before_the_last]}
    return {MISMATCHED: [completions[-1], *completions[:-1]]}
