"""Whole trainers on a GPU, reference precomputed: fastdpo and TRL, with optimizer, data loading and logging.

    python benchmarks/step/trainer_gpu.py            a Llama of 1B in bfloat16; 8, 32 and 4 pairs a batch of HH-RLHF
                                                     lengths, with default and with fastest settings
    python benchmarks/step/trainer_gpu.py --tiny     a check of the script itself, on any device
    ... --results FOLDER                             also writes them, anew after every part
    ... --seconds N                                  no block begins later than this; default: 480

prefix      fastdpo.DPOTrainer, prompts shared
varlen      the same, packed without sharing: it stands for every stack that packs and does not share
padded      the same, padded
trl         TRL's DPOTrainer, padded
trl liger   the same with Liger's layers; TRL 1.16 does not run Liger's DPO loss, which takes no precomputed reference

All begin with the same weights and see the same rows in the same order, with the same optimizer and learning rate. The
default settings are those of the trainers (layers checkpointed, autocast); the fastest have neither. A contestant first
runs a block of steps that is not timed and logs the numbers of every step; then all run timed blocks in turn, whose
first steps are warm-up. A step lasts from the end of the one before to its own, by CUDA events, so that optimizer, data
loading and logging are in it. Of each step the median over the rounds is taken; their mean, which has one log in ten
steps, gives pairs a second. Ratios are of fastdpo's prefix packing to each of the others: how many times the time and
the counted FLOPs they take, and how many times their peak memory (weights, optimizer and all) fastdpo takes. No time is
given where losses or gradient norms disagree. Exit code 1 where one of fastdpo's failed or disagreed, or time ran out.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "step")]

import torch  # noqa: E402
from common import write_result  # noqa: E402
from contestants import BETA, PACKINGS, packed_work, trl_trainer, trl_work  # noqa: E402
from flops import ModelFlops, Work  # noqa: E402
from running import TOLERANCES, failed, forget, gradient_norm, make_model, told  # noqa: E402
from step_goals import ratios  # noqa: E402
from transformers import PrinterCallback, TrainerCallback  # noqa: E402
from workloads import TRAINER_PLANS, TrainerPart, text_rows, word_tokenizer  # noqa: E402

import fastdpo  # noqa: E402
from fastdpo.device import gemm_flops_per_second  # noqa: E402

# In the order in which they run, in case the time runs out; and the packages that each needs.
CONTESTANTS = {
    "prefix": ("datasets",),
    "varlen": ("datasets",),
    "trl": ("trl", "datasets"),
    "trl liger": ("trl", "datasets", "liger_kernel"),
    "padded": ("datasets",),
}
YARDSTICKS = ("trl", "padded", "varlen")  # the first that runs says what is right
OUT_OF_TIME = "time ran out"
WORDS = 4096  # of the tokenizer, at most: what embeddings a batch looks up changes nothing

# Of a row: given only where the numbers agree. The last are of prefix packing to this one.
RATIOS = ("speedup", "speedup_steps", "flop_ratio", "achieved", "memory_ratio")
FIGURES = ("seconds", "median_seconds", "spread", "step_seconds", "pairs_per_second", "outside_seconds", "peak_bytes",
           "mfu", *RATIOS)  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """Of a block. A log falls after as many steps as are timed, and so into the timed ones."""

    warm: int = 3
    timed: int = 10

    @property
    def all(self) -> int:
        return self.warm + self.timed


@dataclass
class Block(TrainerCallback):
    """What one run of a trainer was like."""

    steps: Steps
    check: bool  # the numbers of every step are wanted, and no times
    logs: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    begins: list[float] = field(default_factory=list)  # on the host
    ends: list[float] = field(default_factory=list)
    marks: list[Any] = field(default_factory=list)  # ends, on the device
    peak_bytes: int | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begins.append(time.perf_counter())

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        if self.check:
            self.norms.append(gradient_norm(model))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        self.ends.append(time.perf_counter())

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.logs if "loss" in entry]

    def step_seconds(self) -> list[float]:
        """Of the timed steps, each from the end of the one before."""
        ends = range(self.steps.warm, self.steps.all)
        if self.marks:
            torch.cuda.synchronize()
            return [self.marks[end - 1].elapsed_time(self.marks[end]) / 1e3 for end in ends]
        return [self.ends[end] - self.ends[end - 1] for end in ends]

    def outside_seconds(self) -> list[float]:
        """Of the host, between the end of a step and the begin of the next: data loading, and logging."""
        return [self.begins[step] - self.ends[step - 1] for step in range(self.steps.warm, self.steps.all)]


class Runs:
    """Blocks of all contestants on the same model and rows."""

    def __init__(self, model: Any, rows: list[dict[str, Any]], tokenizer: Any, part: TrainerPart, steps: Steps) -> None:
        self.model, self.rows, self.tokenizer, self.part, self.steps = model, rows, tokenizer, part, steps

    def options(self, check: bool) -> dict[str, Any]:
        """For the config of either library."""
        own: dict[str, Any] = {}
        if self.part.settings == "fastest":
            own = {"bf16": False, "gradient_checkpointing": False}
        elif self.model.device.type == "cpu":
            own = {"bf16": False}
        return own | {
            "per_device_train_batch_size": self.part.pairs,
            "num_train_epochs": 1,
            "learning_rate": 1e-6,
            "lr_scheduler_type": "constant",
            "logging_steps": 1 if check else self.steps.timed,
            "disable_tqdm": True,
            "seed": 0,
            # Of the check, gradients stay what they are, whose norm is taken in float32.
            **({"max_grad_norm": 1e9} if check else {}),
        }

    def trainer(self, name: str, model: Any, options: dict[str, Any]) -> Any:
        from datasets import Dataset

        rows = Dataset.from_list(self.rows)
        if name not in PACKINGS:
            return trl_trainer(model, rows, self.tokenizer, **options, use_liger_kernel=name == "trl liger")
        with tempfile.TemporaryDirectory() as folder:
            config = fastdpo.DPOConfig(
                output_dir=folder, beta=BETA, max_length=None, report_to=[], save_strategy="no", packing=name, **options
            )
            return fastdpo.DPOTrainer(model=model, args=config, train_dataset=rows, processing_class=self.tokenizer)

    def block(self, name: str, check: bool = False) -> Block:
        cuda = self.model.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        block = Block(self.steps, check)
        with _liger_undone() if name == "trl liger" else nullcontext():
            trainer = self.trainer(name, copy.deepcopy(self.model), self.options(check))
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(block)
            if check:
                trainer.data_collator = self._recorded(trainer.data_collator, name, block)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
        if cuda:
            block.peak_bytes = torch.cuda.max_memory_allocated() - before
        block.logs = trainer.state.log_history
        assert len(block.ends) == self.steps.all, len(block.ends)
        return block

    def _recorded(self, collate: Callable[[Any], Any], name: str, block: Block) -> Callable[[Any], Any]:
        def recorded(rows: Any) -> Any:
            batch = collate(rows)
            block.works.append(packed_work(batch) if name in PACKINGS else trl_work(batch, self.model.device))
            return batch

        return recorded


@contextmanager
def _liger_undone() -> Iterator[None]:
    """Liger's layers stay on the model that they are put on, but for what takes a place in transformers' module."""
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    try:
        yield
    finally:
        vars(modeling_llama).update(before)


def data(model: Any, pairs: int, scale: float) -> tuple[list[dict[str, Any]], Any]:
    """Rows of text with the reference's sums, the policy's own, some nats aside, so that the pairs differ in loss and
    in weight; and their tokenizer."""
    vocabulary = min(model.config.vocab_size, WORDS)
    tokenizer = word_tokenizer(vocabulary)
    rows: list[dict[str, Any]] = list(text_rows(pairs, vocabulary, scale))
    collate = fastdpo.PreferenceCollator(packing="padded")
    generator = torch.Generator().manual_seed(0)
    for begin in range(0, pairs, 8):
        some = rows[begin : begin + 8]
        ids = [{f"{key}_ids": tokenizer(row[key])["input_ids"] for key in ("prompt", "chosen", "rejected")}
               for row in some]  # fmt: skip
        for each in ids:
            for side in ("chosen_ids", "rejected_ids"):
                each[side].append(tokenizer.eos_token_id)
        with torch.no_grad():
            sums = fastdpo.sequence_logps(model, collate(ids).to(model.device)).float().cpu()
        sums += 10 * torch.rand(len(sums), generator=generator)
        for row, chosen, rejected in zip(some, *(half.tolist() for half in sums.chunk(2)), strict=True):
            row.update(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    return rows, tokenizer


def measure(runs: Runs, most_rounds: int, until: float, limit: float) -> dict[str, Any]:
    """Rows of all contestants. By `time.monotonic`, no round but the first is to end later than `until`, and no block
    begins later than `limit`."""
    part, model, steps = runs.part, runs.model, runs.steps
    checkpointing = part.settings == "default"
    result: dict[str, Any] = {
        "title": str(part),
        "model": part.model,
        "shape": "hh",
        "pairs": part.pairs,
        "settings": part.settings,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "checkpointing": checkpointing,
        "warm_steps": steps.warm,
        "timed_steps": steps.timed,
        "rounds": 0,
        "ceiling_per_second": gemm_flops_per_second(model.device, model.dtype),
        "contestants": {name: empty_row() for name in CONTESTANTS},
    }
    flops = ModelFlops.of(model.config)
    works: dict[str, list[Work]] = {}
    for name, needs in CONTESTANTS.items():
        row = result["contestants"][name]
        if any(importlib.util.find_spec(package) is None for package in needs):
            row.update(status="not installed")
            continue
        if time.monotonic() > limit:
            row.update(reason=OUT_OF_TIME)
            continue
        try:
            block = runs.block(name, check=True)
        except Exception as error:  # out of memory, or a peer's own fault: the others are to be measured
            failed(row, error, FIGURES)
        else:
            works[name] = block.works[steps.warm : steps.all]
            row.update(
                losses=block.losses,
                grad_norms=block.norms,
                tokens=statistics.mean(work.tokens for work in works[name]),
                flops=statistics.mean(flops(work, checkpointing) for work in works[name]),
            )
        collect(row)
    words = sum(len(row[side].split()) + 1 for row in runs.rows for side in ("chosen", "rejected"))  # and the end
    targets = words / steps.all
    result["loss_tolerance"] = BETA * TOLERANCES[model.dtype].sum(targets) / part.pairs
    result["norm_tolerance"] = TOLERANCES[model.dtype].norm
    compare_numbers(result)
    blocks = take_turns(runs, result, most_rounds, until, limit)
    useful = None
    if "prefix" in works:
        useful = statistics.mean(flops(work, checkpointing=False) for work in works["prefix"])
    for name, made in blocks.items():
        take_figures(result, name, made, useful)
    relate(result)
    return result


def take_turns(
    runs: Runs, result: dict[str, Any], most_rounds: int, until: float, limit: float
) -> dict[str, list[Block]]:
    """Timed blocks of whose numbers agree, each round begun by another."""
    rows = result["contestants"]
    names = [name for name, row in rows.items() if row["numbers_agree"]]
    blocks: dict[str, list[Block]] = {name: [] for name in names}
    for number in range(most_rounds):
        began = time.monotonic()
        for name in [*names]:
            if time.monotonic() > limit:
                rows[name].update(reason=OUT_OF_TIME)
                continue
            try:
                blocks[name].append(runs.block(name))
            except Exception as error:
                failed(rows[name], error, FIGURES)
                names.remove(name)
                blocks[name] = []
            collect(rows[name])
        names = names[1:] + names[:1]
        result["rounds"] = number + 1
        now = time.monotonic()
        if now + (now - began) > min(until, limit):
            break
    return {name: made for name, made in blocks.items() if made}


def collect(row: dict[str, Any]) -> None:
    """Frees what a block leaves: trainer, model and optimizer hold each other. The device's free memory stays with
    PyTorch, as in the middle of a long run, unless the contestant failed and may have taken all of it."""
    if row["status"] in ("failed", "out of memory"):
        forget()
    else:
        gc.collect()


def empty_row() -> dict[str, Any]:
    keys = ("reason", "tokens", "flops", "losses", "grad_norms", "numbers_agree", *FIGURES)
    return {"status": "not measured", **dict.fromkeys(keys)}


def compare_numbers(result: dict[str, Any]) -> None:
    """Losses and gradient norms of every step against the yardstick's."""
    ran = {name: row for name, row in result["contestants"].items() if row["losses"] is not None}
    right = next((ran[name] for name in YARDSTICKS if name in ran), None)
    if right is None:
        return
    for row in ran.values():
        row["numbers_agree"] = agree(row, row["losses"], right["losses"], row["grad_norms"], right["grad_norms"],
                                     result["loss_tolerance"], result["norm_tolerance"])  # fmt: skip


