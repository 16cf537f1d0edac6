"""Whether a checkpoint is whole, and whether it is of the run that would go on from it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastdpo.data.validate import MISMATCHED, REF_COLUMNS, REF_MISMATCHED

if TYPE_CHECKING:
    from fastdpo.trainer.engine import PreferenceTrainer

logger = logging.getLogger(__name__)

STATE = "fastdpo_state.json"
# What the order of the rows follows from: with other values, rows would be trained twice and others never.
_ORDER = ("data", "rows", "seed", "data_seed", "batch_size", "max_length", "truncation_mode", "train_sampling_strategy")
# What a checkpoint's optimizer and schedule would silently put in the place of the option.
_SCHEDULE = ("learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "optim")
# References are compared by their fingerprint, and KTO's mismatched completions follow from the rows.
_NOT_DATA = ("row_number", *REF_COLUMNS, "ref_logps", REF_MISMATCHED, MISMATCHED)


def run_identity(trainer: PreferenceTrainer) -> dict[str, Any]:
    """What must be the same when the run goes on, as values that JSON keeps."""
    args = trainer.args
    dataset = trainer.train_dataset
    cache = getattr(trainer, "_ref_cache", None)
    identity = {
        "data": _data_digest(trainer),
        "rows": len(dataset) if isinstance(dataset, Dataset) else None,
        "batch_size": None if args.auto_find_batch_size else trainer.get_total_train_batch_size(args),
        "loss": args.loss_arguments(),
        "reference": None if cache is None else dict(cache.fingerprint),
        **{
            name: getattr(args, name)
            for name in ("seed", "data_seed", "max_length", "truncation_mode", "train_sampling_strategy", *_SCHEDULE)
        },
    }
    return dict(json.loads(json.dumps(identity, default=str)))


def _data_digest(trainer: PreferenceTrainer) -> str | None:
    """Of the prepared rows in their order, made once for each data set; None of a stream."""
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset):
        return None
    known = getattr(trainer, "_digest_of_data", None)
    if known is None or known[0] is not dataset:
        known = dataset, data_digest(dataset)
        trainer._digest_of_data = known
    return known[1]


def data_digest(dataset: Dataset) -> str:
    """Of all that rows are trained by (ids, weights, ranks, labels), in their order."""
    names = sorted(name for name in dataset.column_names if name not in _NOT_DATA)
    digest = hashlib.blake2b(digest_size=16)
    for table in dataset.select_columns(names).with_format("arrow").iter(10_000):
        for name in names:
            digest.update(name.encode())
            _add_array(digest, table[name].combine_chunks())
    return digest.hexdigest()


def _add_array(digest: Any, array: Any) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lengths = pc.fill_null(pc.list_value_length(array), -1)
        digest.update(lengths.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=False)
    digest.update(repr(values.tolist()).encode() if values.dtype == object else values.tobytes())


def differences(trainer: PreferenceTrainer, folder: Path) -> list[str]:
    """What the checkpoint's run has and this one has not, as "seed 42 there, 7 here"; empty: nothing, or not known."""
    try:
        there = json.loads((folder / STATE).read_text()).get("run")
    except (OSError, ValueError, AttributeError):
        return []
    if not isinstance(there, dict):
        return []
    here = run_identity(trainer)
    names = [name for name in here if name in there and there[name] != here[name]]
    if trainer.args.ignore_data_skip:  # which starts the rows anew
        names = [name for name in names if name not in _ORDER]
    said = []
    for name in names:
        if name == "data":
            said.append(f"other training rows ({there.get('rows')} there, {here['rows']} here)")
        elif name in ("loss", "reference") and isinstance(there[name], dict) and isinstance(here[name], dict):
            own, other = here[name], there[name]
            differing = [key for key in {**other, **own} if other.get(key) != own.get(key)]
            of = "reference " if name == "reference" else ""
            said += [f"{of}{key} {other.get(key)} there, {own.get(key)} here" for key in differing]
        elif name != "rows":
            said.append(f"{name} {there[name]} there, {here[name]} here")
    return said


def missing_files(folder: Path, trainer: PreferenceTrainer) -> list[str]:
    """What the run would begin anew, since the checkpoint has no file of it."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return []
    processes = trainer.args.world_size
    random_states = "rng_state.pth" if processes == 1 else f"rng_state_{trainer.args.process_index}.pth"
    missing = []
    if not any("optimizer" in name or name.startswith("global_step") for name in names):
        missing.append("optimizer.pt")
    missing += [name for name in ("scheduler.pt", random_states, STATE) if name not in names]
    return missing


def say_what_differs(trainer: PreferenceTrainer, folder: Path) -> None:
    """Warns of what a resumed run does not take up where the other one stopped."""
    missing, differing = missing_files(folder, trainer), differences(trainer, folder)
    if missing:
        logger.warning("%s holds no %s: what they kept begins anew.", folder, ", ".join(missing))
    if differing:
        logger.warning("%s is of another run: %s.", folder, "; ".join(differing))


# Whether the files can be read


def damaged_file(folder: Path) -> tuple[str, str] | None:
    """The first file of a checkpoint that cannot be read, and why; no tensor is read into memory."""
    for path, check in _checks(folder):
        try:
            check(path)
        except Exception as error:  # readers of damaged files raise what they like
            return path.name, (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def _checks(folder: Path) -> Iterator[tuple[Path, Callable[[Path], object]]]:
    yield folder / TRAINER_STATE_NAME, _check_trainer_state
    checks: list[tuple[str, Callable[[Path], object]]] = [
        (STATE, _check_state),
        ("*config.json", _object),
        ("*.safetensors.index.json", _object),
        ("*.safetensors", _check_safetensors),
        ("optimizer.pt", lambda path: _check_saved(path, "state", "param_groups")),
        ("scheduler.pt", lambda path: _check_saved(path, "last_epoch")),
        ("rng_state*.pth", lambda path: _check_saved(path, "python", "numpy", "cpu")),
    ]
    for pattern, check in checks:
        for path in sorted(folder.glob(pattern)):
            yield path, check


def _object(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"it holds no JSON object but {type(values).__name__}")
    return values


def _check_trainer_state(path: Path) -> None:
    step = _object(path).get("global_step")
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"its global_step is {step!r}")
    prefix, _, number = path.parent.name.rpartition("-")
    if prefix == PREFIX_CHECKPOINT_DIR and number.isdecimal() and int(number) != step:
        raise ValueError(f"its global_step is {step}")


def _check_state(path: Path) -> None:
    state = _object(path)
    for name in ("last_logged", "loss_since_log", "num_tokens"):
        if isinstance(state.get(name), bool) or not isinstance(state.get(name), int | float):
            raise ValueError(f"its {name} is {state.get(name)!r}")
    if not isinstance(state.get("metrics"), dict):
        raise ValueError(f"its metrics are {state.get('metrics')!r}")


def _check_safetensors(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        if not list(file.keys()):
            raise ValueError("it holds no tensor")


def _check_saved(path: Path, *keys: str) -> None:
    with safe_globals():
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(values, dict) or not all(key in values for key in keys):
        raise ValueError(f"it lacks {', '.join(keys)}")
