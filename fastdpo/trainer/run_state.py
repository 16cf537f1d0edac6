"""What a checkpoint holds beside transformers' own files, so that a resumed run goes on to the bit.

fastdpo_state.json      sums of metrics and of the loss since the last log, tokens seen, the head's memory budget, and
                        what the run is of
reference.safetensors   a moving reference as it is now
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import IterableDataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastdpo.evaluation import generate_from_ids
from fastdpo.trainer.head_memory import resume_budget
from fastdpo.trainer.resuming import STATE, run_identity

if TYPE_CHECKING:
    from fastdpo.trainer.engine import PreferenceTrainer

WATCHED_STEPS = 100  # after which a run that logs seldom looks whether its numbers are numbers
REFERENCE = "reference.safetensors"


def save_state(trainer: PreferenceTrainer, folder: Path) -> None:
    """All processes call it; the first one writes."""
    sums = trainer._metrics["train"].state(trainer._reduce)
    tokens = trainer.num_tokens()
    loss = trainer._reduce(trainer._tr_loss.clone()) / trainer.accelerator.num_processes
    if not trainer.args.should_save:
        return
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "metrics": sums,
        "loss_since_log": float(loss),
        "last_logged": trainer._globalstep_last_logged,
        "skipped": trainer._skipped,
        "passes": trainer._passes,
        "num_tokens": tokens,
        "memory_budget": trainer.memory_budget,
        "run": run_identity(trainer),
    }
    (folder / STATE).write_text(json.dumps(state))
    if getattr(trainer.args, "sync_ref_model", False):
        held = {name: value.contiguous() for name, value in trainer.ref_model.named_parameters()}
        save_file(held, folder / REFERENCE)


def load_state(trainer: PreferenceTrainer, folder: Path) -> None:
    """A checkpoint of another program has no such state: then the first logged means begin at the checkpoint."""
    if getattr(trainer.args, "sync_ref_model", False):
        if not (folder / REFERENCE).exists():
            raise ValueError(f"{folder} holds no {REFERENCE}, and sync_ref_model=True has moved the reference; "
                             "the run cannot be resumed from there.")  # fmt: skip
        held = load_file(folder / REFERENCE)
        with torch.no_grad():
            for name, value in trainer.ref_model.named_parameters():
                value.copy_(held[name])
    if not (folder / STATE).exists():
        return
    state = json.loads((folder / STATE).read_text())
    if isinstance(trainer.train_dataset, IterableDataset) and state.get("passes", 1) > 1:
        raise ValueError(
            f"{folder} stands in pass {state['passes']} over a streamed data set, and only the first can be skipped "
            "through; resume from a checkpoint of the first pass, or train on a data set with a length."
        )
    trainer._globalstep_last_logged = state["last_logged"]
    trainer._last_logged, trainer._skipped = state["last_logged"], state.get("skipped", 0)
    trainer._tr_loss += state["loss_since_log"]
    trainer._total_loss_scalar -= state["loss_since_log"]  # the mean over this call's steps is of these alone
    first = trainer.is_world_process_zero()
    trainer._throughput.total_unshared = state["num_tokens"] if first else 0
    trainer._metrics["train"].restore(state["metrics"], trainer.args.device, share=1.0 if first else 0.0)


def newest_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of an output folder: `trainer_state.json` is what is written last."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (path / TRAINER_STATE_NAME).exists()]
    numbers = {int(path.name.rsplit("-", 1)[1]): path for path in found if path.name.rsplit("-", 1)[1].isdigit()}
    return str(numbers[max(numbers)]) if numbers else None


class RunCallback(TrainerCallback):
    """Acts on the events of a run for the trainer it belongs to."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.forget_steps()
        if trainer._resumed_from:
            load_state(trainer, Path(trainer._resumed_from))
            resume_budget(trainer, Path(trainer._resumed_from))
        trainer.measure_ceiling()
        if args.show_generations and not trainer._resumed_from:
            self._show("before")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._passes += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer._step_parts.losses:  # none where the step was skipped
            trainer._watch.add(state.global_step, *trainer._step_parts.take())
        if len(trainer._watch.steps) >= WATCHED_STEPS:
            trainer.check_finite()
        if getattr(args, "sync_ref_model", False) and state.global_step % args.ref_model_sync_steps == 0:
            trainer._reference.move(trainer.model, args.ref_model_mixup_alpha)
        if trainer.accelerator.num_processes == 1:
            trainer._stop_agreed = trainer._stop_request.signal or 0
        if trainer._stop_agreed:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.show_generations and not self.trainer._stop_agreed:
            self._show("after")

    def _show(self, when: str) -> None:
        trainer = self.trainer
        named = dict(trainer._named_datasets())
        dataset: Any = next((part for name, part in named.items() if name != "train"), named.get("train"))
        prompts = [row["prompt_ids"] for _, row in zip(range(trainer.args.show_generations), dataset, strict=False)]
        tokenizer = trainer._tokenizer
        answers = generate_from_ids(trainer.accelerator.unwrap_model(trainer.model), tokenizer, prompts)
        if not trainer.is_world_process_zero():
            return
        path = Path(trainer.args.output_dir) / "generations.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            for ids, answer in zip(prompts, answers, strict=True):
                prompt = tokenizer.decode(ids)
                print(f"{when} training: {prompt!r} -> {answer!r}")
                file.write(json.dumps({"when": when, "prompt": prompt, "answer": answer}) + "\n")