def agree(
    row: dict[str, Any], losses: list[float], right_losses: list[float], norms: list[float], right_norms: list[float],
    loss_tolerance: float, norm_tolerance: float,
) -> bool:  # fmt: skip
    """Says in the row by how much they do not."""
    loss = worst([abs(a - b) / loss_tolerance for a, b in zip(losses, right_losses, strict=True)])
    norm = worst([abs(a / b - 1) / norm_tolerance for a, b in zip(norms, right_norms, strict=True)])
    if loss <= 1 and norm <= 1:
        return True
    reason = f"a loss {loss:.3g} times, a gradient norm {norm:.3g} times as far off as allowed"
    row.update(dict.fromkeys(FIGURES), status="numbers disagree", reason=reason)
    for key in ("losses", "grad_norms"):  # JSON has no NaN
        row[key] = [value if math.isfinite(value) else None for value in row[key]]
    return False


def worst(errors: list[float]) -> float:
    """NaN where one is."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def take_figures(result: dict[str, Any], name: str, blocks: list[Block], useful: float | None) -> None:
    """Of a contestant's timed blocks, if what they logged is what the check gave."""
    row = result["contestants"][name]
    steps, epsilon = blocks[0].steps, torch.finfo(getattr(torch, result["dtype"])).eps
    logged = [next(entry for entry in block.logs if "loss" in entry) for block in blocks]
    mean, last = statistics.mean(row["losses"][: steps.timed]), row["grad_norms"][steps.timed - 1]
    # Trainers round the norm that they log to the weights' dtype.
    if not agree(row, [entry["loss"] for entry in logged], [mean] * len(logged),
                 [float(entry["grad_norm"]) for entry in logged], [last] * len(logged),
                 result["loss_tolerance"], result["norm_tolerance"] + epsilon):  # fmt: skip
        row["numbers_agree"] = False
        return
    rounds = [block.step_seconds() for block in blocks]
    each = [statistics.median(times) for times in zip(*rounds, strict=True)]
    totals = [sum(times) for times in rounds]
    peaks = [block.peak_bytes for block in blocks if block.peak_bytes is not None]
    seconds = statistics.mean(each)
    row.update(
        status="measured",
        reason=None,
        seconds=seconds,
        median_seconds=statistics.median(each),
        spread=(max(totals) - min(totals)) / statistics.median(totals),
        step_seconds=each,
        pairs_per_second=result["pairs"] / seconds,
        outside_seconds=statistics.median(time for block in blocks for time in block.outside_seconds()),
        peak_bytes=max(peaks, default=None),
        mfu=None if useful is None else useful / seconds / result["ceiling_per_second"],
    )


