"""The benchmarks of the reference pass: counted work, who is compared with whom, and what may be printed."""

import json
import math
import sys

import pytest
import torch
from checkout import ROOT
from processes import run, run_script
from tiny import naive_sequence_logps, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "step"), str(ROOT / "benchmarks" / "reference")]

import precompute_cpu  # noqa: E402
import precompute_gpu  # noqa: E402
import reference_goals  # noqa: E402
import step_goals  # noqa: E402
import tables  # noqa: E402
import workloads  # noqa: E402
from flops import ModelFlops, Work, forward_work  # noqa: E402
from precompute_cpu import BEST, DEFAULT, OURS, compare, take_turns  # noqa: E402
from running import BackboneTokens, make_model  # noqa: E402
from workloads import REFERENCE_PLANS, Part  # noqa: E402

import fastdpo  # noqa: E402

CPU = torch.device("cpu")
PART = Part("tiny", "instruct", 8, scale=0.05)


# The least work


def test_formula_is_what_the_flop_counter_sees():
    model = make_model("tiny", CPU, torch.float32, checkpointing=False)
    rows = workloads.rows(Part("tiny", "instruct", 2, scale=0.2), model.config.vocab_size)
    batch = fastdpo.PreferenceCollator(packing="prefix")(rows)
    flops = ModelFlops.of(model.config)
    with torch.no_grad():
        fastdpo.sequence_logps(model, batch)  # verified, which is counted otherwise
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            fastdpo.sequence_logps(model, batch)
        counts = counter.get_flop_counts()["Global"]
        counts.pop(torch.ops.aten.bmm)  # attention, in which the counter sees hidden keys, too
        work = forward_work(rows)
        assert sum(counts.values()) == flops.forward(Work(work.tokens, 0, work.head_tokens, 1))

        n = 50
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.base_model(input_ids=torch.ones(1, n, dtype=torch.long), use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    # It forms n keys for each of n tokens, of which n (n + 1) / 2 are seen.
    attention = flops.forward(Work(0, n * (n + 1) // 2, 0, 1))
    assert 2 * n * attention == (n + 1) * counts[torch.ops.aten.bmm]


def test_least_work_is_that_of_the_different_beginnings():
    rows = workloads.rows(Part("tiny", "8 completions", 8, 0.05), 500)
    rows += [rows[0], {**rows[1], "chosen_ids": [*rows[1]["chosen_ids"][:3], 1, 2]}]
    sequences = {
        (tuple(row["prompt_ids"]), tuple(row[side])) for row in rows for side in ("chosen_ids", "rejected_ids")
    }
    beginnings = {(p + c)[:end] for p, c in sequences for end in range(1, len(p + c) + 1)}
    completions = sum(len(completion) for _, completion in sequences)
    assert forward_work(rows) == Work(len(beginnings), sum(map(len, beginnings)), completions, 1)
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    assert forward_work([pair]) == Work(tokens=5, keys=1 + 2 + 3 + 3 + 4, head_tokens=3, head_products=1)


# On a GPU, here at toy size


@pytest.fixture(scope="module")
def reference():
    return precompute_gpu.Reference(tiny_model(max_position_embeddings=1024), max_tokens=200)


def toy_pairs():
    return workloads.rows(PART, 97)


def test_both_ways_give_the_numbers_of_each_sequence_alone(reference):
    pairs = toy_pairs()
    with torch.no_grad():
        right = naive_sequence_logps(reference.model, pairs)
    right = torch.as_tensor(right).double()
    assert torch.allclose(reference.naive(pairs).double(), right, rtol=0, atol=1e-3)
    assert torch.allclose(reference.naive(pairs, max_tokens=1).double(), right, rtol=0, atol=1e-3)
    assert torch.allclose(precompute_gpu.cached_sums(reference.prefix(pairs), pairs), right, rtol=0, atol=1e-3)


def test_padded_passes_keep_the_order_and_the_budget():
    pairs = workloads.rows(Part("tiny", "hh", 20, 0.1), 97)
    passes = list(precompute_gpu.padded_passes(pairs, 200))
    assert [pair for some in passes for pair in some] == pairs and len(passes) > 2
    for some in passes:
        batch = fastdpo.PreferenceCollator(packing="padded")(some)
        assert batch.input_ids.numel() <= 200 or len(some) == 1


def test_figures(reference):
    pairs = toy_pairs()
    result = precompute_gpu.measure(PART, reference, rounds=2)
    rows = result["contestants"]
    assert {row["status"] for row in rows.values()} == {"measured"}
    ours, naive = rows["prefix"], rows["naive"]
    assert (ours["pairs"], naive["pairs"]) == (8, 1)
    assert ours["unshared_tokens"] == sum(map(sum, workloads.lengths(PART))) + sum(len(p["prompt_ids"]) for p in pairs)
    work = forward_work(pairs)
    assert work.tokens - 2 * len(pairs) <= ours["backbone_tokens"] < ours["unshared_tokens"]
    flops = ModelFlops.of(reference.model.config).forward(work)
    assert ours["flops"] == flops
    assert ours["share_of_ceiling"] == pytest.approx(flops / ours["seconds"] / result["ceiling_per_second"])
    assert ours["tokens_per_second"] == pytest.approx(ours["unshared_tokens"] / ours["seconds"])
    assert ours["backbone_tokens_per_second"] == pytest.approx(ours["backbone_tokens"] / ours["seconds"])
    assert result["baseline"] == "naive" and naive["speedup"] == 1
    assert ours["speedup"] == pytest.approx(ours["tokens_per_second"] / naive["tokens_per_second"])
    assert ours["device_seconds"] is None or torch.cuda.is_available()
    assert "tokens/s" in precompute_gpu.report(result)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("wrong", [0.1, math.nan])
def test_wrong_sums_get_no_speed(reference, monkeypatch, wrong):
    right = precompute_gpu.cached_sums

    def sums(cache, pairs):
        made = right(cache, pairs)
        made[1] += wrong
        return made

    monkeypatch.setattr(precompute_gpu, "cached_sums", sums)
    result = precompute_gpu.measure(PART, reference, rounds=2)
    ours, naive = result["contestants"]["prefix"], result["contestants"]["naive"]
    assert ours["status"] == "numbers disagree" and ours["numbers_agree"] is False
    assert all(ours[figure] is None for figure in precompute_gpu.FIGURES)
    assert naive["status"] == "measured"
    assert "numbers disagree" in precompute_gpu.report(result)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_faulty_peer_gives_no_ratio_and_stops_nobody(reference, monkeypatch, fault):
    right = reference.naive

    def naive(pairs, max_tokens=None):
        if max_tokens is None and fault == "raises":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(pairs, max_tokens) + (0.1 if max_tokens is None else 0)

    monkeypatch.setattr(reference, "naive", naive)
    result = precompute_gpu.measure(PART, reference, rounds=1)
    ours, naive = result["contestants"]["prefix"], result["contestants"]["naive"]
    assert naive["status"] == {"wrong": "numbers disagree", "raises": "out of memory"}[fault]
    assert ours["status"] == "measured" and ours["seconds"] > 0 and ours["share_of_ceiling"] > 0
    assert ours["speedup"] is None and result["baseline"] is None


def test_parts_one_by_one(monkeypatch):
    written = []
    plan = [Part("tiny", "no such shape", 2), PART]
    result = precompute_gpu.run_parts(plan, CPU, 1e9, lambda result: written.append(json.loads(json.dumps(result))), 1)
    assert [len(each["parts"]) for each in written] == [0, 1, 1]
    assert [each["complete"] for each in written] == [False, False, True]
    assert result["problems"] == ["tiny, no such shape, 2 pairs: failed (KeyError: 'no such shape')"]
    late = precompute_gpu.run_parts([PART], CPU, -1, lambda result: None)
    assert late["parts"] == [] and "left out" in late["problems"][0]
    monkeypatch.setattr(precompute_gpu, "cached_sums", lambda cache, pairs: torch.zeros(2 * len(pairs)))
    (problem,) = precompute_gpu.run_parts([PART], CPU, 1e9, lambda result: None, 1)["problems"]
    assert problem.startswith("tiny, instruct, 8 pairs: numbers disagree")


@pytest.mark.slow
def test_gpu_script_runs_at_toy_size(tmp_path):
    run_script("benchmarks/reference/precompute_gpu.py", "--tiny", "--results", tmp_path, folder=tmp_path)
    (written,) = tmp_path.glob("*/tiny-reference_gpu.json")
    record = json.loads(written.read_text())
    assert record["complete"] and record["problems"] == []
    assert [part["title"] for part in record["parts"]] == [str(part) for part in REFERENCE_PLANS["tiny"]]


# On a CPU, against TRL


def outcome(seconds, sums, batch_size=None, memory=1.0):
    return {
        "batch_size": batch_size,
        "seconds": seconds,
        "peak_memory_gb": memory,
        "backbone_tokens": 100,
        "sums": sums,
    }


SUMS = [-100.0, -200.0, -300.0, -400.0]  # of two pairs


def test_all_batches_once_then_ours_default_and_fastest_in_turn():
    order = []
    seconds = {None: 9.0, 1: 5.0, 4: 4.0, 16: 6.0}

    def run(contestant, batch_size):
        order.append((contestant, batch_size))
        return outcome(1.0 if contestant == OURS else seconds[batch_size], SUMS, batch_size)

    runs = take_turns(run, 3, (1, 4, 8, 16))
    turns = [(OURS, None), (DEFAULT, None), (BEST, 4)]
    assert order == [*turns[:2], (BEST, 1), (BEST, 4), (BEST, 16), *turns, *turns]
    assert [len(made) for made in runs.values()] == [3, 3, 3]
    seconds[None] = 3.0
    assert list(take_turns(run, 1, (1, 4))) == [OURS, DEFAULT]


def test_ratios_of_medians():
    runs = {
        OURS: [outcome(seconds, SUMS) for seconds in (2.0, 1.0, 9.0)],
        DEFAULT: [outcome(seconds, SUMS, None, 3.0) for seconds in (9.0, 30.0, 8.0)],
        BEST: [outcome(seconds, SUMS, 1) for seconds in (5.0, 4.0, 6.0)],
    }
    part = compare(runs, 2)
    rows = part["contestants"]
    ours = rows[OURS]
    assert (ours["speedup"], ours["speedup_best"], ours["memory_ratio"]) == (4.5, 2.5, 3.0)
    assert [rows[name]["batch_size"] for name in rows] == [None, 8, 1]
    assert precompute_cpu.report(part).count("4.50") == 1
    del runs[BEST]
    assert compare(runs, 2)["contestants"][OURS]["speedup_best"] == 4.5


@pytest.mark.parametrize("wrong", [0.1, math.nan])
@pytest.mark.parametrize("who", [OURS, DEFAULT, BEST])
def test_one_wrong_sum_in_one_run_prevents_the_ratio(who, wrong):
    runs = {name: [outcome(1.0, SUMS), outcome(1.0, list(SUMS))] for name in (OURS, DEFAULT, BEST)}
    runs[who][1]["sums"][3] += wrong
    part = compare(runs, 2)
    ours = part["contestants"][OURS]
    assert part["contestants"][who]["numbers_agree"] is False
    assert (ours["speedup"] is None) == (who in (OURS, DEFAULT))
    assert (ours["speedup_best"] is None) == (who in (OURS, BEST))
    assert "do not agree" in precompute_cpu.report(part)
    (verdict,) = step_goals.evaluate("cpu", "a CPU", [part], reference_goals.GOALS)
    assert (verdict["value"] is None) == (who in (OURS, DEFAULT))
    json.dumps(part, allow_nan=False)


def test_what_is_allowed_grows_with_the_tokens():
    allowed = precompute_cpu.TOLERANCES[torch.float32].sum(100)
    assert allowed == pytest.approx(3e-3)
    assert precompute_cpu.worst([1.0, 2.0], [1.0, 2.0 + allowed / 2], [allowed] * 2) == pytest.approx(0.5)
    assert math.isnan(precompute_cpu.worst([math.nan, 2.0], [1.0, 2.0], [allowed] * 2))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(max_position_embeddings=1024).save_pretrained(folder)
    return str(folder)


def test_trl_computes_the_same_from_the_same_tokens(model_folder):
    trl = pytest.importorskip("trl")
    config = trl.DPOConfig(output_dir="unused", bf16=False, report_to=[])
    assert config.precompute_ref_batch_size is None
    assert config.per_device_train_batch_size == precompute_cpu.DEFAULT_BATCH
    lengths = workloads.hh_lengths()[:3]
    longest = [prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths]
    runs = {
        name: [precompute_cpu.measure(name, model_folder, 3, batch_size)]
        for name, batch_size in {OURS: None, DEFAULT: None, BEST: 1}.items()
    }
    for (made,) in runs.values():
        assert made["seconds"] > 0 and made["peak_memory_gb"] > 0 and len(made["sums"]) == 6
    assert runs[DEFAULT][0]["backbone_tokens"] == 6 * max(longest)
    assert runs[BEST][0]["backbone_tokens"] == 2 * sum(longest)
    assert sum(map(sum, lengths)) - 6 <= runs[OURS][0]["backbone_tokens"]
    part = compare(runs, 3)
    assert all(row["numbers_agree"] for row in part["contestants"].values()), part
    assert part["contestants"][OURS]["speedup"] > 0


@pytest.mark.slow
def test_cpu_script_runs_each_in_a_process_of_its_own(model_folder):
    pytest.importorskip("trl")
    if torch.cuda.is_available():
        pytest.skip("about CPUs")
    command = ["benchmarks/reference/precompute_cpu.py", "--pairs", "2", "--rounds", "1", "--batches"]
    done = run(*command, "--model", model_folder)
    assert "speedup" in done.stdout and "written" not in done.stdout


def test_pairs_are_not_cut():
    lengths = workloads.hh_lengths()[: workloads.REFERENCE_PAIRS]
    assert max(prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths) <= workloads.MAX_LENGTH


def test_backbone_tokens_are_counted_whoever_calls():
    model = tiny_model()
    tokens = BackboneTokens(model)
    with torch.no_grad():
        model(input_ids=torch.ones(2, 7, dtype=torch.long))
        model.base_model(input_ids=torch.ones(1, 5, dtype=torch.long))
    assert tokens.count == 19


# Goals and tables


def cpu_part(speedup, best, baseline="trl"):
    figures = {"speedup": speedup, "speedup_best": best, "share_of_ceiling": None}
    return {"model": "SmolLM2-135M", "shape": "hh", "baseline": baseline, "contestants": {"prefix": figures}}


def gpu_part(share, model="8B"):
    return {
        "model": model,
        "shape": "hh",
        "baseline": "naive",
        "contestants": {"prefix": {"share_of_ceiling": share, "speedup": 9.0, "speedup_best": None}},
    }


@pytest.mark.parametrize(
    ("device_type", "part", "verdicts"),
    [
        ("cpu", cpu_part(4.0, 2.0), ["met"]),
        ("cpu", cpu_part(3.9, 4.1), ["missed"]),
        ("cpu", cpu_part(None, None), ["not measured"]),
        ("cpu", cpu_part(5.0, 5.0, None), ["not measured"]),
        ("cuda", gpu_part(0.6), ["met"]),
        ("cuda", gpu_part(0.59), ["missed"]),
        ("cuda", gpu_part(None), ["not measured"]),
        ("cuda", gpu_part(0.9, "1B"), []),
        ("cpu", gpu_part(0.9), []),
        ("cuda", cpu_part(5.0, 5.0), []),
    ],
)
def test_goals(device_type, part, verdicts):
    found = step_goals.evaluate(device_type, "its name", [part], reference_goals.GOALS)
    assert [verdict["verdict"] for verdict in found] == verdicts
    assert all(verdict["verdict"] in step_goals.line(verdict) for verdict in found)


def test_goals_are_of_parts_that_are_measured():
    models = {part.model for part in REFERENCE_PLANS["cuda"]} | {reference_goals.CPU_MODEL}
    assert {model for goal in reference_goals.GOALS for model in goal.models} <= models


def write(folder, name, record):
    source = {"device": "NVIDIA H200", "versions": {"trl": "1.16.0"}, "commit": "abc", "date": "2026-11-21 05:27 UTC"}
    path = folder / "device" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(source | record))


def test_table_from_results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    table = tables.reference()
    assert table.count("not measured (`make bench`)") == 1
    assert table.count("not measured (`make bench-gpu`)") == len(REFERENCE_PLANS["cuda"])
    runs = {OURS: [outcome(2.0, SUMS)], DEFAULT: [outcome(9.0, SUMS, None, 3.5)], BEST: [outcome(5.0, SUMS, 1)]}
    goals = [{"goal": "speed", "model": "SmolLM2-135M", "shape": "hh", "verdict": "missed"}]
    write(tmp_path, "reference_cpu", {"rounds": 3, "parts": [compare(runs, 2)], "goals": goals})
    lines = tables.reference().splitlines()
    assert lines[0].endswith("| fastdpo | TRL 1.16.0, default, batches of 8 | TRL 1.16.0, its fastest, batches of 1 |")
    assert lines[2:6] == [
        "| s | 2.00 | 9.00 | 5.00 |",
        "| peak memory, GB | 1.00 | 3.50 | 1.00 |",
        "| tokens through the backbone | 100 | 100 | 100 |",
        "| speed-up of fastdpo | | 4.50× | 2.50× |",
    ]
    assert lines[7].endswith("Goals met: 0 of 1 (speed, SmolLM2-135M hh: missed).")
    runs[DEFAULT] = [outcome(9.0, [0.0] * 4)]
    write(tmp_path, "reference_cpu", {"rounds": 3, "parts": [compare(runs, 2)], "goals": goals})
    lines = tables.reference().splitlines()
    assert lines[2] == "| s | 2.00 | numbers differ | 5.00 |"
    assert lines[5] == "| speed-up of fastdpo | | not measured | 2.50× |"

    row = {"seconds": 2.0, "tokens_per_second": 54321.0, "share_of_ceiling": 0.654, "device_seconds": 1.9}
    parts = [
        {"baseline": "naive", "contestants": {"prefix": row | {"speedup": 4.321}}},
        {"baseline": None, "contestants": {"prefix": row | {"speedup": None, "device_seconds": None}}},
        {"baseline": "naive", "contestants": {"prefix": dict.fromkeys([*row, "speedup"])}},
    ]
    planned = REFERENCE_PLANS["cuda"]
    parts = [
        part | {"model": plan.model, "shape": plan.shape, "pairs": plan.pairs}
        for part, plan in zip(parts, planned, strict=False)
    ]
    write(tmp_path, "reference_gpu", {"parts": parts, "goals": []})
    lines = tables.reference().splitlines()
    assert f"| {planned[0]} | 54,321 | 65% | 95% | 4.32× padded passes |" in lines
    assert f"| {planned[1]} | 54,321 | 65% | not measured | not measured |" in lines
    for plan in planned[2:]:
        assert f"| {plan} | not measured (`make bench-gpu`) |  |  |  |" in lines
