"""DPOTrainer as the command line runs it: what a user, a disk or a damaged file can cause is one sentence."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging as transformers_logging

from fastdpo.saving import disk_error, drop_other_weights, replacing
from fastdpo.trainer.dpo import DPOTrainer
from fastdpo.trainer.resuming import damaged_file, differences, missing_files
from fastdpo.types import UserError


class CommandTrainer(DPOTrainer):
    """
    when_trained: called after the last step, before anything else could go wrong
    """

    when_trained: Callable[[], None] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_WhenTrained(self))

    def check_checkpoint(self, folder: Path) -> None:
        """That the run can go on from it exactly.

        Raises:
            UserError: a file is missing or damaged, or the checkpoint is of another run; what differs.
        """
        check_whole(folder)
        missing, differing = missing_files(folder, self), differences(self, folder)
        if missing:
            raise UserError(
                f"{folder} holds no {', '.join(missing)}, so the run cannot go on exactly from there; resume from "
                "another checkpoint, or train anew from its weights (--model) into another folder."
            )
        if differing:
            raise UserError(
                f"{folder} is of another run: {'; '.join(differing)}; give the options and the data of that run, or "
                "train into another --output_dir."
            )

    # Reading a checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: Any) -> None:
        with _reading(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Where transformers warns that numbers of the model are not in the checkpoint, the run stops."""
        tied = getattr(self.model, "_tied_weights_keys", None) or ()
        missing = [
            name for name in load_result.missing_keys
            if not any(name == key or re.fullmatch(key, name) for key in tied)
        ]  # fmt: skip
        if missing or load_result.unexpected_keys:
            name, what = (missing[0], "lacks") if missing else (load_result.unexpected_keys[0], "has")
            raise ValueError(f"it {what} the weight {name}: it is of another model, or damaged")
        super()._issue_warnings_after_load(load_result)

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        try:
            return bool(super()._determine_best_metric(metrics, trial))
        except KeyError as error:  # of a name that no evaluation gives
            raise UserError(str(error.args[0]) if error.args else "metric_for_best_model is not known") from error

    # Writing

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            with _quiet():
                super()._save_checkpoint(model, trial)
        except Exception as error:
            reason = disk_error(error)
            if reason is None:
                raise
            if not (folder / TRAINER_STATE_NAME).exists():  # room for others, and nothing that looks like one
                shutil.rmtree(folder, ignore_errors=True)
            raise CannotSave(f"{folder}: the checkpoint could not be written ({reason})") from error

    def save_whole(self, folder: Path) -> None:
        """Saves the model in a folder whose files stay as they are until all new ones are written.

        Raises:
            CannotSave: the disk is full, say.
        """
        first = self.is_world_process_zero()
        try:
            with _quiet(), replacing(folder, first=first) as beside:
                self.save_model(str(beside), _internal_call=True)
                names = {path.name for path in beside.iterdir()}
            if first:
                drop_other_weights(folder, names)
        except Exception as error:
            reason = disk_error(error)
            if reason is None:
                raise
            raise CannotSave(f"{folder}: the trained model could not be saved ({reason})") from error
        if self.args.push_to_hub:
            try:
                self.push_to_hub()
            except Exception as error:  # of the network, of the hub
                raise UserError(
                    f"the trained model is saved in {folder}, but could not be pushed to the hub "
                    f"({(str(error).strip() or type(error).__name__).splitlines()[0]}); push it with `hf upload`."
                ) from error


class CannotSave(UserError):
    """A disk that is full or cannot be written to; what was there before is there still."""


class _WhenTrained(TrainerCallback):
    def __init__(self, trainer: CommandTrainer) -> None:
        self.trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.when_trained is not None:
            self.trainer.when_trained()


def check_whole(folder: Path) -> None:
    """That a folder is a checkpoint whose files can be read.

    Raises:
        UserError: which cannot, and why.
    """
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise UserError(
            f"{folder} is no whole checkpoint: it holds no {TRAINER_STATE_NAME}; name another with "
            "--resume_from_checkpoint."
        )
    damaged = damaged_file(folder)
    if damaged is not None:
        name, why = damaged
        raise UserError(f"{folder / name} cannot be read ({why}); resume from another checkpoint.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bar for each file, which would break the run's."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _reading(checkpoint: Any) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        if checkpoint is None:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{checkpoint} cannot be loaded ({reason}); resume from another checkpoint.") from error