def relate(result: dict[str, Any]) -> None:
    """Prefix packing to every row that was measured."""
    ours = result["contestants"]["prefix"]
    for row in result["contestants"].values():
        row.update(ratios(row, ours, memory="peak_bytes"))
        if row["speedup"] is not None:
            steps = [a / b for a, b in zip(row["step_seconds"], ours["step_seconds"], strict=True)]
            row["speedup_steps"] = [statistics.median(steps), min(steps), max(steps)]


def run_parts(
    plan: list[TrainerPart],
    device: torch.device,
    seconds: float,
    after_part: Callable[[dict[str, Any]], None],
    steps: Steps | None = None,
    most_rounds: int = 3,
) -> dict[str, Any]:
    """The result of all parts; `after_part` gets it as it grows. A part that raises is noted, and the next one runs."""
    began = time.monotonic()
    steps = steps or Steps()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result: dict[str, Any] = {"device_type": device.type, "complete": False, "parts": [], "problems": []}
    current: Any = None
    model, rows, tokenizer = None, [], None
    for number, part in enumerate(plan):
        left = began + seconds - time.monotonic()
        if left < 0:
            result["problems"].append(f"{part}: left out, {seconds:.0f} s are over")
            continue
        try:
            if current != (part.model, part.scale):
                current = model = None
                forget()
                model = make_model(part.model, device, dtype, checkpointing=False)
                gemm_flops_per_second(model.device, dtype)  # before anything trains
                most = max(each.pairs for each in plan if (each.model, each.scale) == (part.model, part.scale))
                rows, tokenizer = data(model, most * steps.all, part.scale)
                current = (part.model, part.scale)
            runs = Runs(model, rows[: part.pairs * steps.all], tokenizer, part, steps)
            until = time.monotonic() + left / (len(plan) - number)
            measured = measure(runs, most_rounds, until, began + seconds)
        except Exception as error:  # the results of the other parts are wanted all the same
            status, reason = told(error)
            result["problems"].append(f"{part}: {status} ({reason})")
        else:
            result["parts"].append(measured)
            result["problems"] += faults(measured)
            print(report(measured), flush=True)
        forget()
        result["seconds"] = time.monotonic() - began
        after_part(result)
    result["complete"] = True
    after_part(result)
    return result


