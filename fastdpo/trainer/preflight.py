"""What can be known to fail at the end of a run, looked at before its first step."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from fastdpo.trainer.master_weights import check_master_weights
from fastdpo.types import LossOutput, TokenMetrics, UserError

logger = logging.getLogger(__name__)


def check_saving(model: Any, inner: Any, args: Any) -> None:
    """That the model can be saved, in args.output_dir; a generation config that only lacks do_sample=True gets it.

    Args:
        inner: the transformers model inside `model`'s adapters.

    Raises:
        UserError: what a save would fail at.
    """
    _check_folder(args.output_dir)
    generation = getattr(inner, "generation_config", None)
    if generation is not None:
        _mend_generation_config(generation)
    with tempfile.TemporaryDirectory() as folder:
        _check_config(inner.config, folder)
        for config in getattr(model, "peft_config", {}).values():
            _check_config(config, folder)
    if not hasattr(model, "peft_config"):
        _check_shared_weights(inner)


def _check_folder(path: str) -> None:
    probe = Path(path) / f".fastdpo-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir {path} cannot be written ({error.strerror}); name another one.") from None


def _mend_generation_config(config: Any) -> None:
    """`save_pretrained` refuses a config with contradictions; temperature and the like ask for sampling."""
    problem = _generation_problem(config)
    if problem is None:
        return
    before, config.do_sample = config.do_sample, True
    rest = _generation_problem(config)
    if rest is not None:
        config.do_sample = before
        raise UserError(f"the model's generation_config cannot be saved; correct model.generation_config: {rest}")
    logger.warning(
        "the model's generation_config has options of sampling beside do_sample=%s, with which it cannot be saved; "
        "do_sample is set to True. Set model.generation_config yourself for another one.", before,
    )  # fmt: skip


def _generation_problem(config: Any) -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def _check_config(config: Any, folder: str) -> None:
    try:
        config.save_pretrained(folder)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the model's {type(config).__name__} cannot be saved; correct it first: {reason}") from error


def _check_shared_weights(model: Any) -> None:
    """safetensors refuses tensors that share memory, unless the model says that it ties them."""
    state = model.state_dict()
    if any(value.is_meta for value in state.values() if isinstance(value, torch.Tensor)):
        return
    try:
        remove_tied_weights_from_state_dict(dict(state), model)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the model's weights cannot be saved; give each its own memory (value.clone()), or name them in "
            f"_tied_weights_keys: {reason}"
        ) from error


def check_run(trainer: Any) -> None:
    """What the arguments ask for and this run cannot give.

    Raises:
        UserError: fp16 without a GPU; options of an optimizer that does not read them; a metric that no evaluation
            has; a data set that drop_last leaves nothing of.
    """
    _check_fp16(trainer)
    check_master_weights(trainer)
    _check_optimizer(trainer)
    _check_best_metric(trainer)
    _check_drop_last(trainer)


def _check_fp16(trainer: Any) -> None:
    if trainer.accelerator.mixed_precision == "fp16" and trainer.args.device.type == "cpu":
        raise UserError(
            "fp16=True computes in float16 on GPUs alone, and this run is on a CPU, where it would be float32; set "
            "fp16=False, or bf16=True."
        )


def _check_optimizer(trainer: Any) -> None:
    args = trainer.args
    if not args.optim_args or trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        return
    given = args.optim_args
    try:
        _, asked = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        args.optim_args = None
        _, plain = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    finally:
        args.optim_args = given
    if asked == plain:
        raise UserError(
            f"optim_args={given!r} changes nothing for optim={str(getattr(args.optim, 'value', args.optim))!r}; leave "
            "it out, or set adam_beta1, adam_beta2, adam_epsilon, weight_decay."
        )


# Of transformers' own evaluation, beside the loss.
_OF_EVERY_EVALUATION = (
    "loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens",
    "jit_compilation_time",
)  # fmt: skip


def _check_best_metric(trainer: Any) -> None:
    args = trainer.args
    wanted = args.metric_for_best_model
    watched = args.load_best_model_at_end or str(getattr(args.save_strategy, "value", "")) == "best"
    if wanted is None or not watched or trainer.compute_metrics is not None:
        return
    names = {*_OF_EVERY_EVALUATION, *metric_names(trainer)}
    if isinstance(trainer.eval_dataset, Mapping):
        names = {f"{part}_{name}" for part in trainer.eval_dataset for name in names}
    if wanted.removeprefix("eval_") not in names:
        raise UserError(
            f"metric_for_best_model is {wanted!r}, which no evaluation has; it has {', '.join(sorted(names))}, "
            "and what compute_metrics gives."
        )


def metric_names(trainer: Any) -> set[str]:
    """Those that this trainer's evaluations may have, whatever the model."""
    from fastdpo.losses.probe import drawn_terms

    extras: dict[str, Any] = {}
    for spec, _ in trainer._losses.parts:
        if spec.extras is not None:
            extras |= spec.extras(drawn_terms(spec)[0])
    two, one = torch.zeros(2), torch.zeros(())
    tokens = TokenMetrics(**dict.fromkeys(TokenMetrics.__dataclass_fields__, one))
    output = LossOutput(one, two, two, two, two, two, tokens=tokens, kl=one if trainer._losses.needs_kl else None,
                        extras=extras, aux_loss=one, paired=trainer._losses.data != "answers")  # fmt: skip
    return set(trainer._metrics_of(output))


def _check_drop_last(trainer: Any) -> None:
    args = trainer.args
    if not args.dataloader_drop_last:
        return
    for name, dataset in trainer._named_datasets():
        kind = "train" if name == "train" else "eval"
        size = args.train_batch_size if name == "train" else args.eval_batch_size
        batch = size * args.world_size
        if hasattr(dataset, "__len__") and len(dataset) < batch:
            raise UserError(
                f"dataloader_drop_last=True leaves nothing of the {name} data set: it has {len(dataset)} rows, and a "
                f"batch of all processes {batch}; set it to False, or "
                f"per_device_{kind}_batch_size lower."
            )
