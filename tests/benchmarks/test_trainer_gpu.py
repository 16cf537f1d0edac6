"""The benchmark of whole trainers: that it runs them alike, and what it may print."""

import copy
import gc
import json
import math
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from checkout import ROOT

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "step")]

import tables  # noqa: E402
import trainer_gpu  # noqa: E402
import workloads  # noqa: E402
from flops import ModelFlops, Work  # noqa: E402
from trainer_gpu import Block, Runs, Steps  # noqa: E402
from workloads import TRAINER_PLANS, TrainerPart  # noqa: E402

CPU = torch.device("cpu")
PART = TrainerPart("tiny", 2, "fastest", 0.1)
STEPS = Steps(1, 2)
OURS = ("prefix", "varlen", "padded")


@pytest.fixture(autouse=True)
def no_collecting(monkeypatch):
    """Of garbage, which takes longer than the tiny trainers."""
    import accelerate.utils.memory as memory

    none = SimpleNamespace(collect=lambda: 0, freeze=lambda: None)
    monkeypatch.setattr(memory, "gc", none)
    monkeypatch.setattr(trainer_gpu, "gc", none)
    monkeypatch.setattr(trainer_gpu, "forget", lambda: None)
    monkeypatch.setattr(trainer_gpu, "gemm_flops_per_second", lambda *_: 1e12)


@pytest.fixture
def one_thread():
    """Several would wait for each other, over so little work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_whole_trainers_agree_and_are_measured(one_thread, monkeypatch):
    pytest.importorskip("trl")
    written, models = [], []
    make = Runs.trainer
    monkeypatch.setattr(
        Runs, "trainer", lambda self, name, model, options: models.append(weakref.ref(model))
        or make(self, name, model, options),
    )  # fmt: skip
    result = trainer_gpu.run_parts(
        [PART], CPU, 1e9, lambda so_far: written.append(json.dumps(so_far, allow_nan=False)), STEPS, most_rounds=1
    )
    assert result["problems"] == [] and len(written) == 2
    (part,) = result["parts"]
    rows = part["contestants"]
    ours = rows["prefix"]
    for name in (*OURS, "trl"):
        row = rows[name]
        assert row["status"] == "measured" and row["numbers_agree"], row
        assert len(row["losses"]) == len(row["grad_norms"]) == STEPS.all
        assert len(row["step_seconds"]) == STEPS.timed and row["outside_seconds"] > 0
        assert row["pairs_per_second"] == pytest.approx(2 / row["seconds"])
        assert row["speedup"] == pytest.approx(row["seconds"] / ours["seconds"])
        assert row["achieved"] == pytest.approx(row["speedup"] / row["flop_ratio"])
    # Pairs differ, and so do the rows of the timed steps: padding costs, and so does a prompt that runs twice.
    assert len(set(rows["trl"]["losses"])) == STEPS.all
    assert ours["flop_ratio"] == 1 < rows["varlen"]["flop_ratio"] < rows["padded"]["flop_ratio"]
    assert ours["tokens"] < rows["varlen"]["tokens"] < rows["padded"]["tokens"] == rows["trl"]["tokens"]
    assert trainer_gpu.report(part).count("\n") == len(trainer_gpu.CONTESTANTS) + 2
    gc.collect()
    assert len(models) == 8 and not any(model() for model in models)  # on a GPU the next one needs the memory


def runs_of(blocks, part=PART, steps=STEPS):
    """A run whose blocks are made up: `blocks[name](check)`, or an exception."""
    model = trainer_gpu.make_model("tiny", CPU, torch.float32, False)
    rows = workloads.text_rows(part.pairs * steps.all, 100, part.scale)
    runs = Runs(model, rows, None, part, steps)

    def block(name, check=False):
        made = blocks[name]
        made = made(check) if callable(made) else made
        if isinstance(made, Exception):
            raise made
        return copy.deepcopy(made)

    runs.block = block
    return runs


def block_of(seconds=1.0, loss=0.7, norm=2.0, tokens=100, logged=None, peak=None):
    """Of steps that take so long each, half a second of it outside."""

    def made(check):
        losses = [loss] * STEPS.all if check else [loss if logged is None else logged]
        return Block(
            STEPS,
            check,
            logs=[{"loss": each, "grad_norm": norm} for each in losses] + [{"train_loss": 0.1}],
            norms=[norm] * STEPS.all if check else [],
            works=[Work(tokens, tokens * 10, tokens // 2, 3)] * (STEPS.all + 1) if check else [],
            begins=[number * seconds for number in range(STEPS.all)],
            ends=[(number + 1) * seconds - 0.5 for number in range(STEPS.all)],
            peak_bytes=peak,
        )

    return made


def measured(blocks, most_rounds=2, until=math.inf, limit=math.inf, monkeypatch=None):
    names = dict.fromkeys(blocks, ())
    monkeypatch.setattr(trainer_gpu, "CONTESTANTS", {**names, "absent": ("no-such-package",)})
    result = trainer_gpu.measure(runs_of(blocks), most_rounds, until, limit)
    json.dumps(result, allow_nan=False)
    trainer_gpu.report(result)
    return result


def test_figures(monkeypatch):
    blocks = {
        "prefix": block_of(1.0, peak=4),
        "varlen": block_of(1.8, tokens=160),
        "trl": block_of(3.0, tokens=400, peak=8),
    }
    result = measured(blocks, monkeypatch=monkeypatch)
    rows = result["contestants"]
    assert result["rounds"] == 2 and rows["absent"]["status"] == "not installed"
    ours, theirs = rows["prefix"], rows["trl"]
    assert (ours["seconds"], ours["spread"], ours["outside_seconds"], ours["pairs_per_second"]) == (1.0, 0.0, 0.5, 2.0)
    assert (theirs["speedup"], theirs["speedup_steps"], theirs["memory_ratio"]) == (3.0, [3.0] * 3, 0.5)
    assert theirs["flop_ratio"] == pytest.approx(4.0) and theirs["achieved"] == pytest.approx(0.75)
    assert rows["varlen"]["memory_ratio"] is None and rows["varlen"]["flop_ratio"] == pytest.approx(1.6)
    flops = ModelFlops.of(trainer_gpu.make_model("tiny", CPU, torch.float32, False).config)
    useful = flops(Work(100, 1000, 50, 3), checkpointing=False)
    assert theirs["mfu"] == pytest.approx(useful / 3.0 / 1e12)


def test_on_a_gpu_steps_are_timed_by_its_own_clock(monkeypatch):
    """One event a step, from which the device tells milliseconds; the host's clock is asked for what is outside."""

    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.now += 250.0
            self.at = Event.now

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    block = Block(STEPS, check=False)
    for _ in range(STEPS.all):
        block.on_step_begin()
        block.on_step_end()
    assert block.step_seconds() == [0.25, 0.25]
    assert len(block.outside_seconds()) == 2 and all(seconds >= 0 for seconds in block.outside_seconds())