def faults(result: dict[str, Any]) -> list[str]:
    """What is wrong with our own contestants; a peer that fails is in its row, and that is all."""
    return [
        f"{result['title']}, {name}: {row['status']} ({row['reason']})"
        for name, row in result["contestants"].items()
        if name in PACKINGS and row["status"] != "measured"
    ]


COLUMNS = ("pairs/s", "ms a step", "outside", "spread", "tokens", "peak GB", "MFU", "speed-up", "FLOP ratio",
           "achieved", "memory")  # fmt: skip


def report(result: dict[str, Any]) -> str:
    lines = [
        f"\n{result['title']}, {result['dtype']}; {result['timed_steps']} steps in {result['rounds']} rounds; the last "
        "four: of prefix over this one",
        f"  {'':10}" + "".join(f"{column:>12}" for column in COLUMNS),
    ]
    for name, row in result["contestants"].items():
        if row["status"] != "measured":
            lines.append(f"  {name:10} {row['status']}" + (f": {row['reason']}" if row["reason"] else ""))
            continue
        cells = [
            f"{row['pairs_per_second']:.3g}",
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['outside_seconds'] * 1e3:.1f}",
            f"{row['spread']:.1%}",
            f"{row['tokens']:.0f}",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            *("-" if row[key] is None else f"{row[key]:.2f}" for key in RATIOS if key != "speedup_steps"),
        ]
        lines.append(f"  {name:10}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seconds", type=float, default=480)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not options.tiny and device.type == "cpu":
        parser.error("there is no GPU; --tiny checks the script without one")

    def write(result: dict[str, Any]) -> None:
        if options.results:
            write_result("tiny-trainer_gpu" if options.tiny else "trainer_gpu", result, options.results)

    if importlib.util.find_spec("datasets") is not None:
        from datasets import disable_progress_bars

        disable_progress_bars()
    gc.freeze()  # what the imports have made is not looked through after every block

    steps = Steps(1, 2) if options.tiny else Steps()
    plan = TRAINER_PLANS["tiny" if options.tiny else "cuda"]
    result = run_parts(plan, device, options.seconds, write, steps, most_rounds=2 if options.tiny else 3)
    print("\n" + "\n".join(result["problems"]))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
