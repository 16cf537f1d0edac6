"""Options of a run: those of transformers.TrainingArguments, TRL's names and defaults, and a few of our own."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from fastdpo.attention import BACKENDS
from fastdpo.losses import WeightedLosses, resolve_losses
from fastdpo.packing import PACKINGS
from fastdpo.packing.collator import TRUNCATION_MODES
from fastdpo.trainer.meaningless import check_processes, check_supported
from fastdpo.trainer.old_names import OldNames, carry_over, hidden_names

logger = logging.getLogger(__name__)

NAN_LOSS = ("stop", "skip")
SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length", "group_by_prompt", "batch_rebalance")


def _options_of(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f'loss_options is {text!r}; it must be a JSON object, as in {{"simpo_gamma": 1.0}}.')
    return options


def option(text: str, default: Any = None, **kwargs: Any) -> Any:
    if "default_factory" in kwargs:
        return field(metadata={"help": text}, **kwargs)
    return field(default=default, metadata={"help": text})


@dataclass
class PreferenceConfig(OldNames, TrainingArguments):
    """TrainingArguments with what every trainer of preferences adds.

    Defaults that differ from TrainingArguments are TRL's: learning_rate 1e-6, logging_steps 10, gradient_checkpointing
    True, bf16 unless fp16 (on a machine without bfloat16, where TRL raises, float32); and logging_nan_inf_filter is
    off, for it waits for the device in every pass and hides what `nan_loss` is there to tell. An option that cannot be
    honoured raises ValueError here, not in the middle of a run.
    """

    # Those that a command line gives as JSON.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    learning_rate: float = option("Peak learning rate of AdamW.", 1e-6)
    logging_steps: float = option("Log every so many steps; below 1, a share of all steps.", 10)
    logging_nan_inf_filter: bool = option("Leave losses that are no numbers out of the logged mean.", False)
    gradient_checkpointing: bool = option("Recompute activations in the backward to save memory.", True)
    bf16: bool | None = option("Mixed precision in bfloat16; unset, on where the GPU has it, unless fp16 is.", None)

    max_length: int | None = option("Longest prompt + completion in tokens; unset, no limit.", 1024)
    truncation_mode: str = option("Which end of a longer sequence stays: keep_start or keep_end.", "keep_start")
    max_prompt_length: int | None = option(
        "Deprecated: prompts keep their last so many tokens; use max_length.", None)  # fmt: skip
    max_completion_length: int | None = option(
        "Deprecated: answers keep their first so many tokens; use max_length.", None)  # fmt: skip
    packing: str = option(
        "How a batch runs: prefix (each prompt once), varlen (no padding), padded, or auto, the first of these that "
        "gives this model's own log-probs.", "auto")  # fmt: skip
    attention_backend: str = option("Attention of packed rows: auto, flash_attn, torch_varlen, flex or sdpa.", "auto")
    max_tokens_per_microbatch: int | None = option(
        "Cut each batch into forward passes of at most so many tokens, the same number of passes on every process; the "
        "gradient stays that of the whole batch. A longer pair runs alone.", None)  # fmt: skip
    train_sampling_strategy: str = option(
        "Order of the training rows: random, sequential, group_by_length (rows of like length in a step), "
        "group_by_prompt (rows with one prompt side by side, so that packing shares it), batch_rebalance (random, with "
        "each step's rows dealt out so that every pass takes about the same tokens).", "random")  # fmt: skip
    pad_to_multiple_of: int | str | None = option("For packing=padded: pad to a multiple of this.", "auto")
    pad_token: str | None = option(
        "The padding token, where the tokenizer has none; unset, its end-of-text token.", None
    )
    memory_budget: int | None = option(
        "Bytes for logits. Unset, a run chooses once and keeps to it, also when it is resumed: on a CPU 64 MiB; on a "
        "GPU an eighth of what gradients and optimizer leave free, but at least 4096 tokens where half of it holds "
        "them.", None)  # fmt: skip
    nan_loss: str = option(
        "What a loss or gradient does that is no finite number: stop (seen when it is logged or saved; the step's rows "
        "are written to output_dir/nan_rows.jsonl) or skip (no update in that step; waits for the device each step).",
        "stop")  # fmt: skip
    show_generations: int = option(
        "Print the model's greedy answers to so many prompts of the evaluation (else the training) data before and "
        "after training, and write them to output_dir/generations.jsonl.", 0)  # fmt: skip

    disable_dropout: bool = option("Switch dropout off in policy and reference.", True)
    dataset_num_proc: int | None = option("Processes that tokenize the data set.", None)
    model_init_kwargs: dict[str, Any] | str | None = option("Keywords of from_pretrained, for a model given by name.")
    trust_remote_code: bool = option("Let a model given by name run code of its own.", False)
    router_aux_loss_coef: float | None = option(
        "Weight of a mixture of experts' load-balancing loss; unset, that of the model's config.", None)  # fmt: skip
    master_weights: bool = option(
        "Keep float32 copies of bfloat16 or float16 weights for the optimizer to step, so that no small update is "
        "rounded away; 4 bytes a number more.", False)  # fmt: skip
    activation_offloading: bool = option("Keep activations in the host's memory between forward and backward.", False)

    def __post_init__(self) -> None:
        carry_over(self)
        check_supported(self)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        # Newer transformers call it activation_checkpointing; the older name, which scripts use, stays good.
        for new, old in (
            ("activation_checkpointing", "gradient_checkpointing"),
            ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        ):
            if getattr(self, new, old) is None:
                setattr(self, new, getattr(self, old))
        self._check()
        for name in ("max_prompt_length", "max_completion_length"):
            if getattr(self, name) is not None:
                warnings.warn(
                    f"{name} is deprecated: max_length bounds prompt and answer together; cut or drop longer rows in "
                    "the data.", FutureWarning, stacklevel=3,
                )  # fmt: skip
        self._check_precision()
        super().__post_init__()
        self._use_one_gpu()
        check_processes(self)
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
        # Nothing waits for the copies of batches in pinned memory.
        self.accelerator_config.non_blocking = self.dataloader_pin_memory

    def _check_precision(self) -> None:
        if self.bf16 and not self.use_cpu and not (is_torch_bf16_gpu_available() or is_torch_xla_available()):
            raise ValueError(
                "bf16=True needs a GPU that computes in bfloat16, and there is none here; set bf16=False to train in "
                "float32, or use_cpu=True to train on the CPU in bfloat16."
            )

    def _use_one_gpu(self) -> None:
        """DataParallel, which transformers takes for several GPUs in one process, would cut packed rows apart."""
        if self.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible to this one process, which uses the first; start the script by "
                "`accelerate launch` or `torchrun` to use them all.", self.n_gpu,
            )  # fmt: skip
            self._n_gpu = 1

    def to_dict(self) -> dict[str, Any]:
        hidden = hidden_names(self)
        return {name: value for name, value in super().to_dict().items() if name not in hidden}

    def __str__(self) -> str:
        hidden = hidden_names(self)
        return "".join(line for line in super().__str__().splitlines(True) if line.split("=")[0] not in hidden)

    @property
    def padding_multiple(self) -> int | None:
        """`pad_to_multiple_of` as a number; "auto" pads to the longest."""
        if self.pad_to_multiple_of is None or str(self.pad_to_multiple_of).lower() in ("auto", "none"):
            return None
        return int(self.pad_to_multiple_of)

    def losses(self) -> WeightedLosses:
        """The losses with their options; raises ValueError where they do not fit."""
        return resolve_losses(**self.loss_arguments())

    def loss_arguments(self) -> dict[str, Any]:
        """What the losses are resolved from: keywords of `fastdpo.linear_loss`."""
        raise NotImplementedError

    def _check(self) -> None:
        losses = self.losses()
        choices = {
            "train_sampling_strategy": SAMPLING_STRATEGIES,
            "packing": ("auto", *PACKINGS),
            "truncation_mode": TRUNCATION_MODES,
            "attention_backend": ("auto", *BACKENDS),
            "nan_loss": NAN_LOSS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of: {', '.join(allowed)}.")
        least = {
            "max_length": 2, "max_prompt_length": 1, "max_completion_length": 1, "max_tokens_per_microbatch": 1,
            "memory_budget": 1, "router_aux_loss_coef": 0, "show_generations": 0,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}, or None.")
        if self.max_tokens_per_microbatch is not None and not (losses.per_pair and not losses.needs_kl):
            raise ValueError(
                f"max_tokens_per_microbatch={self.max_tokens_per_microbatch} would change loss_type {losses.names}, "
                "which needs a whole batch at once; leave it out."
            )
        if self.nan_loss == "skip" and (self.fp16 or self.deepspeed):
            what = "fp16=True" if self.fp16 else "deepspeed"
            raise ValueError(f"nan_loss='skip' and {what} contradict each other: that one skips steps by itself; leave "
                             "nan_loss at 'stop'.")  # fmt: skip
        check_parallelism(getattr(self, "parallelism_config", None))


def check_parallelism(parallelism_config: Any) -> None:
    """That processes share out rows and shards of weights, nothing else.

    Raises:
        ValueError: context, sequence or tensor parallelism.
    """
    names = ("cp_size", "sp_size", "tp_size")
    sizes = {name: size for name in names if (size := getattr(parallelism_config, name, None)) and size > 1}
    if sizes:
        raise ValueError(
            f"parallelism_config has {', '.join(f'{name}={size}' for name, size in sizes.items())}: a packed row and "
            "its head cannot be cut among processes; use data parallelism (FSDP2 shards the weights), and "
            "max_tokens_per_microbatch for long rows."
        )


@dataclass
class ReferenceConfig(PreferenceConfig):
    """What trainers with a reference model add."""

    precompute_ref_log_probs: bool = option(
        "Compute the reference log-probs once, before training, and keep them on disk; no reference model in memory.",
        False)  # fmt: skip
    precompute_ref_batch_size: int | None = option("Prompts per forward pass of that, at most.", None)
    ref_logps: str | None = option("Folder of the reference cache; implies precompute_ref_log_probs.", None)
    sync_ref_model: bool = option(
        "Move the reference towards the policy every ref_model_sync_steps steps: it becomes ref_model_mixup_alpha "
        "times the policy plus the rest of itself.", False)  # fmt: skip
    model_adapter_name: str | None = option("PEFT adapter to train, of a model that has several.", None)
    ref_adapter_name: str | None = option("PEFT adapter of the same model under which it is the reference.", None)
    ref_model_init_kwargs: dict[str, Any] | str | None = option(
        "Keywords of from_pretrained, for a ref_model given by name; unset, model_init_kwargs.")  # fmt: skip
    ref_model_mixup_alpha: float = option("For sync_ref_model: the policy's share, in [0, 1].", 0.6)
    ref_model_sync_steps: int = option("For sync_ref_model.", 512)

    _VALID_DICT_FIELDS = [*PreferenceConfig._VALID_DICT_FIELDS, "ref_model_init_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        if self.ref_logps is not None:
            self.precompute_ref_log_probs = True
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        if self.precompute_ref_batch_size is not None and not self.precompute_ref_log_probs:
            raise ValueError(
                f"precompute_ref_batch_size={self.precompute_ref_batch_size} has no meaning without "
                "precompute_ref_log_probs=True; set that, or leave it out."
            )
        if not self.sync_ref_model:
            for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
                if getattr(self, name) != self.__dataclass_fields__[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no meaning without sync_ref_model=True; set that, or leave "
                        "it out."
                    )
            return
        if self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model=True moves the reference, and precompute_ref_log_probs=True (or ref_logps) computes "
                "its log-probs once; leave one of them out."
            )
        if not self.losses().needs_reference:
            raise ValueError(
                f"sync_ref_model=True has no meaning for loss_type {self.losses().names} without reference."
            )
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha is {self.ref_model_mixup_alpha}; it must lie in [0, 1].")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps is {self.ref_model_sync_steps}; it must be at least 1.")


@dataclass
class DPOConfig(ReferenceConfig):
    """Options of DPOTrainer: names and defaults of TRL's DPOConfig, and a few of our own (PreferenceConfig)."""

    loss_type: list[str] = option("Losses, by name; several are added up.", default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = option("A weight for each of several losses.", None)
    beta: float = option("Strength of the pull towards the reference.", 0.1)
    label_smoothing: float = option("Share of pairs taken to be labelled the wrong way round, in [0, 0.5].", 0.0)
    f_divergence_type: str = option(
        "The f-divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence.", "reverse_kl")  # fmt: skip
    f_alpha_divergence_coef: float = option("alpha of f_divergence_type=alpha_divergence.", 0.5)
    ld_alpha: float | None = option("Weight of tokens beyond the pair's shorter answer, in [0, 1] (LD-DPO).", None)
    use_weighting: bool = option("Weigh pairs by how likely the policy is to give both answers (WPO).", False)
    discopop_tau: float = option("For the loss discopop.", 0.05)
    reference_free: bool = option("Take the reference's log-probs as 0.", False)
    rpo_alpha: float | None = option('Deprecated: adds the loss "sft" with this weight.', None)
    loss_options: dict[str, Any] | str | None = option(
        "Further options of the losses, by name, as fastdpo.list_losses() has them (dpop_lambda, simpo_gamma, "
        "cpo_alpha, your own).", None)  # fmt: skip
    padding_free: bool = option("TRL's name for running without padding, which packing does.", False)

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if isinstance(self.loss_options, str):  # from the command line
            self.loss_options = _options_of(self.loss_options)
        if self.rpo_alpha is not None:
            warnings.warn(
                "rpo_alpha is deprecated: mix the losses, as in loss_type=['sigmoid', 'sft'], loss_weights=[1.0, "
                f"{self.rpo_alpha}].", FutureWarning, stacklevel=3,
            )  # fmt: skip
            if "sft" in self.loss_type:
                raise ValueError(
                    f"rpo_alpha={self.rpo_alpha} adds the loss 'sft', which loss_type has; drop rpo_alpha."
                )
            self.loss_weights = [*(self.loss_weights or [1.0] * len(self.loss_type)), self.rpo_alpha]
            self.loss_type = [*self.loss_type, "sft"]
            self.rpo_alpha = None  # said once: a config built from this one's fields is the same
        super().__post_init__()

    def loss_arguments(self) -> dict[str, Any]:
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

    def _check(self) -> None:
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
        if self.padding_free and self.packing == "padded":
            raise ValueError("padding_free=True and packing='padded' contradict each other; leave one of them out.")
        super()._check()


@dataclass
class ReferenceFreeConfig(PreferenceConfig):
    """What trainers without a reference share with TRL's, and do not carry out: the reason is told."""

    padding_value: int | None = option("Deprecated: the padding token's id; use pad_token.", None)
    generate_during_eval: bool = option("Not supported; use show_generations.", False)
    is_encoder_decoder: bool | None = option("Only None or False: encoder-decoders have no causal rows to pack.", None)
