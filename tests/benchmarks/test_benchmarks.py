"""The benchmarks at toy size: that they run, that their yardstick is right, and what they may print."""

import importlib.util
import json
import sys

import processes
import pytest
import torch
from checkout import ROOT

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "kernels")]

import cpu_claims  # noqa: E402
import gather  # noqa: E402
import logprobs  # noqa: E402
from problems import HeadProblem, LogitsProblem, naive_logps  # noqa: E402
from runner import FIGURES, Run, measure  # noqa: E402
from timing import interleaved, interleaved_intervals  # noqa: E402
from variants import VARIANTS, Variant, eager_logits  # noqa: E402

from fastdpo_kernels import eager  # noqa: E402

CPU = torch.device("cpu")


def run(*command):
    # Beside other tests two threads would wait for one another; by the worker's mark pytest-benchmark measures nothing.
    return processes.run(*command, env=processes.environment(PYTEST_XDIST_WORKER=None)).stdout


def named(family, *names):
    return [variant for variant in VARIANTS[family] if variant.name in names]


def measured(problem, variants):
    part = measure(problem, variants, ceiling=1e9, repeats=2, warmup=0)
    return {mode: result["variants"] for mode, result in part["modes"].items()}


@pytest.mark.slow
def test_kernel_benchmark_runs_at_toy_size(tmp_path):
    words = ["--tiny", "--only", "fastdpo", "eager", "--results", tmp_path]
    out = processes.run_script("benchmarks/kernels/logprobs.py", *words, folder=tmp_path)
    (written,) = tmp_path.glob("*/tiny_fastdpo_eager.json")
    record = json.loads(written.read_text())
    assert {"device", "versions", "commit", "date"} <= set(record)
    assert record["complete"] and record["problems"] == []
    assert [part["family"] for part in record["parts"]] == ["logits", "head", "dpo"]
    for part in record["parts"]:
        for mode, result in part["modes"].items():
            assert result["floor_ms"] == pytest.approx(result["work"] / part["ceiling_per_second"] * 1e3)
            assert {"fastdpo", "eager"} <= set(result["variants"])
            for row in result["variants"].values():
                assert row["status"] == "measured" and row["numbers_agree"], out
                assert row["share_of_ceiling"] == pytest.approx(result["floor_ms"] / row["ms"])
                assert (row["backward_ms"] is None) == (mode == "no grad")


@pytest.mark.slow
def test_train_step_benchmark_runs_at_toy_size(tmp_path):
    words = ["--tiny", "--shapes", "hh", "8 completions", "--results", tmp_path]
    out = processes.run_script("benchmarks/step/train_step.py", *words, folder=tmp_path)
    (written,) = tmp_path.glob("*/tiny-train_step.json")
    record = json.loads(written.read_text())
    assert record["complete"] and record["problems"] == []
    assert [part["shape"] for part in record["parts"]] == ["hh", "8 completions"]
    for part in record["parts"]:
        rows = part["contestants"]
        assert list(rows) == ["prefix", "varlen", "padded", "naive", "plain", "trl"]
        without_trl = importlib.util.find_spec("trl") is None
        assert rows.pop("trl")["status"] == ("not installed" if without_trl else "measured"), out
        assert {row["status"] for row in rows.values()} == {"measured"}, out
        assert part["baseline"] == ("plain" if without_trl else "trl")
        assert rows["prefix"]["tokens"] < rows["varlen"]["tokens"] <= rows["padded"]["tokens"]


@pytest.mark.slow
def test_gather_benchmark_runs_at_toy_size(tmp_path):
    processes.run_script("benchmarks/kernels/gather.py", "--tiny", "--results", tmp_path, folder=tmp_path)
    (written,) = tmp_path.glob("*/tiny-gather.json")
    record = json.loads(written.read_text())
    parts = record["parts"]
    assert record["complete"] and record["problems"] == record["goals"] == []  # goals are of GPUs
    assert [part["group"] for part in parts[::2]] == list(gather.GROUPS)
    for part in parts:
        assert part["k"] > part["t"] > 0 and part["work"] == 4 * (part["t"] + part["k"]) * 2 * 16 * 4
        assert part["variants"]["fastdpo"]["same_every_time"]
        for row in part["variants"].values():
            assert row["numbers_agree"] and row["ms"] > 0
            assert row["share_of_ceiling"] == pytest.approx(part["work"] / row["ms"] * 1e3 / part["ceiling_per_second"])


@pytest.fixture
def rows():
    """The benchmark of the row kernels, which imports them."""
    pytest.importorskip("triton")
    import rows

    return rows


