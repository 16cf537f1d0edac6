"""One run from rows to a saved model: what `fastdpo train` and `fastdpo demo` do."""

from __future__ import annotations

import json
import os
import random
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.data.validate import TOKENIZED, data_of, implicit_prompt_length, is_tokenized
from fastdpo.saving import disk_error, replacing
from fastdpo.stopping import Signals
from fastdpo.types import DataError, UserError

HELD_OUT_SHARE = 0.1
SHOWN_PROMPTS = 3


@dataclass(frozen=True)
class RunData:
    """Rows as they stand in the files, checked, with the number and the place of each."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def load_data(
    dataset: str | Path,
    eval_dataset: str | Path | None,
    *,
    split: str | None = None,
    eval_split: str | None = None,
) -> RunData:
    """Reads and checks all rows of what `fastdpo.data.open_rows` takes.

    Without an evaluation set, the rows of every tenth prompt or so are held out (a fixed draw): no held-out prompt is
    trained on. Rows carry their number in what was read, from 0, as `row_number`, and their place in words.

    Raises:
        DataError: names file, row and remedy.
    """
    from fastdpo.data import open_rows, validate_rows
    from fastdpo.trainer.dataset import PLACE

    def load(path: str | Path, split: str | None) -> list[dict[str, Any]]:
        placed = list(open_rows(path, split=split).unchecked())
        rows, places = [row for _, row in placed], [place for place, _ in placed]
        validate_rows(rows, places)
        for row, place in zip(rows, places, strict=True):
            if data_of(row) != "pairs":
                raise DataError(
                    f"{place}: it is one of {data_of(row)}, and this command trains on pairs (prompt, chosen, "
                    "rejected); train on others from Python (examples/ranked_lists.py, fastdpo.KTOTrainer)."
                )
        return [{**row, "row_number": number, PLACE: place} for number, (place, row) in enumerate(placed)]

    if str(eval_dataset) == str(dataset) == "-":
        raise DataError("--dataset and --eval_dataset are both standard input, which comes once; give one as a file.")
    train = load(dataset, split)
    if eval_dataset is None:
        return _held_out(train)
    held_out = load(eval_dataset, eval_split)
    trained = {_prompt_key(row) for row in train}
    both = sum(_prompt_key(row) in trained for row in held_out)
    if both:
        tell(
            f"{both} of {len(held_out)} rows of {eval_dataset} have a prompt that is trained on, too; what is measured "
            "on them says less."
        )
    return RunData(train, held_out)


def _held_out(rows: list[dict[str, Any]]) -> RunData:
    """A tenth of the rows, of whole prompts, apart from the others; none where the prompts are too few for that."""
    by_prompt: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_prompt.setdefault(_prompt_key(row), []).append(number)
    prompts = list(by_prompt.values())
    random.Random(0).shuffle(prompts)
    wanted = round(len(rows) * HELD_OUT_SHARE)
    held_out: set[int] = set()
    for numbers in prompts:
        if len(held_out) < wanted and len(held_out) + len(numbers) <= 2 * wanted:
            held_out.update(numbers)
    if wanted and not held_out:
        tell(
            f"no pair is held out: the {len(rows)} rows have {len(prompts)} prompts, each with too many rows to leave "
            "them out; give --eval_dataset to measure."
        )
    return RunData(
        [row for number, row in enumerate(rows) if number not in held_out], [rows[n] for n in sorted(held_out)]
    )


def _prompt_key(row: dict[str, Any]) -> str:
    """Equal for rows whose prompts are the same."""
    if is_tokenized(row):
        return json.dumps(list(row["prompt_ids"]))
    prompt = row.get("prompt")
    if prompt is None:
        prompt = row["chosen"][: implicit_prompt_length(row["chosen"], row["rejected"])]
    return prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def check_output_dir(path: str | Path, option: str = "--output_dir") -> Path:
    """Makes the folder and writes to it once, so that a run of hours does not fail at its end."""
    path = Path(path)
    probe = path / f".fastdpo-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: this output folder cannot be written ({error.strerror}); name another one with {option}."
        ) from None
    return path


# By the option that names the folder: its config, weights, and weights that are pickled.
_FILES = {
    "--model": ("config.json", ("*.safetensors", "*.safetensors.index.json"), "*.bin*"),
    "--adapter": ("adapter_config.json", ("adapter_model.safetensors",), "adapter_model.bin"),
}


def check_model_path(path: str, option: str = "--model", allow_pickle: bool = False) -> None:
    """A local path must hold a model, or an adapter for one; a name of the form owner/model is left to transformers."""
    from fastdpo.data.read import is_hub_name

    folder = Path(path)
    config, weights, pickled = _FILES[option]
    if not folder.exists():
        if is_hub_name(path):
            return
        raise UserError(f"{path}: there is no such model folder; check the path given with {option}.")
    if not folder.is_dir() or not (folder / config).is_file():
        raise UserError(
            f"{path} is no {option[2:]}: it holds no {config}; give a folder that save_pretrained wrote with {option}."
        )
    try:
        values = json.loads((folder / config).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no object")
    except (OSError, ValueError):
        raise UserError(f"{path} is no {option[2:]}: its {config} cannot be read as JSON.") from None
    if any(any(folder.glob(pattern)) for pattern in weights):
        return
    if not any(folder.glob(pickled)):
        raise UserError(
            f"{path} is no {option[2:]}: it holds no weights ({weights[0].replace('*', 'model')}); save it there again."
        )
    if not allow_pickle:
        raise UserError(
            f"{path} holds its weights as pickled .bin files, which can run code when they are read; save the "
            f"{option[2:]} again as safetensors, or allow them with --allow_pickle true."
        )


def load_model(
    path: str, dtype: Any, *, adapter: str | None = None, allow_pickle: bool = False, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Model and tokenizer, from local files or by name; with `adapter`, a PEFT adapter on top."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from fastdpo.models import check_architecture

    try:
        check_architecture(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code), path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:  # whatever a malformed file makes its reader raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be loaded as a model: {reason}") from error
    if info["missing_keys"]:
        # transformers would go on with random numbers in their place.
        raise UserError(
            f"{path} lacks {len(info['missing_keys'])} of the weights of {type(model).__name__} "
            f"({sorted(info['missing_keys'])[0]}, ...); give the folder of a whole causal language model."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{path}: the tokenizer knows {len(tokenizer)} tokens and the model has embeddings for {rows}; "
            "save the tokenizer that belongs to the model, or call model.resize_token_embeddings before saving."
        )
    return (model if adapter is None else _with_adapter(model, adapter, allow_pickle)), tokenizer


def _with_adapter(model: Any, path: str, allow_pickle: bool) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError("an adapter needs the package peft; install it, or merge the adapter into the model.") from None
    from safetensors import SafetensorError

    try:
        if not Path(path).exists() and not allow_pickle:
            from huggingface_hub import snapshot_download

            path = snapshot_download(path, allow_patterns=["*.json", "*.safetensors"])
        model = PeftModel.from_pretrained(model, path)
        _check_adapter_names(model, path)
        return model
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"it has no {reason}" if isinstance(error, KeyError) else reason
        raise UserError(f"{path} cannot be put on this model as an adapter: {reason}") from error


def _check_adapter_names(model: Any, path: str) -> None:
    """That the file holds each weight of the adapter and none of another: PEFT goes on with a warning, or without.

    Raises:
        UserError: it does not; which weights, and what to do.
    """
    from peft import set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    # Loaded once more, for from_pretrained keeps to itself what it found. What PEFT shares between layers, or makes
    # from a seed, need not be in the file.
    shared = ("vblora_vector_bank", "prompt_encoder", "tinylora_v", "unilora_theta_d", "vera_A", "vera_B")
    renamed = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", {})  # as from_pretrained does it
    found = set_peft_model_state_dict(model, load_peft_weights(path, device="cpu", key_mapping=renamed))
    (name,) = model.peft_config
    weights = {key for key, _ in model.named_parameters()}  # tied ones once
    own = [key for key in found.missing_keys if key in weights and name in key.split(".")]
    missing = sorted(key for key in own if not set(shared) & set(key.split(".")))
    unknown = sorted(found.unexpected_keys)
    if not missing and not unknown:
        return
    what = [
        f"{len(names)} of {which} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for which, names in (
            ("the weights that the adapter has on this model are not in it", missing),
            ("its weights have no place in this model", unknown),
        )
        if names
    ]
    raise UserError(
        f"{path} is an adapter for another model than this one, or was saved from a wrapped one: {' and '.join(what)}; "
        "give the base that it was trained on, or rename the weights in its file."
    )


@dataclass
class Progress:
    """How far a run has come, for what is said if it ends early."""

    stage: str = "before"  # then "training", "trained", "saved"


def run(
    model: Any,
    tokenizer: Any,
    data: RunData,
    args: Any,
    *,
    title: str,
    signals: Signals | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measures, trains, saves, measures again; returns the summary that it also prints and writes.

    Writes into args.output_dir: the model, as soon as it is trained, then report.png and summary.json.

    Args:
        signals: which are held from the end of training until the model is saved.
        overwrite: delete checkpoints of another run in args.output_dir before training.

    Raises:
        UserError: options, data, a checkpoint or a disk that cannot be used.
    """
    from fastdpo.evaluation import generate, measure_preference
    from fastdpo.progress import show_progress
    from fastdpo.report import speed_summary, write_report
    from fastdpo.saving import drop_checkpoints, part_links
    from fastdpo.trainer.command_trainer import CommandTrainer

    started = time.perf_counter()
    progress, signals = progress or Progress(), signals or Signals()
    show, output = not args.disable_tqdm, Path(args.output_dir)
    _check_optimizer(args, model)
    held_out = _tokenized(data.held_out, tokenizer, args, model)
    with _users_mistakes("the run cannot begin"):
        trainer = CommandTrainer(
            model,
            args=args,
            train_dataset=list(data.train),
            eval_dataset=_evaluated(data, args),
            processing_class=tokenizer,
        )
    show_progress(trainer)
    resumed = args.resume_from_checkpoint
    if resumed:
        trainer.check_checkpoint(Path(resumed))
    shown = _shown_prompts(data.held_out)
    options = {"max_length": args.max_length, "packing": trainer.packing, "progress": show}

    def look(when: str) -> tuple[Any, list[str]]:
        preference = None
        if held_out:
            preference = measure_preference(model, held_out, description=f"held-out pairs, {when}", **options)
        answers = generate(
            model, tokenizer, shown, description=f"answers, {when}", progress=show, max_length=args.max_length
        )
        return preference, answers

    before, answers_before = look("before")
    first = trainer.is_world_process_zero()
    if first:
        part_links(output)
        if overwrite:
            drop_checkpoints(output)
    progress.stage = "training"
    trainer.when_trained = signals.hold
    trainer.train(resume_from_checkpoint=resumed)
    progress.stage = "trained"
    trainer.save_whole(output)
    progress.stage = "saved"
    signals.release()
    after, answers_after = look("after")

    history = trainer.state.log_history
    summary = {
        "title": title,
        "held_out_before": before and before.as_dict(),
        "held_out_after": after and after.as_dict(),
        "generations": [
            {"prompt": _prompt_text(prompt), "before": b, "after": a}
            for prompt, b, a in zip(shown, answers_before, answers_after, strict=True)
        ],
        "packing": trainer.packing,
        "speed": speed_summary(history),
        "seconds": time.perf_counter() - started,
    }
    if not first:
        return summary
    otherwise = f"the trained model is saved in {output}, but not what was measured"
    with _writing(output, otherwise), replacing(output) as folder:
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        (folder / "summary.json").write_text(text, encoding="utf-8")
        write_report(
            folder / "report.png", history, title=title, before=summary["held_out_before"],
            after=summary["held_out_after"],
        )  # fmt: skip
    print(describe(summary, output))
    return summary