@pytest.mark.parametrize(
    "wrong",
    [
        block_of(loss=0.9),
        block_of(norm=2.1),
        block_of(loss=math.nan),
        block_of(logged=0.9),
        block_of(logged=math.nan),
    ],
)
def test_what_computes_something_else_gets_no_time(monkeypatch, wrong):
    result = measured({"prefix": block_of(), "varlen": wrong, "trl": block_of()}, monkeypatch=monkeypatch)
    row = result["contestants"]["varlen"]
    assert row["status"] == "numbers disagree" and row["numbers_agree"] is False
    assert all(row[figure] is None for figure in trainer_gpu.FIGURES)
    assert result["contestants"]["trl"]["speedup"] == 1.0
    (fault,) = trainer_gpu.faults(result)
    assert "varlen: numbers disagree" in fault


def test_what_fails_stops_nobody(monkeypatch):
    later = block_of()
    blocks = {
        "prefix": block_of(),
        "trl": torch.OutOfMemoryError("CUDA out of memory"),
        "varlen": lambda check: later(check) if check else RuntimeError("boom"),
    }
    rows = measured(blocks, monkeypatch=monkeypatch)["contestants"]
    assert (rows["trl"]["status"], rows["trl"]["reason"]) == ("out of memory", "OutOfMemoryError: CUDA out of memory")
    assert rows["varlen"]["status"] == "failed" and rows["varlen"]["seconds"] is None
    assert rows["prefix"]["status"] == "measured"