@pytest.mark.slow
def test_row_kernels_and_their_predecessors_run_at_toy_size(rows, tmp_path):
    words = ["--tiny", "--tune", "--results", tmp_path]
    processes.run_script("benchmarks/kernels/rows.py", *words, folder=tmp_path)
    (written,) = tmp_path.glob("*/tiny-rows_tuned.json")
    record = json.loads(written.read_text())
    assert record["complete"] and [part["softcap"] for part in record["parts"]] == [None, rows.SOFTCAP]
    for part in record["parts"]:
        assert tuple(part["kernels"]) == rows.KERNELS
        for variants in part["kernels"].values():
            assert list(variants) == [*rows.CONTESTANTS, *rows.SIZES]
            assert all(row["numbers_agree"] and row["same_every_time"] and row["ms"] > 0 for row in variants.values())


def test_a_wrong_row_kernel_gets_no_time(rows, monkeypatch):
    def wrong(logits, labels, **options):
        logps, norms, values = eager.token_logprobs_fwd(logits, labels, **options)
        return logps + 1e-3, norms, values

    right = (eager.token_logprobs_fwd, eager.token_logprobs_bwd, eager.token_logprobs_fwd_grad)
    monkeypatch.setattr(rows, "CONTESTANTS", {"right": right, "wrong": (wrong, *right[1:])})
    part = rows.measure(rows.Case(4, 300, 30.0, CPU, torch.bfloat16), ceiling=1e9, repeats=1, warmup=0)
    for kernel, variants in part["kernels"].items():
        assert variants["right"]["numbers_agree"] and variants["right"]["ms"] > 0
        assert variants["wrong"]["numbers_agree"] == (not kernel.startswith("forward"))
        assert (variants["wrong"]["ms"] is None) == kernel.startswith("forward")
    assert "numbers disagree" in rows.report(part)


def test_gather_benchmark_has_the_rows_of_its_groups():
    num_rows, index = gather.gathered_rows((3, (2, 1)), tokens=13)
    assert num_rows == 12
    assert index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 6, 7, 8, 11]


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_a_wrong_gather_gets_no_time(monkeypatch, wrong):
    def wrong_gather(key, value, index, copies, offsets):
        value = WrongGradient.apply(value) if wrong == "gradient" else value + 1e-6
        return key.index_select(0, index), value.index_select(0, index)

    monkeypatch.setattr(gather, "gather_kv", wrong_gather)
    case = gather.Case("pair, short", "heads first", 500, 2, 16, CPU)
    part = gather.measure(case, ceiling=1e9, repeats=1, warmup=0)
    row = part["variants"]["fastdpo"]
    assert not row["numbers_agree"] and all(row[figure] is None for figure in gather.FIGURES)
    assert part["variants"]["index_select"]["ms"] > 0
    assert "numbers disagree" in gather.report(part)


def test_a_gather_that_raises_is_noted_and_the_others_are_written(tmp_path, monkeypatch):
    measure = gather.measure

    def fails_once(case, *rest):
        if case.shape["layout"] == "heads first":
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")
        return measure(case, *rest)

    monkeypatch.setattr(gather, "measure", fails_once)
    monkeypatch.setattr(gather, "copy_bytes_per_second", lambda device: 1e9)
    monkeypatch.setattr(gather, "GROUPS", {"few": (3, (2, 1))})
    monkeypatch.setattr(sys, "argv", ["gather.py", "--tiny", "--results", str(tmp_path)])
    assert gather.main() == 1
    (written,) = tmp_path.glob("*/tiny-gather.json")
    record = json.loads(written.read_text())
    assert [part["layout"] for part in record["parts"]] == ["tokens first"]
    assert record["problems"] == ["few, heads first: OutOfMemoryError: CUDA out of memory"]


def test_work_is_that_of_the_fewest_passes():
    logits = LogitsProblem(4, 10, CPU, torch.float32)
    assert {mode.name: mode.work for mode in logits.modes} == {"no grad": 4 * 10 * 4, "gradient": 3 * 4 * 10 * 4}
    head = HeadProblem("head", 16, 3, 10, CPU, torch.float32)
    product = 2 * 16 * 3 * 10
    assert [mode.work for mode in head.modes] == [product, 2 * product, 3 * product]


@pytest.mark.parametrize("family", ["logits", "head", "dpo"])
def test_trl_computes_the_same(family):
    pytest.importorskip("trl")
    rows = measured(logprobs.make_problem(family, dict(logprobs.SIZES["tiny"])[family], CPU), named(family, "TRL"))
    assert {row["TRL"]["status"] for row in rows.values()} == {"measured"}


def test_padded_layout_is_the_packed_one_in_another_order():
    problem = HeadProblem("dpo", 32, 8, 50, CPU, torch.float32, pairs=4)

    def make(problem):
        def loss(hidden, weight):
            assert hidden.shape == (8, 4, 8)  # chosen rows first
            sums = naive_logps(hidden @ weight.T, problem.padded_labels).sum(1)
            return -torch.nn.functional.logsigmoid(1e-3 * (sums[:4] - sums[4:])).mean()

        return loss

    rows = measured(problem, [Variant("padded", make, returns="loss", padded=True), *named("dpo", "fastdpo", "eager")])
    assert {row["status"] for mode in rows.values() for row in mode.values()} == {"measured"}