@contextmanager
def _writing(folder: Path, otherwise: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        raise UserError(f"{folder} cannot be written to ({reason}): {otherwise}; free space there.") from error


@contextmanager
def _users_mistakes(what: str) -> Iterator[None]:
    """ValueErrors, missing packages and files, which options and data cause, as UserErrors."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _check_optimizer(args: Any, model: Any) -> None:
    """That optimizer and schedule can be made: transformers would make them when the references are computed."""
    import torch
    from transformers import Trainer, get_scheduler

    try:
        Trainer.get_optimizer_cls_and_kwargs(args, model)
    except Exception as error:  # of packages that are missing, values that are no numbers, names that are unknown
        raise UserError(
            f"--optim {getattr(args.optim, 'value', args.optim)} cannot be used: {one_line(error)}"
        ) from error
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(
            args.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=2,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs or {},
        )  # fmt: skip
    except Exception as error:
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise UserError(f"--lr_scheduler_type {name} cannot be used: {one_line(error)}") from error


def _evaluated(data: RunData, args: Any) -> Any:
    """What `--eval_strategy` evaluates in training: the held-out pairs; None where it is not asked for."""
    if getattr(args.eval_strategy, "value", args.eval_strategy) == "no" and not args.eval_on_start:
        return None
    if not data.held_out:
        raise UserError("--eval_strategy needs held-out pairs, and there are none; give some with --eval_dataset.")
    return list(data.held_out)


def _tokenized(rows: Sequence[dict[str, Any]], tokenizer: Any, args: Any, model: Any) -> list[dict[str, Any]]:
    from fastdpo.models import causal_lm, position_limit
    from fastdpo.trainer.dataset import NoRowLeft, check_lengths, prepare_dataset

    if not rows:
        return []
    try:
        held_out = prepare_dataset(list(rows), tokenizer, args, name="held-out")
    except NoRowLeft as error:
        tell(f"nothing is measured on held-out pairs: {error}")
        return []
    inner = causal_lm(model)
    check_lengths(held_out, position_limit(inner), args, name="held-out")
    embeddings = inner.get_input_embeddings().weight.shape[0]
    prepared: list[dict[str, Any]] = held_out.to_list()
    for row in prepared:
        largest = max(max(row[name], default=0) for name in TOKENIZED)
        if largest >= embeddings:
            raise DataError(
                f"held-out data set, row {row['row_number']} (counted from 0): it holds the id {largest}, and the "
                f"model has embeddings for {embeddings} tokens; tokenize the rows for this model."
            )
    return prepared


def tell(text: str) -> None:
    """A note on stderr, once for all processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"fastdpo: {text}", file=sys.stderr)