def test_time_that_is_over_ends_rounds_and_blocks(monkeypatch):
    blocks = {"prefix": block_of(), "trl": block_of()}
    assert measured(blocks, until=time.monotonic() - 1, monkeypatch=monkeypatch)["rounds"] == 1
    late = measured(blocks, limit=time.monotonic() - 1, monkeypatch=monkeypatch)
    assert {row["reason"] for name, row in late["contestants"].items() if name != "absent"} == {"time ran out"}
    assert trainer_gpu.faults(late) == [f"{PART}, prefix: not measured (time ran out)"]
    left_out = trainer_gpu.run_parts([PART], CPU, -1, lambda result: None, STEPS)
    assert left_out["parts"] == [] and "left out" in left_out["problems"][0]


def test_a_part_that_fails_leaves_the_others(monkeypatch):
    written = []
    monkeypatch.setattr(trainer_gpu, "data", lambda *of: ([], None))
    monkeypatch.setattr(trainer_gpu, "measure", lambda *of: {"contestants": {}})
    monkeypatch.setattr(trainer_gpu, "report", lambda part: "")
    plan = [TrainerPart("no such model", 2, "default"), PART]
    result = trainer_gpu.run_parts(
        plan, CPU, 1e9, lambda so_far: written.append((len(so_far["parts"]), so_far["complete"])), STEPS
    )
    assert written == [(0, False), (1, False), (1, True)]
    assert result["problems"] == [f"{plan[0]}: failed (KeyError: 'no such model')"]


def test_script(monkeypatch, tmp_path):
    def run_parts(plan, device, seconds, after_part, steps, most_rounds):
        assert plan is TRAINER_PLANS["tiny"] and seconds == 7 and steps.all == 3
        after_part({"parts": []})
        return {"problems": ["something"]}

    monkeypatch.setattr(trainer_gpu, "run_parts", run_parts)
    monkeypatch.setattr(sys, "argv", ["trainer_gpu.py", "--tiny", "--seconds", "7", "--results", str(tmp_path)])
    assert trainer_gpu.main() == 1
    (written,) = tmp_path.glob("*/tiny-trainer_gpu.json")
    assert json.loads(written.read_text())["parts"] == []


def test_liger_leaves_nothing_in_transformers():
    from transformers.models.llama import modeling_llama

    before = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP
    with pytest.raises(KeyError), trainer_gpu._liger_undone():
        modeling_llama.apply_rotary_pos_emb = modeling_llama.LlamaMLP = None
        raise KeyError
    assert (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP) == before


def test_plans():
    for plan in TRAINER_PLANS.values():
        for part in plan:
            assert part.model in workloads.MODELS and part.settings in ("default", "fastest")
    assert [part.pairs for part in TRAINER_PLANS["cuda"]] == [8, 32, 4] * 2
    assert 32 * Steps().all <= len(workloads.hh_lengths())


def test_table(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    planned = [f"1B, {pairs} pairs a batch, {settings} settings"
               for settings in ("default", "fastest") for pairs in (4, 8, 32)]  # fmt: skip
    assert tables.trainer_gpu().count("not measured") == len(planned)

    def row(seconds, **more):
        ratios = {"speedup": seconds, "flop_ratio": 2 * seconds, "memory_ratio": 0.5}
        return {"seconds": seconds, "pairs_per_second": 8.0, "mfu": 0.4, **ratios, **more}

    unmeasured = dict.fromkeys(row(1.0))
    rows = {"prefix": row(1.0), "varlen": row(1.5), "padded": row(2.5), "trl": row(3.0), "trl liger": row(2.8)}
    parts = [
        {"title": planned[0], "contestants": rows},
        {
            "title": planned[1],
            "contestants": {**rows, "trl": unmeasured, "trl liger": unmeasured, "varlen": unmeasured},
        },
        {"title": planned[2], "contestants": {**rows, "prefix": unmeasured}},
    ]
    record = {"device": "NVIDIA H100", "versions": {}, "commit": "abc", "date": "today", "device_type": "cuda"}
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100" / "trainer_gpu.json").write_text(json.dumps({**record, "parts": parts}))
    lines = tables.trainer_gpu().splitlines()
    assert lines[2:5] == [
        f"| {planned[0]} | 8 | 40% | 2.80× (5.60×) TRL with Liger's layers | 1.50× (3.00×) | 0.50 |",
        f"| {planned[1]} | 8 | 40% | 2.50× (5.00×) fastdpo, padded | not measured | 0.50 |",
        f"| {planned[2]} | not measured |  |  |  |  |",
    ]
