"""The model whose log-probs a run's losses are compared with, kept as the run needs it.

explicit        a model of its own
adapters off    the policy's base, where its adapters have learnt nothing yet
initial         the policy before training; only for log-probs that are computed ahead
named adapter   the policy under another adapter of its own
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

from fastdpo.adapters import adapter_tensors, adapter_wrappers, trained_outside_adapters
from fastdpo.models import unwrapped
from fastdpo.trainer.policy import base_is_the_start
from fastdpo.types import UserError

ADAPTER = "ref"


class KeptReference:
    """`running()` is the context in which `runs` gives the reference's log-probs."""

    def __init__(self, policy: Any, explicit: Any, *, new_adapter: bool, adapter: str | None = None) -> None:
        """
        Args:
            adapter: name of the one under which the policy is the reference.

        Raises:
            UserError: there is no such adapter, or it is the one to be trained, or there is another reference.
        """
        self._policy = policy
        self.model = explicit  # of its own, or None
        self.kind = "explicit" if explicit is not None else "initial"
        if explicit is not None:
            _refuse_shared(policy, explicit)
        elif hasattr(policy, "disable_adapter") and (new_adapter or base_is_the_start(policy)):
            self.kind = "adapters off"
        self._adapter = ADAPTER if adapter is None else adapter
        if adapter is not None:
            check_adapter(policy, adapter, "ref_adapter_name")
            if explicit is not None or adapter in policy.active_adapters:
                other = "ref_model is given" if explicit is not None else "it is the adapter to be trained"
                raise UserError(f"ref_adapter_name is {adapter!r}, and {other}; leave one of the two out.")
            self.kind = "named adapter"

    @property
    def runs(self) -> Any:
        return self._policy if self.model is None else self.model

    @property
    def lasts(self) -> bool:
        """Whether it is still there when the policy has moved."""
        return self.kind != "initial" and not (self._on_the_policy and trained_outside_adapters(self._policy))

    @property
    def _on_the_policy(self) -> bool:
        """Whether it is the policy with other adapters, or none."""
        return self.kind in ("adapters off", "adapter copy", "named adapter")

    def keep(self, device: torch.device) -> None:
        """Before training: makes it last, and ready to run on `device`.

        Raises:
            UserError: a policy that trains more than its adapters, or of whose adapters several are active.
        """
        if self.kind != "explicit" and hasattr(self._policy, "disable_adapter"):
            self._refuse_trained_base()
        if self.kind == "initial" and hasattr(self._policy, "disable_adapter"):
            self._copy_adapter()
        elif self.kind == "initial":
            self.model, self.kind = copy.deepcopy(self._policy), "copy"
        if self.model is not None:
            self.model.requires_grad_(False).eval().to(device)

    def _refuse_trained_base(self) -> None:
        outside = trained_outside_adapters(self._policy)
        if not outside:
            return
        remedy = "pass ref_model, or precompute_ref_log_probs=True."
        for name, config in self._policy.peft_config.items():
            how = getattr(config, "bias", "none")
            if how != "none" and all(each.endswith("bias") for each in outside):
                raise UserError(
                    f"the adapter {name!r} trains biases of the base (bias={how!r}), so the model without it is not "
                    f"the one that training began with; set bias='none', {remedy}"
                )
        raise UserError(
            f"{outside[0]}{f' and {len(outside) - 1} more' if outside[1:] else ''} would be trained beside the "
            "adapters, so the model without them is not the one that training began with; freeze it "
            f"(requires_grad_(False)), name it in modules_to_save, {remedy}"
        )

    def _copy_adapter(self) -> None:
        policy = self._policy
        if len(policy.active_adapters) != 1:
            raise UserError(
                f"the model has the active adapters {', '.join(policy.active_adapters)}, and the reference is a copy "
                "of one; activate the one to be trained (model.set_adapter), or pass ref_model."
            )
        (own,) = policy.active_adapters
        config = copy.deepcopy(policy.peft_config[own])
        for name in ("init_lora_weights", "init_weights"):
            if isinstance(getattr(config, name, None), str):  # it would change the base a second time
                setattr(config, name, True)
        trained = _trained(policy)
        policy.add_adapter(ADAPTER, config)
        _copy_values(policy, own, ADAPTER)
        policy.set_adapter(own)
        _train_only(policy, trained)
        self.kind = "adapter copy"

    @contextmanager
    def running(self) -> Iterator[None]:
        if not self._on_the_policy:
            yield
            return
        policy, trained = self._policy, _trained(self._policy)
        try:
            if self.kind == "adapters off":
                with policy.disable_adapter():
                    yield
            else:
                (own,) = policy.active_adapters
                policy.set_adapter(self._adapter)
                try:
                    yield
                finally:
                    policy.set_adapter(own)
        finally:
            _train_only(policy, trained)  # PEFT makes all of what it switches on trainable

    def check_can_move(self) -> None:
        """
        Raises:
            UserError: a reference whose weights are not those of the policy, name by name.
        """
        assert self.model is not None
        own = {name: tuple(value.shape) for name, value in unwrapped(self._policy).named_parameters()}
        other = {name: tuple(value.shape) for name, value in self.model.named_parameters()}
        if own != other:
            name = next(name for name in {**own, **other} if own.get(name) != other.get(name))
            raise UserError(
                f"sync_ref_model=True mixes the policy into ref_model, and {name} is {own.get(name)} there and "
                f"{other.get(name)} here; pass a reference of the same architecture, or none."
            )

    def move(self, policy: Any, share: float) -> None:
        """reference = share * policy + (1 - share) * reference; all processes call it."""
        assert self.model is not None
        moved = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in unwrapped(policy).named_parameters():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                moved[name].lerp_(whole.detach().to(moved[name].device, moved[name].dtype), share)


