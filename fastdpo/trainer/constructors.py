"""The constructors of TRL's trainers, with a reference and without; `_config` and `_method` are a trainer's own."""

from __future__ import annotations

from typing import Any, ClassVar

from fastdpo.trainer.config import PreferenceConfig
from fastdpo.trainer.engine import PreferenceTrainer
from fastdpo.trainer.names import config_of, named_tokenizer


class ReferenceTrainer(PreferenceTrainer):
    """Trainers with a reference; `tokenizer` is the older name of `processing_class`, `older` are fields of `args`."""

    _config: ClassVar[type[PreferenceConfig]]
    _method: ClassVar[str]

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
        **older: Any,
    ) -> None:
        super().__init__(
            model,
            config_of(args, self._config, model, self._method, older),
            ref_model=ref_model,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=named_tokenizer(processing_class, tokenizer),
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )


class ReferenceFreeTrainer(PreferenceTrainer):
    """Trainers of pairs without a reference; their constructor is that of TRL's."""

    _config: ClassVar[type[PreferenceConfig]]
    _method: ClassVar[str]

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        compute_metrics: Any = None,
        *,
        tokenizer: Any = None,
        **older: Any,
    ) -> None:
        if preprocess_logits_for_metrics is not None:
            raise ValueError("preprocess_logits_for_metrics has no logits to work on: none are formed; leave it out.")
        if (model is None) == (model_init is None):
            raise ValueError("give either model or model_init, which makes one.")
        name = "model" if model is None else model
        super().__init__(
            model,
            config_of(args, self._config, name, self._method, older),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=named_tokenizer(processing_class, tokenizer),
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            model_init=model_init,
        )
