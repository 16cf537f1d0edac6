"""Options of a DPO run: those of transformers.TrainingArguments, TRL's names and defaults, and a few of our own."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from fastdpo.attention import BACKENDS
from fastdpo.losses import WeightedLosses, resolve_losses
from fastdpo.packing import PACKINGS
from fastdpo.packing.collator import TRUNCATION_MODES

logger = logging.getLogger(__name__)

SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length", "group_by_prompt", "batch_rebalance")

# Options of TRL's DPOConfig that fastdpo does not carry out yet: the value that changes nothing, and what to do.
_NOT_YET: dict[str, tuple[Any, str]] = {
    "activation_offloading": (False, "leave it off; gradient_checkpointing=True saves activation memory"),
    "sync_ref_model": (False, "leave it off; the reference stays fixed"),
}


def _options_of(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f'loss_options is {text!r}; it must be a JSON object, as in {{"simpo_gamma": 1.0}}.')
    return options


def _help(text: str, default: Any = None, **kwargs: Any) -> Any:
    if "default_factory" in kwargs:
        return field(metadata={"help": text}, **kwargs)
    return field(default=default, metadata={"help": text})


@dataclass
class DPOConfig(TrainingArguments):
    """TrainingArguments with what preference training adds.

    Defaults that differ from TrainingArguments are TRL's: learning_rate 1e-6, logging_steps 10, gradient_checkpointing
    True, bf16 unless fp16 (on a machine without bfloat16, where TRL raises, float32). An option that cannot be honoured
    raises ValueError here, not in the middle of a run.
    """

    learning_rate: float = _help("Peak learning rate of AdamW.", 1e-6)
    logging_steps: float = _help("Log every so many steps; below 1, a share of all steps.", 10)
    gradient_checkpointing: bool = _help("Recompute activations in the backward to save memory.", True)
    bf16: bool | None = _help("Mixed precision in bfloat16; unset, on where the GPU has it, unless fp16 is.", None)

    loss_type: list[str] = _help("Losses, by name; several are added up.", default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = _help("A weight for each of several losses.", None)
    beta: float = _help("Strength of the pull towards the reference.", 0.1)
    label_smoothing: float = _help("Share of pairs taken to be labelled the wrong way round, in [0, 0.5].", 0.0)

    max_length: int | None = _help("Longest prompt + completion in tokens; unset, no limit.", 1024)
    truncation_mode: str = _help("Which end of a longer sequence stays: keep_start or keep_end.", "keep_start")
    packing: str = _help(
        "How a batch runs: prefix (each prompt once), varlen (no padding), padded, or auto, the first of these that "
        "gives this model's own log-probs.", "auto")  # fmt: skip
    attention_backend: str = _help("Attention of packed rows: auto, flash_attn, torch_varlen, flex or sdpa.", "auto")
    max_tokens_per_microbatch: int | None = _help(
        "Cut each batch into forward passes of at most so many tokens, the same number of passes on every process; the "
        "gradient stays that of the whole batch. A longer pair runs alone.", None)  # fmt: skip
    train_sampling_strategy: str = _help(
        "Order of the training rows: random, sequential, group_by_length (rows of like length in a step), "
        "group_by_prompt (rows with one prompt side by side, so that packing shares it), batch_rebalance (random, with "
        "each step's rows dealt out so that every pass takes about the same tokens).", "random")  # fmt: skip
    padding_free: bool = _help("TRL's name for running without padding, which packing does.", False)
    pad_to_multiple_of: int | str | None = _help("For packing=padded: pad to a multiple of this.", "auto")
    memory_budget: int | None = _help("Bytes for logits; unset, an eighth of the free memory (64 MiB on a CPU).", None)

    precompute_ref_log_probs: bool = _help(
        "Compute the reference log-probs once, before training, and keep them on disk; no reference model in memory.",
        False)  # fmt: skip
    precompute_ref_batch_size: int | None = _help("Prompts per forward pass of that, at most.", None)
    ref_logps: str | None = _help("Folder of the reference cache; implies precompute_ref_log_probs.", None)

    disable_dropout: bool = _help("Switch dropout off in policy and reference.", True)
    dataset_num_proc: int | None = _help("Processes that tokenize the data set.", None)
    model_init_kwargs: dict[str, Any] | str | None = _help("Keywords of from_pretrained, for a model given by name.")
    trust_remote_code: bool = _help("Let a model given by name run code of its own.", False)

    router_aux_loss_coef: float | None = _help(
        "Weight of a mixture of experts' load-balancing loss; unset, that of the model's config.", None)  # fmt: skip
    f_divergence_type: str = _help(
        "The f-divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence.", "reverse_kl")  # fmt: skip
    f_alpha_divergence_coef: float = _help("alpha of f_divergence_type=alpha_divergence.", 0.5)
    ld_alpha: float | None = _help("Weight of tokens beyond the pair's shorter answer, in [0, 1] (LD-DPO).", None)
    use_weighting: bool = _help("Weigh pairs by how likely the policy is to give both answers (WPO).", False)
    discopop_tau: float = _help("For the loss discopop.", 0.05)
    reference_free: bool = _help("Take the reference's log-probs as 0.", False)
    loss_options: dict[str, Any] | str | None = _help(
        "Further options of the losses, by name, as fastdpo.list_losses() has them (dpop_lambda, simpo_gamma, "
        "cpo_alpha, your own).", None)  # fmt: skip
    activation_offloading: bool = _help("Not supported yet.", False)
    sync_ref_model: bool = _help("Not supported yet.", False)
    ref_model_mixup_alpha: float = _help("For sync_ref_model.", 0.6)
    ref_model_sync_steps: int = _help("For sync_ref_model.", 512)

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if isinstance(self.loss_options, str):  # from the command line
            self.loss_options = _options_of(self.loss_options)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        # Newer transformers call it activation_checkpointing; the older name, which scripts use, stays good.
        for new, old in (
            ("activation_checkpointing", "gradient_checkpointing"),
            ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        ):
            if getattr(self, new, old) is None:
                setattr(self, new, getattr(self, old))
        if self.ref_logps is not None:
            self.precompute_ref_log_probs = True
        self._check()
        super().__post_init__()
        self._use_one_gpu()
        # One process would read the batches of a streamed data set and cut them up for the others, by their first
        # dimension: a packed row cannot be cut so. Every process reads its own share instead.
        if self.accelerator_config.dispatch_batches:
            raise ValueError("dispatch_batches=True would cut packed rows apart; leave it out of accelerator_config.")
        if self.accelerator_config.split_batches:
            raise ValueError(
                "split_batches=True would cut packed rows apart; leave it out of accelerator_config and set "
                "per_device_train_batch_size to what each device is to take."
            )
        self.accelerator_config.dispatch_batches = False

    def _use_one_gpu(self) -> None:
        """DataParallel, which transformers takes for several GPUs in one process, would cut packed rows apart."""
        if self.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible to this one process, which uses the first; start the script by "
                "`accelerate launch` or `torchrun` to use them all.", self.n_gpu,
            )  # fmt: skip
            self._n_gpu = 1

    @property
    def padding_multiple(self) -> int | None:
        """`pad_to_multiple_of` as a number; "auto" pads to the longest."""
        if self.pad_to_multiple_of is None or str(self.pad_to_multiple_of).lower() in ("auto", "none"):
            return None
        return int(self.pad_to_multiple_of)

    def loss_arguments(self) -> dict[str, Any]:
        """What the losses are resolved from: keywords of `fastdpo.linear_loss`."""
        own = {
            name: getattr(self, name)
            for name in (
                "loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef",
                "ld_alpha", "use_weighting", "discopop_tau", "reference_free",
            )
        }  # fmt: skip
        further = self.loss_options or {}
        assert isinstance(further, dict)
        twice = [name for name in further if name in own]
        if twice:
            raise ValueError(f"loss_options has {twice[0]!r}, which is a field of the config; set {twice[0]} there.")
        return own | further

    def losses(self) -> WeightedLosses:
        """The losses with their options; raises ValueError where they do not fit."""
        return resolve_losses(**self.loss_arguments())

    def _check(self) -> None:
        for name, (neutral, remedy) in _NOT_YET.items():
            value = getattr(self, name)
            if value != neutral:
                raise ValueError(f"{name}={value!r} is not supported by this version of fastdpo; {remedy}.")
        losses = self.losses()
        if losses.data not in ("pairs", "lists"):
            raise ValueError(
                f"loss_type {self.loss_type} is a loss of {losses.data}; DPOTrainer trains on pairs and ranked lists."
            )
        if losses.reference_free and self.precompute_ref_log_probs:
            raise ValueError(
                "reference_free=True and precompute_ref_log_probs=True (or ref_logps) contradict each other; leave one "
                "of them out."
            )
        choices = {
            "train_sampling_strategy": SAMPLING_STRATEGIES,
            "packing": ("auto", *PACKINGS),
            "truncation_mode": TRUNCATION_MODES,
            "attention_backend": ("auto", *BACKENDS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of: {', '.join(allowed)}.")
        if self.padding_free and self.packing == "padded":
            raise ValueError("padding_free=True and packing='padded' contradict each other; leave one of them out.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; it must be at least 2, or None for no limit.")
        if self.max_tokens_per_microbatch is not None:
            if self.max_tokens_per_microbatch < 1:
                raise ValueError(
                    f"max_tokens_per_microbatch is {self.max_tokens_per_microbatch}; it must be above 0, or None."
                )
            if not losses.per_pair:
                raise ValueError(
                    f"max_tokens_per_microbatch={self.max_tokens_per_microbatch} would change loss_type "
                    f"{self.loss_type}, which compares the pairs of a whole batch; leave it out."
                )
        if self.router_aux_loss_coef is not None and self.router_aux_loss_coef < 0:
            raise ValueError(f"router_aux_loss_coef is {self.router_aux_loss_coef}; it must be 0 or above.")
        if self.memory_budget is not None and self.memory_budget <= 0:
            raise ValueError(f"memory_budget is {self.memory_budget}; it must be a number of bytes above 0, or None.")
