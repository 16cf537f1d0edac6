"""RewardTrainer: a reward model on pairs, by the model of Bradley and Terry (1952; Ouyang et al. 2022)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastdpo import score_models
from fastdpo.packing import PreferenceCollator
from fastdpo.packing.groups import FILLER
from fastdpo.score_models import SCORES, sequence_classifier
from fastdpo.trainer.chat_template import take_over_template, training_embeddings_of
from fastdpo.trainer.config import PreferenceConfig, option
from fastdpo.trainer.engine import PreferenceTrainer
from fastdpo.trainer.metrics import MetricSums, StepFlops, at_least_float32
from fastdpo.trainer.names import config_of, named_tokenizer
from fastdpo.trainer.reward_data import KEPT, prepare_scored
from fastdpo.types import LossOutput, UserError
from fastdpo.verify import choose_packing

logger = logging.getLogger(__name__)


@dataclass
class RewardConfig(PreferenceConfig):
    """Options of RewardTrainer: names and defaults of TRL's RewardConfig, and a few of our own (PreferenceConfig).

    A row one of whose sequences is longer than `max_length` is left out: the score is that of a sequence's end.
    """

    learning_rate: float = option("Peak learning rate of AdamW.", 1e-4)
    center_rewards_coefficient: float | None = option(
        "Weight of (r_c + r_r)^2, which keeps the mean score near 0; unset, it is left out.", None)  # fmt: skip
    eos_token: str | None = option("The token that ends a text; unset, the tokenizer's end-of-text token.", None)
    chat_template_path: str | None = option(
        "The chat template: a Jinja file (.jinja, .j2), or the name or path of a tokenizer, of which its added tokens "
        "and its end-of-text token are taken over, too, with new embeddings.", None)  # fmt: skip

    def loss_arguments(self) -> dict[str, Any]:
        return {"loss_type": "reward", "center_rewards_coefficient": self.center_rewards_coefficient or 0.0}

    def _check(self) -> None:
        super()._check()
        meaningless = {
            "truncation_mode": ("keep_start", "longer sequences are left out, not cut"),
            "max_prompt_length": (None, "a score is that of a whole sequence"),
            "max_completion_length": (None, "a score is that of a whole sequence"),
            "memory_budget": (None, "a reward model forms no logits"),
            "show_generations": (0, "a reward model generates nothing"),
            "router_aux_loss_coef": (None, "transformers' sequence classifiers have no load-balancing loss"),
        }
        for name, (default, why) in meaningless.items():
            value = getattr(self, name)
            if value != default and value:
                raise ValueError(f"{name}={value!r} has no meaning for RewardTrainer: {why}; leave it out.")
        if self._template_file is not None and not self._template_file.is_file():
            raise ValueError(
                f"chat_template_path is {self.chat_template_path!r}, and there is no such file; name one, or a "
                "tokenizer to take the template of."
            )

    @property
    def _template_file(self) -> Path | None:
        path = Path(self.chat_template_path or "")
        return path if path.suffix in (".jinja", ".j2") else None

    @property
    def template_source(self) -> str | None:
        """The tokenizer whose chat template is taken over."""
        return self.chat_template_path if self._template_file is None else None


class _OneScore:
    """AutoModelForSequenceClassification with one label."""

    @staticmethod
    def from_pretrained(name: str, **options: Any) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(name, **(options | {"num_labels": 1}))


class RewardTrainer(PreferenceTrainer):
    """-logsigmoid(r_c - r_r - margin) + c * (r_c + r_r)^2, the mean over the pairs, r the model's score of a sequence

    The constructor is that of TRL's RewardTrainer. The model is a transformers sequence classifier with one label, or
    the name of one, or of a language model, which then gets a new score head. Chosen and rejected run in one packed
    pass in which the prompt stands once. Rows are those of `fastdpo.trainer.reward_data`; arguments and errors those of
    PreferenceTrainer. To `compute_metrics` predictions are (pairs, 2): the scores of chosen and rejected.
    """

    args: RewardConfig
    _metrics: dict[str, Any]  # ScoreSums
    _auto_class: ClassVar[Any] = _OneScore
    _tags: ClassVar[list[str]] = ["fastdpo", "reward-trainer"]

    def __init__(
        self,
        model: Any,
        args: RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
        **older: Any,
    ) -> None:
        args = config_of(args, RewardConfig, model, "Reward", older)
        assert isinstance(args, RewardConfig)
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=_tokenizer_as_asked(named_tokenizer(processing_class, tokenizer), model, args),
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        inner = self._inner(self.model)
        head = getattr(inner, "score", None)
        if (
            hasattr(self.model, "peft_config")
            and head is not None
            and not any(weight.requires_grad for weight in head.parameters())
        ):
            logger.warning(
                "the score head is not trained, and not saved with the adapter; set task_type='SEQ_CLS' or "
                "modules_to_save=['score'] in peft_config, unless the model has learnt to score before."
            )
        if args.eos_token is not None or args.template_source is not None:
            inner.config.get_text_config().eos_token_id = self._tokenizer.eos_token_id
        self.router_aux_loss_coef = 0.0  # sequence classifiers have none
        self._metrics = {mode: ScoreSums(self.accelerator.gather) for mode in ("train", "eval")}

    def _ready_policy(self, model: Any, processing_class: Any, args: Any) -> tuple[Any, Any]:
        if args.template_source is not None:
            new = take_over_template(model, getattr(processing_class, "tokenizer", processing_class), args)
            self._peft_config = training_embeddings_of(new, self._peft_config)
        return super()._ready_policy(model, processing_class, args)

    def _inner(self, model: Any) -> Any:
        return sequence_classifier(model)

    def _choose_packing(self, model: Any) -> str:
        return choose_packing(model, self.args.packing, self.args.attention_backend, SCORES)

    def _extend(self, inner: Any) -> None:
        score_models.extend_forward(inner)

    def _flops_of(self, inner: Any) -> StepFlops:
        """Those of the backbone: a head of one row counts for nothing."""
        head = torch.nn.Linear(1, 1, device="meta")
        as_language_model = SimpleNamespace(
            get_output_embeddings=lambda: head,
            get_input_embeddings=inner.get_input_embeddings,
            named_parameters=inner.named_parameters,
            config=inner.config,
        )
        return replace(StepFlops.of(as_language_model), per_target=0)

    def _prepared(self, dataset: Any, tokenizer: Any, args: Any, name: str) -> Any:
        if dataset is None:
            return None
        prepared = prepare_scored(dataset, getattr(tokenizer, "tokenizer", tokenizer), args, name=name)
        return self._checked(prepared, name)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*KEPT, FILLER]

    def _collator(self) -> PreferenceCollator:
        return replace(super()._collator(), scores=True)

    def _loss_options(self, pairs: float) -> dict[str, Any]:
        return {
            **self.args.loss_arguments(),
            "attention_backend": self.args.attention_backend,
            "reduction": "sum",
        }

    def _metrics_of(self, output: LossOutput) -> dict[str, Tensor]:
        chosen, rejected = output.chosen_rewards, output.rejected_rewards
        scores = torch.cat([chosen, rejected])
        return {
            "min_reward": scores.min(),
            "mean_reward": scores.mean(),
            "max_reward": scores.max(),
            "accuracy": (chosen > rejected).to(scores.dtype).mean(),
            "margin": (chosen - rejected).mean(),
        }

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._metrics["train"].end_batch()
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(*args, **kwargs)
        self._metrics["eval"].end_batch()
        return result


class ScoreSums(MetricSums):
    """MetricSums in which `min_reward` and `max_reward` are means over batches, of the least and the greatest score.

    A batch is that of all processes, in however many passes they take it.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor]) -> None:
        """`gather`: a tensor of each process, one behind the other."""
        super().__init__()
        self._gather = gather
        self._bounds: list[Tensor] = []  # (2,) of each batch since they were summed up: least, and minus the greatest
        self._within = False

    def add(self, metrics: Mapping[str, Tensor], pairs: float, **weights: float) -> None:
        super().add(metrics, pairs, **{**weights, "min_reward": 0.0, "max_reward": 0.0})
        bounds = torch.stack([metrics["min_reward"], -metrics["max_reward"]])
        bounds = at_least_float32(bounds)
        if not pairs:  # a pass that only keeps step with those of other processes
            bounds = torch.full_like(bounds, torch.inf)
        if self._within:
            bounds = torch.minimum(self._bounds.pop(), bounds)
        self._bounds.append(bounds)
        self._within = True

    def end_batch(self) -> None:
        self._within = False

    def clear(self) -> None:
        super().clear()
        self._bounds, self._within = [], False

    def copy(self) -> MetricSums:
        copied = ScoreSums(self._gather)
        copied.__dict__.update(super().copy().__dict__)
        copied._bounds = list(self._bounds)
        return copied

    def state(self, reduce: Any = None) -> dict[str, Any]:
        self._sum_up()
        return super().state(reduce)

    def _sum_up(self) -> None:
        """Every process adds its share of what all have, for `reduce` adds them up."""
        if not self._bounds:
            return
        assert self._sums is not None
        own = torch.stack(self._bounds)  # (batches, 2)
        everywhere = self._gather(own.unsqueeze(0))  # (processes, batches, 2)
        least, greatest = everywhere.amin(0).sum(0) / len(everywhere)
        for name, value in {"min_reward": least, "max_reward": -greatest}.items():
            place = self._names.index(name)
            self._sums[place] += value
            self._counts[place] += len(own) / len(everywhere)
        self._bounds = []


def _tokenizer_as_asked(tokenizer: Any, model: Any, args: RewardConfig) -> Any:
    """With the `eos_token` and chat template that the config names, before anything is tokenized."""
    if args.eos_token is None and args.chat_template_path is None:
        return tokenizer
    if tokenizer is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise UserError(f"eos_token is {args.eos_token!r}, which the tokenizer does not know; name one of its own.")
        tokenizer.eos_token = args.eos_token
    if args._template_file is not None:
        tokenizer.chat_template = args._template_file.read_text(encoding="utf-8")
    return tokenizer
