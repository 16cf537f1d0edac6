"""The model whose log-probs a run's losses are compared with, kept as the run needs it.

explicit        a model of its own
adapters off    the policy's base, where its adapters have learnt nothing yet
initial         the policy before training; only for log-probs that are computed ahead
adapter copy    the policy with a frozen copy of the adapters it came with
copy            a frozen copy of the policy; it may move (`sync_ref_model`)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fastdpo.models import unwrapped
from fastdpo.trainer.policy import base_is_the_start

ADAPTER = "ref"


class KeptReference:
    """`running()` is the context in which `runs` gives the reference's log-probs."""

    def __init__(self, policy: Any, explicit: Any, *, new_adapter: bool) -> None:
        self._policy = policy
        self.model = explicit  # of its own, or None
        self.kind = "explicit" if explicit is not None else "initial"
        if explicit is None and hasattr(policy, "disable_adapter") and (new_adapter or base_is_the_start(policy)):
            self.kind = "adapters off"

    @property
    def runs(self) -> Any:
        return self._policy if self.model is None else self.model

    @property
    def lasts(self) -> bool:
        """Whether it is still there when the policy has moved."""
        return self.kind != "initial"

    def keep(self, device: torch.device) -> None:
        """Before training: makes it last, and ready to run on `device`."""
        if self.kind == "initial" and hasattr(self._policy, "disable_adapter"):
            self._copy_adapter()
        elif self.kind == "initial":
            self.model, self.kind = copy.deepcopy(self._policy), "copy"
        if self.model is not None:
            self.model.requires_grad_(False).eval().to(device)

    def _copy_adapter(self) -> None:
        policy = self._policy
        (own,) = policy.active_adapters
        policy.add_adapter(ADAPTER, policy.peft_config[own])
        values = dict(policy.named_parameters())
        for name, value in values.items():
            if f".{own}." in name or name.endswith(f".{own}"):
                copied = values[_renamed(name, own, ADAPTER)]
                copied.data.copy_(value.data)
                copied.requires_grad_(False)
        policy.set_adapter(own)
        self.kind = "adapter copy"

    @contextmanager
    def running(self) -> Iterator[None]:
        if self.kind == "adapters off":
            with self._policy.disable_adapter():
                yield
        elif self.kind == "adapter copy":
            own = list(self._policy.active_adapters)
            trained = [value for value in self._policy.parameters() if value.requires_grad]
            self._policy.set_adapter(ADAPTER)
            try:
                yield
            finally:
                self._policy.set_adapter(own[0])
                for value in self._policy.parameters():  # set_adapter makes what it sets trainable
                    value.requires_grad_(False)
                for value in trained:
                    value.requires_grad_(True)
        else:
            yield

    def move(self, policy: Any, share: float) -> None:
        """reference = share * policy + (1 - share) * reference; all processes call it."""
        assert self.model is not None
        moved = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in unwrapped(policy).named_parameters():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                moved[name].lerp_(whole.detach().to(moved[name].device, moved[name].dtype), share)


def _renamed(name: str, old: str, new: str) -> str:
    """The parameter of another adapter."""
    parts = name.split(".")
    return ".".join(new if part == old else part for part in parts)
