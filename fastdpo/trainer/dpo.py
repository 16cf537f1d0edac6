"""DPOTrainer: transformers.Trainer, with packed batches, fused log-probs and a cached reference.

What happens to a batch, top to bottom:

    PreferenceCollator   rows -> PreferenceBatch                             (fastdpo.packing)
    training_step        a batch cut by tokens runs pass by pass             (fastdpo.trainer.passes)
    compute_loss         calls the model with the batch; the model's own forward, extended by `extend_forward`, runs
                         backbone, head and loss, so that wrappers (DDP, FSDP, autocast) see one forward
    batch_loss           completion tokens -> log-probs -> loss              (fastdpo.scoring, fastdpo.models)
    log                  metrics summed on the device are read once          (fastdpo.trainer.metrics)
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from fastdpo.device import freed_memory_kept
from fastdpo.models import (
    causal_lm,
    evaluating,
    extend_forward,
    is_mixture_of_experts,
    position_limit,
)
from fastdpo.packing import PreferenceBatch, PreferenceCollator
from fastdpo.reference import ReferenceCache, model_fingerprint
from fastdpo.reference.cache import default_cache_dir
from fastdpo.reference.fill import about
from fastdpo.scoring import sequence_logps
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.dataset import KEPT, check_data, check_lengths, prepare_dataset
from fastdpo.trainer.metrics import MetricSums, StepFlops, Throughput
from fastdpo.trainer.order import pair_sampler
from fastdpo.trainer.passes import PATIENCE, HostCounts, agree, passes_of, without_exchange
from fastdpo.trainer.reference import has_reference, with_reference
from fastdpo.types import LossOutput, UserError
from fastdpo.verify import choose_packing

logger = logging.getLogger(__name__)

_TINY = 1e-30  # in place of the weight of a step in which no pair weighs anything


class DPOTrainer(Trainer):
    """Trains a causal language model on preference pairs; the constructor is that of TRL's DPOTrainer.

    Args:
        model: a transformers causal LM, a PEFT model, or a name or path.
        ref_model: the reference; default: the policy as it is now (with PEFT: its base, adapters switched off).
        args: a DPOConfig.
        data_collator: default: PreferenceCollator as `args` say.
        train_dataset, eval_dataset: rows of text, messages or token ids (see `fastdpo.data`); `eval_dataset` may be a
            dict of several. Rows that carry `ref_chosen_logps` and `ref_rejected_logps` need no reference.
        processing_class: the tokenizer; default: that of the model's path.
        peft_config: wraps the model in a new adapter.
        quantization_config: for a model given by name.

    Raises:
        ValueError: options, data or model that do not fit together; before any training.
    """

    train_dataset: Any
    eval_dataset: Any
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        if args is None:
            args = DPOConfig(output_dir="dpo-output")
        model = _load(model, args, quantization_config)
        if ref_model is model:
            raise ValueError("ref_model is the model itself; leave it out to use the policy's initial weights.")
        ref_model = None if ref_model is None else _load(ref_model, args, None)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        inner = causal_lm(model)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(inner.config._name_or_path)
        for each in (model, ref_model):
            if each is not None and args.disable_dropout:
                _disable_dropout(each)

        if isinstance(train_dataset, IterableDataset) and args.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={args.train_sampling_strategy!r} needs a data set whose rows can be taken in "
                "any order, and this one is streamed; leave it out."
            )
        prepare = functools.partial(prepare_dataset, tokenizer=processing_class, args=args)
        train_dataset = prepare(train_dataset, name="train") if train_dataset is not None else None
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: prepare(part, name=name) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, name="eval")

        self._losses = args.losses()
        evals = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
        for name, dataset in {"train": train_dataset, **evals}.items():
            check_data(dataset, self._losses, name=name)
        self._metrics = {"train": MetricSums(), "eval": MetricSums()}
        self.ref_model = ref_model
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or PreferenceCollator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # compute_loss divides by the pairs of the whole step itself.
        self.model_accepts_loss_kwargs = True
        self._autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self._throughput = Throughput(args.device)
        self._step_flops = StepFlops.of(inner)
        self._router_aux_loss_coef = _router_aux_loss_coef(inner, args)
        self._host_counts, self._patient_counts = HostCounts(), HostCounts(PATIENCE)
        limit = position_limit(inner)
        for name, dataset in self._named_datasets():
            check_lengths(dataset, limit, args, name=name)
        with self.accelerator.autocast():
            self.packing = choose_packing(inner, args.packing, args.attention_backend)
        if data_collator is None:
            self.data_collator = PreferenceCollator(
                packing=self.packing,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                pad_token_id=processing_class.pad_token_id or 0,
                pad_to_multiple_of=args.padding_multiple,
                max_tokens_per_microbatch=args.max_tokens_per_microbatch,
            )
        self._prepare_reference()
        extend_forward(inner)

    # The reference

    def _prepare_reference(self) -> None:
        """Columns of reference log-probs where they are to be computed ahead; else a frozen model to run beside."""
        self._ref_cache: ReferenceCache | None = None
        if not self._losses.needs_reference:
            return
        if self.args.precompute_ref_log_probs:
            with self._adapters_off():
                fingerprint = model_fingerprint(self._reference, self._autocast_dtype)
            folder = self.args.ref_logps or default_cache_dir(fingerprint)
            self._ref_cache = ReferenceCache(folder, fingerprint, about=about(self._reference))
            if self.train_dataset is not None:
                self.train_dataset = self._with_reference(self.train_dataset)
            if isinstance(self.eval_dataset, Mapping):
                self.eval_dataset = {name: self._with_reference(part) for name, part in self.eval_dataset.items()}
            elif self.eval_dataset is not None:
                self.eval_dataset = self._with_reference(self.eval_dataset)
            return
        if self.ref_model is None and all(has_reference(dataset) for _, dataset in self._named_datasets()):
            return
        if self.ref_model is None and not self._adapters_are_the_policy:
            self.ref_model = copy.deepcopy(self.model)
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False).eval().to(self.args.device)

    def _check_reference_is_left(self) -> None:
        """For a data set that comes later, and whose reference log-probs are not there."""
        if self.ref_model is not None:
            return
        if self._ref_cache is None and not self._adapters_are_the_policy:
            raise ValueError(
                "this evaluation set has no ref_chosen_logps and ref_rejected_logps, as the other data sets do, and "
                "there is no other reference; add the columns, or pass ref_model to the constructor."
            )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self._ref_cache is not None and self.state.global_step and (sharded or not self._adapters_are_the_policy):
            raise ValueError(
                "the reference of this new evaluation set cannot be computed any more: with "
                "precompute_ref_log_probs=True and no ref_model, it was the policy before training; "
                "pass the set to the constructor."
            )

    def _named_datasets(self) -> list[tuple[str, Any]]:
        evals = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"eval": self.eval_dataset}
        return [(name, part) for name, part in {"train": self.train_dataset, **evals}.items() if part is not None]

    def _with_reference(self, dataset: Any) -> Any:
        if has_reference(dataset):
            return dataset
        assert self._ref_cache is not None
        with self._adapters_off(), _lent(self._reference, self.args.device):
            return with_reference(
                dataset,
                self._ref_cache,
                self._reference,
                self.args,
                self._patient_counts,
                packing=self.packing,
                attention_backend=self.args.attention_backend,
                autocast_dtype=self._autocast_dtype,
            )

    @property
    def _reference(self) -> Any:
        return self.model if self.ref_model is None else self.ref_model

    @property
    def _adapters_are_the_policy(self) -> bool:
        """With PEFT and no explicit reference, the reference is the model without its adapters."""
        return self.ref_model is None and hasattr(self.model, "disable_adapter")

    def _adapters_off(self) -> Any:
        return self.model.disable_adapter() if self._adapters_are_the_policy else nullcontext()

    def _online_reference(self, batch: PreferenceBatch) -> Tensor:
        reference = self._reference
        with evaluating(reference), torch.no_grad(), self._adapters_off(), self.accelerator.autocast():
            return sequence_logps(
                reference, batch, attention_backend=self.args.attention_backend, ld_alpha=self.args.ld_alpha
            )

    # The loss

    def _loss_options(self) -> dict[str, Any]:
        return {
            **self.args.loss_arguments(),
            "attention_backend": self.args.attention_backend,
            "reduction": "sum",
            "memory_budget": self.args.memory_budget,
            "router_aux_loss_coef": self._router_aux_loss_coef,
        }

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of the losses of the batch's pairs over the pairs (or their weights) of the whole optimizer step.

        Added up over accumulation steps and averaged over processes, that is the mean over all pairs of the step.
        """
        ref_logps = inputs.get("ref_logps")
        if ref_logps is None and self._losses.needs_reference:
            ref_logps = self._online_reference(inputs)
        fields = model(preference_batch=inputs, ref_logps=ref_logps, loss_options=self._loss_options())
        output = LossOutput.from_dict(fields)
        if inputs.get("weight", 1.0) == 0.0:
            return (output.loss * 0.0, output) if return_outputs else output.loss * 0.0
        mode = "train" if model.training else "eval"
        weight = inputs.total_weight
        mean = output.losses.detach().sum() / max(weight, _TINY)
        metrics = output.metrics() if mode == "train" else {"loss": mean, **output.metrics()}
        self._metrics[mode].add(metrics, inputs.num_pairs, loss=weight)
        if mode == "train":
            self._throughput.count(inputs, self._step_flops(inputs))
        if num_items_in_batch is None:
            loss = output.loss / max(weight, _TINY)
        else:
            loss = output.loss * (self.accelerator.num_processes / max(num_items_in_batch, _TINY))
        return (loss, output) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], float]:
        """The batches of an optimizer step, and what its pairs weigh over all processes: 1 each, or what rows say."""
        return agree(list(itertools.islice(epoch_iterator, num_batches)), self._host_counts)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a batch, pass by pass; gradients are exchanged in the last one only."""
        passes = passes_of(inputs)
        state, sync = self.accelerator.gradient_state, self.accelerator.sync_gradients
        losses = []
        try:
            for part in passes[:-1]:
                state._set_sync_gradients(False)
                with without_exchange(model) if sync else nullcontext():
                    losses.append(super().training_step(model, part, num_items_in_batch))
        finally:
            state._set_sync_gradients(sync)
        losses.append(super().training_step(model, passes[-1], num_items_in_batch))
        return torch.stack(losses).sum()

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        (inputs,), _ = agree([inputs], self._host_counts)
        losses, rewards = [], []
        for part in passes_of(inputs):
            part = self._prepare_inputs(part)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, output = self.compute_loss(model, part, return_outputs=True)
            if part.get("weight", 1.0):
                losses.append(loss * part.total_weight)
                rewards.append(torch.stack([output.chosen_rewards, output.rejected_rewards], dim=1))
        loss = torch.stack(losses).sum() / max(inputs.total_weight, _TINY)
        if prediction_loss_only:
            return loss, None, None
        pairs = torch.cat(rewards)  # (B, 2)
        return loss, pairs, torch.zeros_like(pairs[:, 0], dtype=torch.long)  # the label: column 0 is the chosen

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of the rows that the arguments ask for; random and sequential are transformers' own."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        plain = self.args.train_sampling_strategy in ("random", "sequential")
        if plain and self.args.max_tokens_per_microbatch is None:
            return super()._get_train_sampler(train_dataset)
        batch_size = self._train_batch_size
        step_size = self.get_total_train_batch_size(self.args)
        processes = step_size // (batch_size * self.args.gradient_accumulation_steps)
        self._pair_sampler = pair_sampler(dataset, self.args, self.packing, batch_size, processes)
        return self._pair_sampler

    def get_train_dataloader(self) -> Any:
        self._pair_sampler = None
        loader = super().get_train_dataloader()
        if self._pair_sampler is not None:
            # As accelerate does for its own seeded sampler: so that the epoch reaches it also where several processes
            # resume in the middle of one.
            loader.set_sampler(self._pair_sampler)
        return loader

    # What transformers.Trainer asks of a subclass

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(KEPT)

    def floating_point_ops(self, inputs: Any) -> int:
        return int(sum(map(self._step_flops, passes_of(inputs))))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._step_flops = StepFlops.of(causal_lm(self.model))  # weights may have been frozen since
        self._throughput.restart()
        with freed_memory_kept(self.args.device):
            return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._metrics["train"].take(self._reduce))
            logs["num_tokens"] = self._throughput.total_unshared
            dtype = self._autocast_dtype or causal_lm(self.model).dtype
            logs.update(self._throughput.take(dtype))
        super().log(logs, start_time)

    def _reduce(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, "sum") if self.accelerator.num_processes > 1 else sums

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        with self._throughput.paused():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Our own mean over pairs replaces the mean over batches, which counts a small last batch as a full one.
        means = self._metrics["eval"].take(self._reduce)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if eval_dataset is not None and not isinstance(eval_dataset, str | Mapping):
            eval_dataset = prepare_dataset(eval_dataset, self.processing_class, self.args, name="eval")
            check_data(eval_dataset, self._losses, name="eval")
            if self._losses.needs_reference and not has_reference(eval_dataset):
                self._check_reference_is_left()
                if self._ref_cache is not None:
                    eval_dataset = self._with_reference(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._throughput.paused():
            super()._save_checkpoint(*args, **kwargs)


def _load(model: Any, args: DPOConfig, quantization_config: Any) -> Any:
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError("quantization_config is for a model given by name; load this one quantized instead.")
        return model
    options: dict[str, Any] = {"dtype": "float32", "trust_remote_code": args.trust_remote_code}
    options.update(args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {})
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return AutoModelForCausalLM.from_pretrained(model, **options)


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


def _disable_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 (not every module has it)


def _router_aux_loss_coef(model: Any, args: DPOConfig) -> float:
    """The weight of the load-balancing loss: that of `args`, or of the model's config; 0 without experts."""
    experts = is_mixture_of_experts(model)
    if args.router_aux_loss_coef is None:
        return float(getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) or 0.0) if experts else 0.0
    if args.router_aux_loss_coef and not experts:
        raise UserError(
            f"router_aux_loss_coef={args.router_aux_loss_coef} is for a mixture of experts, and {type(model).__name__} "
            "is none; leave it out."
        )
    return args.router_aux_loss_coef