def test_truth_is_told_from_rounding_in_bfloat16():
    """Rounding the log-probs to bfloat16, as one might to save memory, is more than the plain code's error."""
    problem = LogitsProblem(16, 100, CPU, torch.bfloat16)
    rounded = Variant("rounded", lambda problem: lambda logits: eager_logits(problem)(logits).bfloat16())
    rows = measured(problem, [rounded, *named("logits", "fastdpo", "fastdpo, in place", "eager")])
    for mode in rows.values():
        assert mode.pop("rounded")["status"] == "numbers disagree"
        assert {row["status"] for row in mode.values()} == {"measured"}


def wrong_value(problem):
    return lambda logits: eager_logits(problem)(logits) + 1e-2


def wrong_gradient(problem):
    def logps(logits):
        right = eager_logits(problem)(logits)
        return right + 1e-2 * (right - right.detach())

    return logps


def test_wrong_numbers_get_no_time():
    variants = [Variant("value", wrong_value), Variant("gradient", wrong_gradient), *named("logits", "fastdpo")]
    rows = measured(LogitsProblem(8, 100, CPU, torch.float32), variants)
    for mode in rows.values():
        assert mode["fastdpo"]["status"] == "measured" and mode["fastdpo"]["ms"] > 0
        assert mode["value"]["status"] == "numbers disagree" and mode["value"]["numbers_agree"] is False
        assert all(mode["value"][key] is None for key in FIGURES)
        assert "log-probs" in mode["value"]["reason"]
    assert rows["no grad"]["gradient"]["status"] == "measured"
    assert rows["gradient"]["gradient"]["ms"] is None and "gradient at" in rows["gradient"]["gradient"]["reason"]


@pytest.mark.parametrize("family", ["head", "dpo"])
def test_wrong_gradient_of_the_weight_shows_where_it_is_needed(family):
    (right,) = named(family, "eager")

    def make(problem):
        function = right.make(problem)
        return lambda hidden, weight: function(hidden, WrongGradient.apply(weight))

    rows = measured(HeadProblem(family, 32, 8, 50, CPU, torch.float32), [Variant("wrong", make, returns=right.returns)])
    assert [mode["wrong"]["status"] for mode in rows.values()] == ["measured", "measured", "numbers disagree"]
    assert rows["trainable"]["wrong"]["ms"] is None


def test_nan_does_not_agree():
    variant = Variant("nan", lambda problem: lambda logits: eager_logits(problem)(logits) * torch.nan)
    rows = measured(LogitsProblem(8, 100, CPU, torch.float32), [variant])
    assert {mode["nan"]["status"] for mode in rows.values()} == {"numbers disagree"}
    assert "nan times" in rows["no grad"]["nan"]["reason"]
    json.dumps(rows, allow_nan=False)


def raises_at_once(problem):
    raise RuntimeError("no such kernel\nand pages of compiler output")


def raises_when_run(problem):
    def logps(logits):
        raise ValueError("this shape is not supported")

    return logps


def raises_while_timed(problem):
    calls = []

    def logps(logits):
        calls.append(1)
        if len(calls) % 2 == 0:  # the first run of each mode is the one that is checked
            raise RuntimeError("out of memory, say")
        return eager_logits(problem)(logits)

    return logps


def test_a_peer_that_raises_is_reported_and_stops_nobody():
    variants = [
        Variant("at once", raises_at_once),
        Variant("when run", raises_when_run),
        Variant("while timed", raises_while_timed),
        Variant("missing", eager_logits, package="no-such-package"),
        Variant("on a GPU", eager_logits, needs_cuda=True),
        *named("logits", "fastdpo"),
    ]
    for mode in measured(LogitsProblem(8, 100, CPU, torch.float32), variants).values():
        assert mode["fastdpo"]["status"] == "measured"
        assert {name: (row["status"], row["reason"]) for name, row in mode.items() if name != "fastdpo"} == {
            "at once": ("failed", "RuntimeError: no such kernel"),
            "when run": ("failed", "ValueError: this shape is not supported"),
            "while timed": ("failed", "RuntimeError: out of memory, say"),
            "missing": ("unavailable", "no-such-package is not installed"),
            "on a GPU": ("unavailable", "needs a CUDA device"),
        }
        assert all(row["ms"] is None for name, row in mode.items() if name != "fastdpo")


