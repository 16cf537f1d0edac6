"""The reference's part of a trainer: columns computed ahead, or a model kept beside."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastdpo.data.validate import REFERENCES
from fastdpo.losses import WeightedLosses
from fastdpo.models import evaluating
from fastdpo.packing import PreferenceBatch
from fastdpo.reference import ReferenceCache, model_fingerprint
from fastdpo.reference.cache import default_cache_dir
from fastdpo.reference.fill import ModelChanged, about
from fastdpo.scoring import sequence_logps
from fastdpo.trainer.config import ReferenceConfig
from fastdpo.trainer.passes import HostCounts
from fastdpo.trainer.reference import has_reference, with_reference
from fastdpo.trainer.surviving import SurvivingTrainer
from fastdpo.types import UserError


class ReferencedTrainer(SurvivingTrainer):
    """What PreferenceTrainer knows of the reference; `_reference` and `_losses` are set by then."""

    train_dataset: Any
    eval_dataset: Any
    packing: str
    _losses: WeightedLosses
    _patient_counts: HostCounts

    @property
    def ref_model(self) -> Any:
        """The reference, where it is a model of its own."""
        return self._reference.model

    def _head_budget(self) -> int:
        """Bytes that logits may take."""
        raise NotImplementedError

    def _prepare_reference(self) -> None:
        """Columns of reference log-probs where they are to be computed ahead; else a frozen model to run beside."""
        self._ref_cache: ReferenceCache | None = None
        if not self._losses.needs_reference:
            return
        assert isinstance(self.args, ReferenceConfig)
        if self.args.sync_ref_model:
            self._check_reference_can_move()
        if self.args.precompute_ref_log_probs:
            with self._reference.running():
                fingerprint = model_fingerprint(self._reference.runs, self._autocast_dtype)
            folder = self.args.ref_logps or default_cache_dir(fingerprint)
            self._ref_cache = ReferenceCache(folder, fingerprint, about=about(self._reference.runs))
            if self.train_dataset is not None:
                self.train_dataset = self._with_reference(self.train_dataset)
            if isinstance(self.eval_dataset, Mapping):
                self.eval_dataset = {name: self._with_reference(part) for name, part in self.eval_dataset.items()}
            elif self.eval_dataset is not None:
                self.eval_dataset = self._with_reference(self.eval_dataset)
            return
        if self._reference.kind != "explicit" and all(has_reference(dataset) for _, dataset in self._named_datasets()):
            return
        self._reference.keep(self.args.device)
        if self.args.sync_ref_model:
            self._reference.check_can_move()

    def _check_reference_can_move(self) -> None:
        if hasattr(self.model, "peft_config"):
            raise ValueError(
                "sync_ref_model=True mixes whole weights, and of a model with adapters only these move; leave it off, "
                "or train without PEFT."
            )
        if self.is_deepspeed_enabled:
            raise ValueError(
                "sync_ref_model=True is not supported under DeepSpeed, which shards weights; use FSDP or DDP."
            )
        if any(has_reference(dataset) for _, dataset in self._named_datasets()):
            raise ValueError(
                "sync_ref_model=True moves the reference, and the rows carry its sums; drop those columns."
            )

    def _with_later_reference(self, dataset: Any) -> Any:
        """A data set that comes later, with the reference's sums where no model is there to compute them in a pass.

        Raises:
            UserError: the sums are neither in the rows nor in the cache, and the reference is not there any more.
        """
        if has_reference(dataset):
            return dataset
        if self._ref_cache is not None:
            return self._with_reference(dataset)
        if not self._reference.lasts:
            raise UserError(_no_reference(self._losses.data))
        return dataset

    @property
    def _is_sharded(self) -> bool:
        """Whether no process has the weights whole."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled or isinstance(self.model, FSDPModule))

    def _named_datasets(self) -> list[tuple[str, Any]]:
        evals = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"eval": self.eval_dataset}
        return [(name, part) for name, part in {"train": self.train_dataset, **evals}.items() if part is not None]

    def _with_reference(self, dataset: Any) -> Any:
        if has_reference(dataset):
            return dataset
        assert self._ref_cache is not None
        trained = bool(self.state.global_step)
        sharded = trained and self._is_sharded and self._reference.kind != "explicit"
        try:
            with self._reference.running():
                return with_reference(
                    dataset,
                    self._ref_cache,
                    self._reference.runs,
                    self.args,
                    self._patient_counts,
                    lost=_reference_lost if sharded else None,
                    lent=functools.partial(_lent, self._reference.runs, self.args.device),
                    ld_alpha=self._losses.ld_alpha,
                    packing=self.packing,
                    attention_backend=self.args.attention_backend,
                    autocast_dtype=self._autocast_dtype,
                )
        except ModelChanged as error:
            raise _reference_lost() from error

    def _online_reference(self, batch: PreferenceBatch) -> Tensor:
        if not self._reference.lasts:
            raise UserError(_no_reference(batch.data))
        reference = self._reference.runs
        with evaluating(reference), torch.no_grad(), self._reference.running(), self.accelerator.autocast():
            return sequence_logps(
                reference, batch, attention_backend=self.args.attention_backend, ld_alpha=self._losses.ld_alpha,
                memory_budget=self._head_budget(),
            )  # fmt: skip


def _reference_lost() -> UserError:
    return UserError(
        "the reference of this new data set cannot be computed any more: with precompute_ref_log_probs=True and no "
        "ref_model, it was the policy before training; pass the set to the constructor as eval_dataset, or fill its "
        "cache by fastdpo.precompute with the model that training began with."
    )


def _no_reference(data: str) -> str:
    return (
        f"these rows have no {' and '.join(REFERENCES[data])}, the other data sets brought theirs or had them computed "
        "ahead, and there is no other reference than the policy, which moves; add the columns, pass ref_model to the "
        "constructor, or pass the rows there."
    )


@contextmanager
def _lent(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device` within it, and then where it was: no memory is held for what is done ahead."""
    home = next(model.parameters()).device
    if home == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
