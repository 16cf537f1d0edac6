"""The engine of all trainers: transformers.Trainer, with packed batches, fused log-probs and a cached reference.

What happens to a batch, top to bottom:

    PreferenceCollator   rows -> PreferenceBatch                             (fastdpo.packing)
    training_step        a batch cut by tokens runs pass by pass             (fastdpo.trainer.passes)
    compute_loss         calls the model with the batch; the model's own forward, extended by `extend_forward`, runs
                         backbone, head and loss, so that wrappers (DDP, FSDP, autocast) see one forward
    batch_loss           completion tokens -> log-probs -> loss              (fastdpo.scoring, fastdpo.models)
    log                  metrics summed on the device are read once          (fastdpo.trainer.metrics)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import AutoModelForCausalLM, EvalPrediction, set_seed
from transformers.trainer_utils import number_of_arguments

from fastdpo.groups import looked_at
from fastdpo.models import (
    causal_lm,
    evaluating,
    extend_forward,
    is_mixture_of_experts,
    position_limit,
    through_forward,
    vocabulary_size,
    weights_as_trained,
)
from fastdpo.packing import MicroBatches, PreferenceBatch, PreferenceCollator
from fastdpo.packing.groups import FILLER
from fastdpo.trainer import policy
from fastdpo.trainer.config import PreferenceConfig, check_parallelism
from fastdpo.trainer.dataset import (
    KEPT,
    check_data,
    check_kind,
    check_lengths,
    check_weights,
    no_row_left,
    prepare_dataset,
    within_vocabulary,
)
from fastdpo.trainer.even_rows import EvenRows, EvenStream
from fastdpo.trainer.head_memory import choose_budget
from fastdpo.trainer.kept_reference import KeptReference, activate_adapter
from fastdpo.trainer.lent_model import LentModel, without_autocast
from fastdpo.trainer.master_weights import LostUpdates, kept_in_float32
from fastdpo.trainer.metrics import MetricSums, StepFlops, Throughput
from fastdpo.trainer.neftune import EmbeddingNoise
from fastdpo.trainer.order import pair_sampler
from fastdpo.trainer.passes import PATIENCE, HostCounts, activations_on_host, agree, passes_of, without_exchange
from fastdpo.trainer.preflight import check_run, check_saving
from fastdpo.trainer.referenced import ReferencedTrainer
from fastdpo.trainer.run_state import RunCallback
from fastdpo.trainer.workers import PatientWorker
from fastdpo.types import LossOutput, UserError
from fastdpo.verify import choose_packing

_NO_ROW = -1  # the label of what stands in the predictions for no row of the data set
_TINY = 1e-30  # in place of the weight of a step in which no pair weighs anything


class PreferenceTrainer(ReferencedTrainer):
    """Trains a model on preferences; the trainers with names of their own say on which, with which losses.

    Args:
        model: a transformers causal LM, a PEFT model, or a name or path.
        args: a config of this trainer's.
        ref_model: the reference; default: the policy as it is now. With PEFT that is its base, adapters switched off,
            unless the adapters have learnt something, or changed the base: then a frozen copy of them.
        data_collator: default: PreferenceCollator as `args` say.
        train_dataset, eval_dataset: rows of text, messages or token ids (see `fastdpo.data`); `eval_dataset` may be a
            dict of several. Rows that carry the reference's sums need no reference.
        processing_class: the tokenizer; default: that of the model's path.
        peft_config: wraps the model in a new adapter.
        quantization_config: for a model given by name.
        model_init: in place of the model: makes one for each call of `train`, as a search for hyperparameters needs.

    Raises:
        ValueError: options, data or model that do not fit together; before any training.
    """

    args: PreferenceConfig
    train_dataset: Any
    eval_dataset: Any
    _signature_columns: list[str] | None
    compute_metrics: Any
    _auto_class: ClassVar[Any] = AutoModelForCausalLM
    _tags: ClassVar[list[str]] = ["fastdpo"]

    def __init__(
        self,
        model: Any,
        args: PreferenceConfig,
        *,
        ref_model: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        model_init: Any = None,
        **options: Any,
    ) -> None:
        set_seed(args.seed)  # adapters begin with random weights
        if model_init is not None:
            model = model_init(*[None] * number_of_arguments(model_init))
        self._peft_config = peft_config
        model = policy.load(model, args, quantization_config, auto_class=self._auto_class)
        if ref_model is model:
            raise ValueError("ref_model is the model itself; leave it out to use the policy's initial weights.")
        if ref_model is not None and args.losses().reference_free:
            raise ValueError("reference_free=True and ref_model contradict each other; leave one of them out.")
        own = _without_keywords(args, ref_model)
        ref_model = None if ref_model is None else policy.load(ref_model, own)
        if ref_model is not None and args.disable_dropout:
            policy.disable_dropout(ref_model)
        model, processing_class = self._ready_policy(model, processing_class, args)
        inner = self._inner(model)
        _check_streamed(train_dataset, args)
        if args.use_liger_kernel:  # layers only: its fused loss would take the place of the head
            args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}

        check_saving(model, inner, args)
        self._losses = args.losses()
        self._vocabularies = {"the model": vocabulary_size(inner)}
        if ref_model is not None:
            self._vocabularies["ref_model"] = vocabulary_size(self._inner(ref_model))
        check_kind(train_dataset, "train_dataset")
        train_dataset = self._prepared(train_dataset, processing_class, args, "train")
        for part in eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]:
            check_kind(part, "eval_dataset")
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {
                name: self._prepared(part, processing_class, args, name) for name, part in eval_dataset.items()
            }
        else:
            eval_dataset = self._prepared(eval_dataset, processing_class, args, "eval")
        self._metrics = {"train": MetricSums(), "eval": MetricSums()}
        self._lent_model: LentModel | None = None
        # Bytes that logits may take, None until the first pass chooses: see `fastdpo.trainer.head_memory`.
        self.memory_budget: int | None = args.memory_budget
        caches = inner.config.use_cache if hasattr(inner.config, "use_cache") else None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or PreferenceCollator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **options,
        )
        self.model_init = model_init
        if caches is not None:  # which transformers switches off for good; no pass of ours asks for a cache
            inner.config.use_cache = caches
        # Instead of transformers' own noise, which depends on how a batch is packed.
        self._noise = None if args.neftune_noise_alpha is None else EmbeddingNoise(args.neftune_noise_alpha)
        self.neftune_noise_alpha = None
        # compute_loss divides by the pairs of the whole step itself.
        self.model_accepts_loss_kwargs = True
        # The launcher's word counts, too.
        precisions = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self._autocast_dtype = precisions.get(str(self.accelerator.mixed_precision))
        check_parallelism(self.accelerator.parallelism_config)
        self._throughput = Throughput(args.device)
        self._step_flops = self._flops_of(inner)
        self.router_aux_loss_coef = _router_aux_loss_coef(inner, args)
        self._host_counts, self._patient_counts = HostCounts(), HostCounts(PATIENCE)
        limit = position_limit(inner)
        for name, dataset in self._named_datasets():
            check_lengths(dataset, limit, args, name=name)
        with self.accelerator.autocast():
            self.packing = self._choose_packing(self.model)
        if data_collator is None:
            self.data_collator = self._collator()
        self._reference = KeptReference(
            self.model,
            ref_model,
            new_adapter=_is_plain_adapter(peft_config, self.model),
            adapter=getattr(args, "ref_adapter_name", None),
        )
        self._prepare_reference()
        if hasattr(inner, "add_model_tags"):
            inner.add_model_tags(self._tags)
        self.add_callback(RunCallback(self))
        self.add_callback(LostUpdates(self))
        check_run(self)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with kept_in_float32(self):
            return super().create_optimizer(*args, **kwargs)

    def _ready_policy(self, model: Any, processing_class: Any, args: Any) -> tuple[Any, Any]:
        """(the model with adapters, as this trainer takes it; the tokenizer)"""
        if self._peft_config is not None:
            model = policy.with_adapter(model, self._peft_config)
        activate_adapter(model, args)
        inner = self._inner(model)
        for each in (model, inner):
            without_autocast(each)  # that a trainer before this one has left on it
        policy.check_adapters(model, inner)
        processing_class = policy.prepare_tokenizer(processing_class, inner, args)
        if args.disable_dropout:
            policy.disable_dropout(model)
        return model, processing_class

    def call_model_init(self, trial: Any = None) -> Any:
        """The model that a call of `train` begins with: `model_init` makes it anew for each."""
        model = policy.load(super().call_model_init(trial), self.args, auto_class=self._auto_class)
        self.model, _ = self._ready_policy(model, self.processing_class, self.args)
        self._losses = self.args.losses()  # a search may have changed beta
        inner = self._inner(self.model)
        with self.accelerator.autocast():
            packing = self._choose_packing(self.model)
        if packing != self.packing:
            raise UserError(
                f"model_init made a model that runs with packing={packing!r}, and the first one with {self.packing!r}; "
                "set packing to what serves all of them."
            )
        self._step_flops = self._flops_of(inner)
        self._lending.enter_context(self._model_lent())
        self._lending.enter_context(weights_as_trained(self.model))
        return self.model

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the load-balancing loss of a mixture of experts is part of the loss, and logged as `aux_loss`."""
        return self.router_aux_loss_coef != 0.0

    # What depends on the kind of model; RewardTrainer's has another head.

    def _inner(self, model: Any) -> Any:
        """The transformers model inside adapters and wrappers."""
        return causal_lm(model)

    def _choose_packing(self, model: Any) -> str:
        return choose_packing(model, self.args.packing, self.args.attention_backend)

    def _extend(self, inner: Any) -> None:
        """Lets the model's own forward take a batch, for `compute_loss`."""
        extend_forward(inner)

    def _flops_of(self, inner: Any) -> StepFlops:
        return StepFlops.of(inner)

    @contextmanager
    def _model_lent(self) -> Iterator[None]:
        """Within it the policy, and a reference that came as a model, are what training and evaluation need."""
        if self._lent_model is None or self._lent_model.model is not self.model:
            inner, reference = self._inner(self.model), self._reference.model
            packed = [] if self.packing == "padded" else [inner, *([] if reference is None else [causal_lm(reference)])]
            self._lent_model = LentModel(self.model, inner, self._extend, self._noise, packed, sharded=self._is_sharded)
        with self._lent_model.lent():
            yield

    def _metrics_of(self, output: LossOutput) -> dict[str, Tensor]:
        """Means over a pass's pairs, under the names that are logged."""
        return output.metrics()

    def _prepared(self, dataset: Any, tokenizer: Any, args: Any, name: str) -> Any:
        """A data set of token ids, checked against the losses."""
        if dataset is None:
            return None
        prepared = prepare_dataset(dataset, getattr(tokenizer, "tokenizer", tokenizer), args, name=name)
        check_data(prepared, self._losses, name=name)
        return self._checked(prepared, name)

    def _checked(self, prepared: Any, name: str) -> Any:
        """Rows of token ids whose values the models can work with."""
        check_weights(prepared, name=name)
        return within_vocabulary(prepared, self._vocabularies, name=name)

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def _collator(self) -> PreferenceCollator:
        return PreferenceCollator(
            packing=self.packing,
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            pad_token_id=self._tokenizer.pad_token_id,
            pad_to_multiple_of=self.args.padding_multiple,
            max_tokens_per_microbatch=self.args.max_tokens_per_microbatch,
            mismatched=self._losses.needs_kl,
        )

    # The reference

    def _loss_options(self, pairs: float) -> dict[str, Any]:
        """`pairs`: how many of this pass count."""
        mean = {"kl": functools.partial(self._mean_over_processes, count=pairs)} if self._losses.needs_kl else {}
        return {
            **mean,
            **self.args.loss_arguments(),
            "attention_backend": self.args.attention_backend,
            "reduction": "sum",
            "memory_budget": self._head_budget(),
            "router_aux_loss_coef": self.router_aux_loss_coef,
        }

    def _head_budget(self) -> int:
        """`memory_budget`, chosen at the first pass that asks; all processes call it."""
        if self.memory_budget is None:
            self.memory_budget = choose_budget(self)
        return self.memory_budget

    def _mean_over_processes(self, value: Tensor, count: float) -> Tensor:
        """Of the means of each process over `count` rows."""
        if self.accelerator.num_processes == 1:
            return value
        own = value * count if count else torch.zeros_like(value)  # of no row it is not finite
        total, rows = self._reduce(torch.stack([own, torch.full_like(value, count)])).unbind()
        return total / rows

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of the losses of the batch's pairs over the pairs (or their weights) of the whole optimizer step.

        Added up over accumulation steps and averaged over processes, that is the mean over all pairs of the step.
        """
        ref_logps = inputs.get("ref_logps")
        if ref_logps is None and self._losses.needs_reference:
            ref_logps = self._online_reference(inputs)
        idle = inputs.get("weight", 1.0) == 0.0
        weight = 0.0 if idle else inputs.total_weight
        if self._noise is not None:
            self._noise.longest = inputs["longest"]
        options = self._loss_options(0.0 if idle else float(inputs.num_pairs))
        self._extend(self._inner(self.model))
        # The cast is not left to what is wrapped around the model, which others may use, too.
        with self.accelerator.autocast(), looked_at():
            fields = through_forward(model, inputs, ref_logps, loss_options=options)
        output = LossOutput.from_dict(fields)
        self._add_metrics("train" if model.training else "eval", inputs, output, idle)
        if idle:
            loss = output.loss * 0.0
        elif num_items_in_batch is None:
            loss = output.loss / max(weight, _TINY)
        else:
            loss = output.loss * (self.accelerator.num_processes / max(num_items_in_batch, _TINY))
        return (loss, output) if return_outputs else loss

    def _add_metrics(self, mode: str, batch: PreferenceBatch, output: LossOutput, idle: bool) -> None:
        """Also where the batch only keeps step with other processes: all of them know the same metrics then."""
        metrics, weight = self._metrics_of(output), batch.total_weight
        if mode == "eval":
            metrics = {"loss": output.losses.detach().sum() / max(weight, _TINY), **metrics}
        if idle:
            self._metrics[mode].add(metrics, 0.0)
            return
        self._metrics[mode].add(metrics, batch.num_pairs, **batch.metric_weights(), loss=weight)
        if mode == "train":
            self._throughput.count(batch, self._step_flops(batch))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], float]:
        """The batches of an optimizer step, and what its pairs weigh over all processes: 1 each, or what rows say."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches and not self.state.global_step:
            raise no_row_left("train", self.args)
        for batch in batches:
            if not isinstance(batch, PreferenceBatch | MicroBatches):
                raise UserError(
                    f"data_collator makes {type(batch).__name__}; it must make batches of fastdpo.PreferenceCollator, "
                    "which is the default."
                )
        cut, weight, self._stop_agreed = agree(batches, self._host_counts, self._stop_request.signal or 0)
        if self.args.nan_loss == "skip":
            self._before_step = self._tr_loss.clone(), self._metrics["train"].copy()
        return cut, weight

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a batch, pass by pass; gradients are exchanged in the last one only."""
        passes = passes_of(inputs)
        state, sync = self.accelerator.gradient_state, self.accelerator.sync_gradients
        offloading = activations_on_host if self.args.activation_offloading else nullcontext
        losses = []
        with offloading():
            try:
                for part in passes[:-1]:
                    state._set_sync_gradients(False)
                    with without_exchange(model) if sync else nullcontext():
                        losses.append(super().training_step(model, part, num_items_in_batch))
            finally:
                state._set_sync_gradients(sync)
            losses.append(super().training_step(model, passes[-1], num_items_in_batch))
        loss = torch.stack(losses).sum()
        self._step_parts.add(loss, passes)
        return loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        (inputs,), _, _ = agree([inputs], self._host_counts)
        losses, rewards = [], []
        for part in passes_of(inputs):
            part = self._prepare_inputs(part)
            with evaluating(model), torch.no_grad(), self.compute_loss_context_manager():
                loss, output = self.compute_loss(model, part, return_outputs=True)
            if part.get("weight", 1.0):
                losses.append(loss * part.total_weight)
                rewards.append(torch.stack([output.chosen_rewards, output.rejected_rewards], dim=1))
                self._evaluated_rows += part.num_pairs
        zero = torch.zeros((), device=self.args.device)
        loss = torch.stack([zero, *losses]).sum() / max(inputs.total_weight, _TINY)
        if prediction_loss_only:
            return loss, None, None
        pairs = torch.cat([zero.new_empty(0, 2), *rewards])  # (B, 2)
        labels = torch.zeros_like(pairs[:, 0], dtype=torch.long)  # column 0 is the chosen
        if self.accelerator.num_processes > 1:  # of which all must give as many rows
            missing = self.args.eval_batch_size - len(pairs)
            pairs = torch.cat([pairs, pairs.new_full((missing, 2), torch.nan)])
            labels = torch.cat([labels, labels.new_full((missing,), _NO_ROW)])
        return loss, pairs, labels

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

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """In the order of the data, whatever order the training rows come in: predictions are told by their place."""
        return None

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        processes = self.accelerator.num_processes
        if not kwargs.get("is_training") and processes > 1 and not self.args.dataloader_drop_last:
            if isinstance(dataset, IterableDataset):
                dataset = EvenStream(dataset, batch_size * processes)
            elif len(dataset):
                dataset = self._remove_unused_columns(dataset, description=description)
                dataset = EvenRows(dataset, batch_size * processes)
        loader = super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        if self.args.dataloader_num_workers:
            begun = getattr(loader, "base_dataloader", loader)  # whose workers they are
            begun.worker_init_fn = PatientWorker(begun.worker_init_fn)
        return loader

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
        return inputs.to(self.args.device, non_blocking=True)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*KEPT, FILLER]

    def floating_point_ops(self, inputs: Any) -> int:
        return int(sum(map(self._step_flops, passes_of(inputs))))

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Tokens of the sequences, prompts counted with every completion; with "all", the padding of padded batches."""
        which = self.args.include_num_input_tokens_seen
        if which == "no":
            return
        counted = [part for part in passes_of(inputs) if part.get("weight", 1.0)]
        padding = which == "all" and self.packing == "padded"
        tokens = sum(part["num_tokens"] if padding else part.data_tokens for part in counted)
        self.state.num_input_tokens_seen += sum(own for (own,) in self._host_counts.gather([tokens]))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._metrics["eval"].clear()  # what an evaluation that broke off has left
        self._evaluated_rows = 0
        compute_metrics: Any = self.compute_metrics
        if compute_metrics is not None and self.accelerator.num_processes > 1:
            self.compute_metrics = lambda prediction: compute_metrics(_of_rows(prediction))
        try:
            with self._throughput.paused(), self._model_lent():
                output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.compute_metrics = compute_metrics
        # Our own mean over pairs replaces the mean over batches, which counts a small last batch as a full one.
        means = self._metrics["eval"].take(self._reduce)
        means["num_tokens"] = self.num_tokens()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        rows = sum(own for (own,) in self._host_counts.gather([self._evaluated_rows]))
        return _of_rows(output)._replace(num_samples=rows)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._ready_to_evaluate(part) for name, part in eval_dataset.items()}
        elif eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._ready_to_evaluate(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super().predict(self._ready_to_evaluate(test_dataset), *args, **kwargs)

    def _ready_to_evaluate(self, dataset: Any) -> Any:
        """A data set that comes later, as the constructor would have prepared it."""
        check_kind(dataset, "the data set")
        dataset = self._prepared(dataset, self.processing_class, self.args, "eval")
        check_lengths(dataset, position_limit(self._inner(self.model)), self.args, name="eval")
        return self._with_later_reference(dataset) if self._losses.needs_reference else dataset


def _of_rows(output: Any) -> Any:
    """Predictions, or what `compute_metrics` gets, without what stands for no row of the data set."""
    labels = output.label_ids
    if not isinstance(labels, np.ndarray) or not (labels == _NO_ROW).any():
        return output
    kept = labels != _NO_ROW
    if isinstance(output, EvalPrediction):
        return EvalPrediction(predictions=output.predictions[kept], label_ids=labels[kept])
    return output._replace(predictions=output.predictions[kept], label_ids=labels[kept])


def _without_keywords(args: Any, ref_model: Any) -> Any:
    """`model_init_kwargs` are the policy's where the reference is a loaded model, or has keywords of its own."""
    own = getattr(args, "ref_model_init_kwargs", None)
    if isinstance(ref_model, str):
        keywords = args.model_init_kwargs if own is None else own
        return SimpleNamespace(model_init_kwargs=keywords, trust_remote_code=args.trust_remote_code)
    if own is not None:
        raise ValueError("ref_model_init_kwargs is for a ref_model given by name; load this one so, or pass its name.")
    return SimpleNamespace(model_init_kwargs=None)


def _is_plain_adapter(peft_config: Any, model: Any) -> bool:
    """Whether a new adapter was put on, and the model without it is what it was."""
    return peft_config is not None and not policy.changes_base(peft_config)


def _check_streamed(dataset: Any, args: Any) -> None:
    if isinstance(dataset, IterableDataset) and args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} needs a data set whose rows can be taken in "
            "any order, and this one is streamed; leave it out."
        )


def _router_aux_loss_coef(model: Any, args: PreferenceConfig) -> float:
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