def test_inputs_that_were_written_over_are_restored():
    problem = LogitsProblem(8, 100, CPU, torch.float32)
    (variant,) = named("logits", "fastdpo, in place")
    inplace = Run(problem, variant, problem.modes[1], variant.function(problem))
    before = problem.logits.clone()
    first = inplace()[1][0].clone()
    assert torch.equal(inplace()[1][0], first) and torch.equal(problem.logits, before)


def test_a_part_that_raises_is_noted_and_results_are_written_after_every_part(monkeypatch, capsys):
    sizes = [("head", {"n": 64, "d": 8, "v": 50}), ("logits", {"n": 8, "v": 100}), ("logits", {"n": 16, "v": 100})]
    make_problem = logprobs.make_problem

    def make(family, shape, device):
        if family == "head":
            raise MemoryError("too large")
        return make_problem(family, shape, device)

    monkeypatch.setattr(logprobs, "make_problem", make)
    monkeypatch.setattr(logprobs, "ceiling_of", lambda problem: 1e9)
    written = []
    result = logprobs.run_parts(
        sizes, lambda family: named(family, "fastdpo"), CPU, 1e9, lambda result: written.append(json.dumps(result))
    )
    assert [len(json.loads(text)["parts"]) for text in written] == [0, 1, 2, 2]
    assert [json.loads(text)["complete"] for text in written] == [False, False, False, True]
    assert result["problems"] == ["log-probs from hidden states, N=64 D=8 V=50: MemoryError: too large"]
    assert "N=16 V=100" in capsys.readouterr().out


def test_what_is_left_out_for_time_is_a_problem():
    result = logprobs.run_parts(logprobs.SIZES["tiny"], lambda family: [], CPU, -1, lambda result: None)
    assert len(result["problems"]) == 3 and "left out" in result["problems"][0] and result["parts"] == []


def test_only_our_own_faults_count():
    problem = LogitsProblem(8, 100, CPU, torch.float32)
    peer, ours = Variant("peer", wrong_value), Variant("fastdpo, wrong", wrong_value)
    assert logprobs.faults(measure(problem, [peer], 1e9, 1, 0)) == []
    (fault, _) = logprobs.faults(measure(problem, [ours], 1e9, 1, 0))
    assert "fastdpo, wrong: numbers disagree" in fault


def test_rounds_take_turns_and_medians_are_taken():
    order = []

    def run(name):
        def timed(mark):
            mark()
            order.append(name)
            mark()
            mark()

        return timed

    times = interleaved_intervals({"a": run("a"), "b": run("b")}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3
    for timing in times.values():
        assert len(timing.seconds) == 3 and timing.seconds[0] >= max(timing.seconds[1:]) >= 0
        assert timing.spread >= 0
    with pytest.raises(ZeroDivisionError):
        interleaved({"bad": lambda: 1 / 0}, repeats=1, warmup=0)


def test_cpu_claims_in_one_process():
    memory = {"fastdpo": 300_000, "fastdpo, in place": None, "eager": 1_200_000}
    problem = logprobs.make_problem("logits", cpu_claims.SIZES[True]["logits"], CPU)
    result = cpu_claims.compare(problem, lambda family, mode, variant: memory[variant], repeats=1)
    rows = result["modes"]["gradient"]
    assert rows["fastdpo"]["memory_ratio"] == 0.25 and rows["eager"]["memory_ratio"] == 1
    gradient = 64 * 1000 * 4
    assert rows["fastdpo"]["work_memory_ratio"] == (300_000 - gradient) / (1_200_000 - gradient)
    assert rows["fastdpo"]["time_ratio"] == pytest.approx(rows["fastdpo"]["ms"] / rows["eager"]["ms"])
    assert rows["fastdpo, in place"]["memory_ratio"] is None
    assert "no grad" not in result["modes"] and "0.250" in cpu_claims.report(result)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about CPUs")
def test_cpu_claims_measure_memory_in_a_fresh_process():
    peak = cpu_claims.memory_in_a_process("dpo", "trainable", "eager", tiny=True)
    assert peak is None or 0 <= peak < 1 << 28


@pytest.mark.slow
def test_pytest_front_end(tmp_path):
    if importlib.util.find_spec("pytest_benchmark") is None:
        pytest.skip("pytest-benchmark is not installed")
    saved = tmp_path / "saved.json"
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/kernels/test_kernels.py", "-k",
        "logits and (fastdpo or Liger) and not place", f"--benchmark-json={saved}")  # fmt: skip
    speeds = {speed["name"]: speed["extra_info"] for speed in json.loads(saved.read_text())["benchmarks"]}
    assert {name.split("-")[-2] for name in speeds} == {"forward", "backward", "both"}
    for name, info in speeds.items():
        assert info["errors"] and all(error <= 1 for error in info["errors"].values())
        assert ("share_of_ceiling" in info) == ("no grad" in name or "both" in name)