def check_adapter(model: Any, name: str, option: str) -> None:
    """
    Raises:
        UserError: the model has no such adapter.
    """
    known = getattr(model, "peft_config", {})
    if name not in known:
        has = f"those of the model are: {', '.join(known)}" if known else "the model has none"
        raise UserError(f"{option} is {name!r}, which is no adapter of the model; {has}.")


def activate_adapter(model: Any, args: Any) -> None:
    """Makes args.model_adapter_name the adapter to be trained."""
    name = getattr(args, "model_adapter_name", None)
    if name is None:
        return
    check_adapter(model, name, "model_adapter_name")
    if list(model.active_adapters) != [name]:
        model.set_adapter(name)


def _trained(model: Any) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


def _train_only(model: Any, names: set[str]) -> None:
    for name, value in model.named_parameters():
        if value.requires_grad != (name in names):
            value.requires_grad_(name in names)


def _copy_values(model: Any, old: str, new: str) -> None:
    """Gives an adapter all that another has: its tensors, and what else its layers hold by name (scaling, say)."""
    tensors = {name: (inside, tensor) for name, _, inside, tensor in adapter_tensors(model)}
    for name, (inside, tensor) in tensors.items():
        if old in inside:
            before = name.removesuffix(".".join(inside))
            copied = before + ".".join(_replaced(inside, old, new))
            tensors[copied][1].data.copy_(tensor.data)
    for _, wrapper in adapter_wrappers(model):
        for held in vars(wrapper).values():
            if isinstance(held, dict) and isinstance(held.get(old), int | float | bool):
                held[new] = held[old]


def _replaced(parts: list[str], old: str, new: str) -> list[str]:
    at = parts.index(old)
    return [*parts[:at], new, *parts[at + 1 :]]


def _refuse_shared(policy: Any, reference: Any) -> None:
    """
    Raises:
        UserError: a reference that holds parameters which the policy trains, so that training would move it.
    """
    trained = {place for value in policy.parameters() if value.requires_grad for place in _memory(value)}
    for name, value in (*reference.named_parameters(), *reference.named_buffers()):
        if not trained.isdisjoint(_memory(value)):
            raise UserError(
                f"ref_model and the model share {name}, which is trained, so the reference would move with the "
                "policy; pass a model of its own (copy.deepcopy before adapters are put on, or loaded again), or "
                "leave ref_model out."
            )


def _memory(value: torch.Tensor) -> list[tuple[torch.device, int]]:
    """Where it lies, if anywhere."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if local.is_meta or not local.numel():
        return []
    return [(local.device, local.untyped_storage().data_ptr())]
