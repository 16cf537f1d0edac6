"""DPOTrainer: pairs of a chosen and a rejected answer, or ranked lists, with a reference or without."""

from __future__ import annotations

from typing import Any, ClassVar

from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.engine import PreferenceTrainer
from fastdpo.trainer.names import default_output_dir, named_tokenizer


class DPOTrainer(PreferenceTrainer):
    """Trains on preference pairs or ranked lists; the constructor is that of TRL's DPOTrainer.

    Arguments and errors are those of PreferenceTrainer. `tokenizer` is the older name of `processing_class`.
    """

    args: DPOConfig
    _tags: ClassVar[list[str]] = ["fastdpo", "dpo"]

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
        *,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(
            model,
            DPOConfig(output_dir=default_output_dir(model, "DPO")) if args is None else args,
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