def _shown_prompts(rows: Sequence[dict[str, Any]]) -> list[Any]:
    prompts = {_prompt_key(row): row["prompt"] for row in rows if row.get("prompt") is not None}
    return list(prompts.values())[:SHOWN_PROMPTS]


def _prompt_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def describe(summary: dict[str, Any], output: Path, width: int = 100) -> str:
    """The summary as a person reads it in a terminal."""
    lines = [""]
    column = (width - 3) // 2
    for example in summary["generations"]:
        lines += [f"> {example['prompt']}", f"{'before':<{column}} | after"]
        before, after = (textwrap.wrap(" ".join(example[k].split()), column) or [""] for k in ("before", "after"))
        for i in range(max(len(before), len(after))):
            left, right = (part[i] if i < len(part) else "" for part in (before, after))
            lines.append(f"{left:<{column}} | {right}")
        lines.append("")
    b, a = summary["held_out_before"], summary["held_out_after"]
    if b and a:
        lines += [
            f"held-out pairs ({a['pairs']})         before ->  after",
            f"  preference accuracy     {b['accuracy']:7.1%} -> {a['accuracy']:6.1%}",
            f"  mean margin, nats/token {b['margin']:+7.3f} -> {a['margin']:+6.3f}",
        ]
    speed = summary["speed"]
    if speed:
        lines += [
            f"speed                     {speed['tokens_per_second']:,.0f} tokens/s, "
            f"{speed['pairs_per_second']:.2f} pairs/s"
            + (f", {speed['mfu']:.0%} of the measured matmul speed" if "mfu" in speed else ""),
            f"tokens saved by sharing   {speed['saved_tokens_fraction']:.1%}",
            f"peak memory               {speed['peak_memory_gb']:.2f} GB",
        ]
    lines += [
        f"whole run                 {summary['seconds']:.0f} s",
        f"model                     {output}   (AutoModelForCausalLM.from_pretrained)",
        f"picture                   {output / 'report.png'}",
    ]
    return "\n".join(lines)
