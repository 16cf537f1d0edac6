"""What a run survives: being told to stop, losses that are no numbers, and what it cannot work with."""

import copy
import importlib
import json
import math
import signal
import sys
import threading
from pathlib import Path

import pytest
from tiny import random_rows, tiny_model, word_tokenizer
from trainer_runs import config, losses_of, trainer
from transformers import TrainerCallback

from fastdpo import CPOConfig, DPOTrainer, KTOConfig, KTOTrainer, ORPOConfig
from fastdpo.losses import REGISTRY
from fastdpo.trainer.watch import NotFiniteError, StopRequest
from fastdpo.types import DataError, UserError

sys.path.insert(0, str(Path(__file__).parent))
interrupted_run = importlib.import_module("interrupted_run")
start, marked_rows = interrupted_run.start, interrupted_run.marked_rows


CODES = {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 128 + signal.SIGTERM}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run."""
    return start(tmp_path_factory.mktemp("whole"), logging_steps=2).result()


def assert_resumes_to(whole, folder, **options):
    resumed = start(folder, resume=True, **options).result()
    assert resumed["history"] == whole["history"]
    assert resumed["weights"] == whole["weights"]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "out").glob("checkpoint-*"))


# Signals


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_in_the_middle_of_a_step(tmp_path, whole, number):
    run = start(tmp_path, logging_steps=2, pause_at=3)
    run.paused()
    run.send(number)
    run.go_on()
    assert run.code() == CODES[number]
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    assert f"{number.name}: saving a checkpoint at the end of this step, then stopping" in run.said()
    assert_resumes_to(whole, tmp_path, logging_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "event, step, saved",
    [
        ("on_train_begin", 0, 1),
        ("on_save", 2, 3),
        pytest.param("on_log", 2, 3, marks=pytest.mark.slow),
        pytest.param("on_step_end", 2, 3, marks=pytest.mark.slow),
    ],
)
def test_a_signal_between_steps(tmp_path, whole, event, step, saved):
    run = start(tmp_path, logging_steps=2, pause_in=event, pause_step=step, save_strategy="steps", save_steps=2)
    run.paused()
    run.send(signal.SIGTERM)
    run.go_on()
    assert run.code() == CODES[signal.SIGTERM]
    assert f"checkpoint-{saved}" == checkpoints(tmp_path)[-1]
    assert_resumes_to(whole, tmp_path, logging_steps=2)


def test_a_signal_after_the_last_step_loses_nothing(tmp_path, whole):
    """No step is left at whose end a checkpoint could be saved; the promise stands."""
    run = start(tmp_path, logging_steps=2, pause_in="on_step_end", pause_step=6)
    run.paused()
    run.send(signal.SIGTERM)
    run.go_on()
    assert run.code() == CODES[signal.SIGTERM]
    assert checkpoints(tmp_path) == ["checkpoint-6"]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    run = start(tmp_path, pause_at=3)
    run.paused()
    for _ in range(2):
        run.send(signal.SIGINT)
        threading.Event().wait(0.3)  # two that come together are one
    assert run.code() == -signal.SIGINT  # without the file that lets it go on
    assert not checkpoints(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_to_the_workers_of_the_data_loader_too(tmp_path, whole, number):
    """A terminal sends Ctrl-C to all processes of the program, a batch system SIGTERM."""
    options = {"logging_steps": 2, "dataloader_num_workers": 2}
    run = start(tmp_path, pause_at=3, **options)
    run.paused()
    run.send(number, group=True)
    run.go_on()
    assert run.code() == CODES[number], run.said()
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    assert_resumes_to(whole, tmp_path, **options)


@pytest.mark.slow
def test_accumulated_steps_are_brought_to_their_end(tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_tokens_per_microbatch": 60, "max_steps": 4}
    undisturbed = start(tmp_path / "whole", **options).result()
    run = start(tmp_path / "run", pause_at=2, **options)
    run.paused()
    run.send(signal.SIGINT)
    run.go_on()
    assert run.code() == -signal.SIGINT
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    assert_resumes_to(undisturbed, tmp_path / "run", **options)


def test_ctrl_c_then_a_second_call_in_the_same_process(tmp_path, whole):
    """As in a notebook."""
    run = start(tmp_path, logging_steps=2, pause_at=3, twice=True)
    run.paused()
    run.send(signal.SIGINT)
    run.go_on()
    ended = run.result()
    assert ended["history"] == whole["history"] and ended["weights"] == whole["weights"]


@pytest.mark.slow
def test_two_ctrl_c_then_a_second_call_in_the_same_process(tmp_path, whole):
    """What stopped the first call is no wish about the second."""
    run = start(tmp_path, logging_steps=2, pause_at=3, twice=True, save_strategy="steps", save_steps=2)
    run.paused()
    for _ in range(2):
        run.send(signal.SIGINT)
        threading.Event().wait(0.3)
    run.go_on()
    ended = run.result()
    assert ended["steps"] == 6 and ended["weights"] == whole["weights"]
    assert ended["history"] == whole["history"]


OF_TWO = {"processes": 2, "per_device_train_batch_size": 2, "max_steps": 5}


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    """The undisturbed run of two processes."""
    run = start(tmp_path_factory.mktemp("whole"), **OF_TWO)
    assert run.result()["weights"] == run.result(1)["weights"]
    return run.result()


@pytest.mark.slow
@pytest.mark.parametrize("number, rank", [(signal.SIGINT, 0), (signal.SIGTERM, 1)], ids=["SIGINT-0", "SIGTERM-1"])
def test_one_of_two_processes_is_told(tmp_path, whole_of_two, number, rank):
    """They stop together, after the same step, and none goes on in the script as if the run had ended."""
    run = start(tmp_path, pause_at=2, **OF_TWO)
    for each in (0, 1):
        run.paused(each)
    run.send(number, rank)
    run.go_on()
    assert run.code(rank) == CODES[number]
    assert run.code(1 - rank) == CODES[number], run.said(1 - rank)
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    assert_resumes_to(whole_of_two, tmp_path, **OF_TWO)


def test_handlers_are_those_of_before_whatever_happens(tmp_path):
    def mine(*of):
        pass

    def broken(*args, **kwargs):
        inside.append(signal.getsignal(signal.SIGTERM))
        raise RuntimeError("broken")

    inside, old = [], signal.signal(signal.SIGTERM, mine)
    try:
        run = trainer(tmp_path, max_steps=1)
        run.train()
        assert signal.getsignal(signal.SIGTERM) is mine
        run.compute_loss = broken
        with pytest.raises(RuntimeError, match="broken"):
            run.train()
        assert signal.getsignal(signal.SIGTERM) is mine and inside == [run._stop_request._asked]
    finally:
        signal.signal(signal.SIGTERM, old)


def test_a_handler_that_python_has_not_set(tmp_path, monkeypatch):
    """signal.getsignal knows none where a library in C has set one; it cannot be put back, but nothing breaks."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in CODES}
    try:
        with StopRequest().listening():
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_train_from_a_thread(tmp_path):
    run, other = trainer(tmp_path), trainer(tmp_path)
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    other.train()
    assert losses_of(run) == losses_of(other) and len(losses_of(run)) == 5


# Losses that are no numbers


@pytest.fixture(params=["nan", "inf", "gradient"])
def kind(request):
    """What is wrong with a marked row: its loss and gradient, its loss alone, its gradient alone."""
    interrupted_run.bad_loss(request.param)
    yield request.param
    REGISTRY.pop("marked", None)


def bad_run(tmp_path, rows, marked, **options):
    run = trainer(tmp_path, rows=marked_rows(rows, marked), loss_type="marked", **options)
    seen, collate = [], run.data_collator
    run.data_collator = lambda some: seen.append([row["row_number"] for row in some]) or collate(some)
    return run, seen


def written(run):
    path = Path(run.args.output_dir) / "nan_rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_finite(model):
    return all(bool(value.isfinite().all()) for value in model.parameters())


@pytest.mark.parametrize("order, accumulate", [("sequential", 2), ("random", 1), ("random", 2)])
def test_the_next_log_names_step_and_rows(tmp_path, kind, order, accumulate):
    rows = random_rows(24, seed=1)
    for number in (0, 5, 6):  # left out, for no token of an answer would be left
        rows[number]["prompt_ids"] = [5] * 40
    run, seen = bad_run(
        tmp_path, rows, {13}, max_length=40, train_sampling_strategy=order, gradient_accumulation_steps=accumulate,
        max_steps=11 // accumulate, logging_steps=11 // accumulate, per_device_train_batch_size=2,
    )  # fmt: skip
    with pytest.raises(NotFiniteError, match="the loss of step") as error:
        run.train()
    batch = next(number for number, batch in enumerate(seen) if 13 in batch)
    step = batch // accumulate + 1
    assert f"the loss of step {step} is " in str(error.value)
    numbers = [number for batch in seen[(step - 1) * accumulate : step * accumulate] for number in batch]
    assert f"Rows {', '.join(map(str, numbers))} of the training data" in str(error.value)
    assert sorted(line["row_number"] for line in written(run)) == sorted(numbers)
    for line in written(run):
        assert line["step"] == step and line["process"] == 0
        given = rows[line["row_number"]]
        assert {name: line[name] for name in given} == given


@pytest.mark.parametrize("budget", [None, 60])
def test_no_checkpoint_is_saved_after_it(tmp_path, kind, budget):
    rows = random_rows(24, seed=2)
    run, _ = bad_run(
        tmp_path, rows, {14}, train_sampling_strategy="sequential", max_steps=6, logging_steps=100,
        save_strategy="steps", save_steps=2, max_tokens_per_microbatch=budget,
    )  # fmt: skip
    with pytest.raises(NotFiniteError, match="the loss of step 4 is "):
        run.train()
    assert [path.name for path in Path(run.args.output_dir).glob("checkpoint-*")] == ["checkpoint-2"]
    # Whatever place the order gave it: its step's rows, and no others.
    assert 14 in [line["row_number"] for line in written(run)] and len(written(run)) == 4


@pytest.mark.parametrize("last", [5, 6])
def test_a_run_that_ends_between_logs_does_not_end_as_if_well(tmp_path, kind, last):
    """Neither logged nor saved since: whoever saves the model next would save what is no model."""
    run, _ = bad_run(
        tmp_path, random_rows(24, seed=3), {18}, train_sampling_strategy="sequential", max_steps=last, logging_steps=4
    )
    with pytest.raises(NotFiniteError, match="the loss of step 5 is "):
        run.train()


def test_a_run_without_logs_does_not_end_as_if_well(tmp_path, kind):
    run, _ = bad_run(
        tmp_path, random_rows(24, seed=3), {18}, train_sampling_strategy="sequential", max_steps=6,
        logging_strategy="no",
    )  # fmt: skip
    with pytest.raises(NotFiniteError, match="the loss of step 5 is "):
        run.train()


@pytest.mark.parametrize("after_a_log", [True, False])
def test_the_next_call_is_free_of_it(tmp_path, kind, after_a_log):
    """In the same process, from the checkpoint before: no number of the broken step is in a mean."""
    options = {
        "train_sampling_strategy": "sequential", "max_steps": 6, "logging_steps": 3, "save_strategy": "steps",
        "save_steps": 3 if after_a_log else 2,
    }  # fmt: skip
    run, _ = bad_run(tmp_path, random_rows(24, seed=3), {18}, **options)
    with pytest.raises(NotFiniteError):
        run.train()
    sound = trainer(tmp_path / "sound", rows=marked_rows(random_rows(24, seed=3), set()), loss_type="marked", **options)
    run.train_dataset = sound.train_dataset  # the row is mended
    run.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{options['save_steps']}"))
    sound.train()
    logs = [[each for each in interrupted_run.history(one.state.log_history) if "loss" in each] for one in (run, sound)]
    assert logs[0] == logs[1]


SKIPS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "cut": {"max_tokens_per_microbatch": 60},
    "clipped": {"max_grad_norm": 1.0, "weight_decay": 0.1},
    "lora": {"lora": True},
    "checkpointed": {"gradient_checkpointing": True},
}


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def skipping(tmp_path, **options):
    """A run of 24 rows in order, of which row 6, in the second step, is marked; and what a run without its step has."""
    rows = random_rows(24, seed=4)
    options = {"nan_loss": "skip", "train_sampling_strategy": "sequential", **options}
    adapters = {"peft_config": lora()} if options.pop("lora", False) else {}
    run, _ = bad_run(tmp_path, rows, {6}, max_steps=6, logging_steps=3, **options, **adapters)
    given = marked_rows(rows, {6})
    left = trainer(
        tmp_path / "left", rows=given[:4] + given[8:], loss_type="marked", max_steps=5, logging_steps=1, **options,
        **adapters,
    )  # fmt: skip
    left.train()
    return run, left


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("clipped", "cut", "lora") else pytest.mark.slow) for name in SKIPS]
)
def test_a_skipped_step_might_as_well_not_have_been(tmp_path, kind, name, caplog):
    """The weights go as in a run without its rows."""
    run, left = skipping(tmp_path, **SKIPS[name])
    weights = []

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(copy.deepcopy(run.model.state_dict()))

    run.add_callback(Looks())
    run.train()
    assert all(weights[1][name].equal(weights[0][name]) for name in weights[0])  # the second step did nothing
    assert not all(weights[2][name].equal(weights[1][name]) for name in weights[0])
    (said,) = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert "step 2 is skipped: its loss is " in said and "nan_rows.jsonl" in said
    assert sorted(line["row_number"] for line in written(run)) == [4, 5, 6, 7]
    for (name, ours), theirs in zip(run.model.state_dict().items(), left.model.state_dict().values(), strict=True):
        assert ours.equal(theirs), name


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_microbatch": 60}], ids=["whole", "cut"])
def test_the_means_around_a_skipped_step_are_those_of_the_others(tmp_path, kind, options):
    run, left = skipping(tmp_path, **options)
    run.train()
    plain = [entry for entry in left.state.log_history if "loss" in entry]
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [3, 6]
    for entry, parts in zip(logs, (plain[:2], plain[2:]), strict=True):
        for name in ("rewards/margins", "logps/chosen", "entropy", "loss"):
            expected = sum(part[name] for part in parts) / len(parts)
            assert entry[name] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_what_is_logged_at_a_skipped_step_is_a_number_of_other_steps(tmp_path, kind, logging_steps):
    """Nothing that is no number; and a loss of 0, which no step had, is not made up."""
    run, _ = bad_run(
        tmp_path, random_rows(24, seed=5), {6}, train_sampling_strategy="sequential", max_steps=4,
        logging_steps=logging_steps, nan_loss="skip",
    )  # fmt: skip
    run.train()
    for entry in run.state.log_history:
        assert all(math.isfinite(value) for value in entry.values()), entry
        assert entry.get("loss", 1.0) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_two_processes_skip_together(tmp_path, kind):
    """Also where only one of them has the row."""
    options = {
        "nan_loss": "skip", "marked": [6], "kind": kind, "train_sampling_strategy": "sequential", "logging_steps": 3,
    }  # fmt: skip
    one = start(tmp_path / "one", **options).result()
    two = start(tmp_path / "two", processes=2, per_device_train_batch_size=2, **options)
    ended = [two.result(rank) for rank in (0, 1)]
    assert ended[0]["weights"] == ended[1]["weights"]
    for ours, theirs in zip(ended[0]["history"][:2], one["history"][:2], strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)
    lines = (tmp_path / "two" / "out" / "nan_rows.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["row_number"] for line in lines) == [4, 5, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_two_processes_stop_together(tmp_path, kind):
    run = start(tmp_path, processes=2, per_device_train_batch_size=2, marked=[6], kind=kind,
                train_sampling_strategy="sequential", logging_steps=3)  # fmt: skip
    assert [run.code(rank) for rank in (0, 1)] == [1, 1]
    assert all("NotFiniteError: the loss of step 2 is" in run.said(rank) for rank in (0, 1))


@pytest.mark.slow
def test_two_processes_resume_and_skip_at_once(tmp_path):
    """The sums since the last log are restored on one process, and the first step after is left out and logged."""
    options = {"processes": 2, "per_device_train_batch_size": 2, "nan_loss": "skip", "marked": [13],
               "train_sampling_strategy": "sequential", "logging_steps": 4, "max_steps": 5}  # fmt: skip
    whole = start(tmp_path / "whole", **options)
    run = start(tmp_path / "run", pause_in="on_save", pause_step=3, save_strategy="steps", save_steps=3, **options)
    for rank in (0, 1):
        run.paused(rank)
    for rank in (0, 1):
        run.send(signal.SIGKILL, rank)
        assert run.code(rank) == -signal.SIGKILL
    resumed = start(tmp_path / "run", resume=True, **options)
    assert [resumed.code(rank) for rank in (0, 1)] == [0, 0], [resumed.said(rank)[-2000:] for rank in (0, 1)]
    for ours, theirs in zip(resumed.result()["history"], whole.result()["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7, nan_ok=True)


def test_a_stream_names_its_rows_too(tmp_path, kind):
    from datasets import IterableDataset

    rows = marked_rows(random_rows(24, seed=6), {13})
    run = trainer(tmp_path, rows=IterableDataset.from_generator(lambda: iter(rows)), loss_type="marked", max_steps=5)
    with pytest.raises(NotFiniteError, match=r"the loss of step 4 is .* Rows 12, 13, 14, 15 of the training data"):
        run.train()
    assert written(run) == [{"step": 4, "process": 0, "rows": [12, 13, 14, 15]}]


def test_kto_names_rows_as_they_were_given(tmp_path):
    """Pairs that are parted: the numbers are those of the pairs."""
    args = KTOConfig(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2)
    run = KTOTrainer(tiny_model(), args=args, train_dataset=random_rows(6), processing_class=word_tokenizer())
    assert sorted(run.train_dataset["row_number"]) == sorted([*range(6), *range(6)])


# What it cannot work with


def test_a_model_without_a_head(tmp_path):
    from transformers import AutoModel

    with pytest.raises(UserError, match="LlamaModel has no language-model head; load the model with AutoModelForCausa"):
        trainer(tmp_path, AutoModel.from_config(tiny_model().config))


def test_a_tokenizer_that_lacks_tokens(tmp_path):
    def made(**changes):
        tokenizer = word_tokenizer()
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return tokenizer

    def run(tokenizer, rows=None, **options):
        return DPOTrainer(
            tiny_model(), args=config(tmp_path, max_steps=1, **options),
            train_dataset=random_rows(4) if rows is None else rows, processing_class=tokenizer,
        )  # fmt: skip

    no_padding = run(made(pad_token=None))
    no_padding.train()
    assert no_padding._tokenizer.pad_token == "</s>"
    with pytest.raises(UserError, match="neither a padding nor an end-of-text token"):
        run(made(pad_token=None, eos_token=None))
    with pytest.raises(UserError, match="pad_token is '<pad>', which the tokenizer does not know"):
        run(made(), pad_token="<pad>")
    text = [{"prompt": "why a", "chosen": " yes b", "rejected": " no"}] * 4
    run(made(pad_token="<unk>", eos_token=None), text).train()
    said = [{name: [{"role": "user", "content": "why"}] for name in ("prompt", "chosen", "rejected")} for _ in "ab"]
    for row in said:
        row["rejected"] = [{"role": "assistant", "content": "no"}]
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        run(made(), said)


def test_no_tokenizer_to_be_found(tmp_path):
    model = tiny_model()
    model.config._name_or_path = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"none can be loaded from .*nowhere.*pass processing_class"):
        DPOTrainer(model, args=config(tmp_path), train_dataset=random_rows(4))


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("name", ["image", "images"])
def test_images(tmp_path, name, table):
    from datasets import Dataset

    rows = [{"prompt": "why a", "chosen": " yes", "rejected": " no", name: ["a.png"]}]
    with pytest.raises(DataError, match=r"row 0 \(counted from 0\): it has images, and batches hold tokens only"):
        trainer(tmp_path, rows=Dataset.from_list(rows) if table else rows)


@pytest.mark.parametrize("data", ["list", "table", "stream"])
def test_rows_that_all_fall_out(tmp_path, data):
    from datasets import Dataset, IterableDataset

    rows = random_rows(6, prompt=(9, 12))
    given = {"list": rows, "table": Dataset.from_list(rows)}.get(data) or IterableDataset.from_generator(lambda: rows)
    with pytest.raises(DataError, match="every prompt fills max_length=8; raise max_length"):
        trainer(tmp_path, rows=given, max_length=8).train()


def test_a_cache_that_lacks_rows_is_filled_and_that_of_another_model_refused(tmp_path, scored):
    rows = random_rows(8, seed=1)
    trainer(tmp_path, rows=rows[:5], ref_logps=str(tmp_path / "cache"))
    scored.clear()
    full = trainer(tmp_path, rows=rows, ref_logps=str(tmp_path / "cache"), max_steps=2)
    assert sum(scored) == 6
    full.train()
    online = trainer(tmp_path, rows=rows, max_steps=2)
    online.train()
    assert losses_of(full) == pytest.approx(losses_of(online), rel=1e-5)
    with pytest.raises(UserError, match="weights"):
        trainer(tmp_path, tiny_model(seed=5), rows, ref_logps=str(tmp_path / "cache"))


MADE = {"dpo": config, "kto": KTOConfig, "orpo": ORPOConfig, "cpo": CPOConfig}


@pytest.mark.parametrize(
    "what, options, names",
    [
        ("dpo", {"nan_loss": "ignore"}, ["nan_loss", "stop, skip"]),
        ("dpo", {"nan_loss": "skip", "fp16": True}, ["nan_loss", "fp16"]),
        ("dpo", {"nan_loss": "skip", "deepspeed": {"zero_optimization": {"stage": 2}}}, ["nan_loss", "deepspeed"]),
        ("kto", {"nan_loss": "skip", "fp16": True}, ["nan_loss", "fp16"]),
        ("dpo", {"rpo_alpha": 1.0, "loss_type": ["sigmoid", "sft"]}, ["rpo_alpha", "loss_type"]),
        ("dpo", {"reference_free": True, "ref_logps": "x"}, ["reference_free", "ref_logps"]),
        ("dpo", {"sync_ref_model": True, "precompute_ref_log_probs": True}, ["sync_ref_model", "precompute_ref_log"]),
        ("dpo", {"sync_ref_model": True, "reference_free": True}, ["sync_ref_model", "reference"]),
        ("dpo", {"sync_ref_model": True, "loss_type": "simpo"}, ["sync_ref_model", "simpo"]),
        ("dpo", {"sync_ref_model": True, "ref_model_mixup_alpha": 1.5}, ["ref_model_mixup_alpha"]),
        ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 0}, ["ref_model_sync_steps"]),
        ("dpo", {"padding_free": True, "packing": "padded"}, ["padding_free", "packing"]),
        ("dpo", {"max_tokens_per_microbatch": 9, "loss_type": "aot"}, ["max_tokens_per_microbatch", "aot"]),
        ("dpo", {"f_alpha_divergence_coef": 0.7}, ["f_alpha_divergence_coef", "f_divergence_type"]),
        ("dpo", {"ld_alpha": 0.5, "loss_type": "ipo2"}, ["loss_type", "ipo"]),
        ("dpo", {"accelerator_config": {"split_batches": True}}, ["split_batches", "per_device_train_batch_size"]),
        ("dpo", {"accelerator_config": {"dispatch_batches": True}}, ["dispatch_batches"]),
        ("dpo", {"show_generations": -1}, ["show_generations"]),
        ("kto", {"per_device_train_batch_size": 1}, ["per_device_train_batch_size", "loss_type"]),
        ("kto", {"max_tokens_per_microbatch": 99}, ["max_tokens_per_microbatch", "loss_type"]),
        ("kto", {"loss_type": "sigmoid"}, ["loss_type", "answers"]),
        ("kto", {"loss_type": "simgoid"}, ["loss_type", "sigmoid"]),
        ("kto", {"desirable_weight": -1.0}, ["desirable_weight"]),
        ("kto", {"beta": 0.0}, ["beta"]),
        ("kto", {"sync_ref_model": True, "ref_logps": "x"}, ["sync_ref_model", "ref_logps"]),
        ("orpo", {"beta": -0.1}, ["beta"]),
        ("orpo", {"generate_during_eval": True}, ["generate_during_eval", "show_generations"]),
        ("orpo", {"is_encoder_decoder": True}, ["is_encoder_decoder"]),
        ("orpo", {"padding_value": 0}, ["padding_value"]),
        ("cpo", {"loss_type": "kto"}, ["loss_type", "sigmoid, simpo, hinge, ipo"]),
        ("cpo", {"alpha": 0.3}, ["alpha=0.3", "loss_type='alphapo'"]),
        ("cpo", {"alpha": 0.3, "loss_type": "ipo"}, ["alpha=0.3", "loss_type='alphapo'"]),
        ("cpo", {"alpha": float("nan"), "loss_type": "alphapo"}, ["alpha"]),
        ("cpo", {"loss_type": "simpo", "simpo_gamma": -1.0}, ["simpo_gamma"]),
        ("cpo", {"simpo_gamma": 0.7}, ["simpo_gamma", "loss_type"]),
        ("cpo", {"loss_type": "hinge", "label_smoothing": 0.1}, ["label_smoothing", "hinge"]),
        ("cpo", {"cpo_alpha": -1.0}, ["cpo_alpha"]),
        ("cpo", {"cpo_alpha": -1.0, "loss_type": "simpo"}, ["cpo_alpha"]),
        ("cpo", {"nan_loss": "skip", "fp16": True}, ["nan_loss", "fp16"]),
    ],
)  # fmt: skip
def test_options_that_contradict_are_refused_by_both_their_names(tmp_path, what, options, names):
    made = config if what == "dpo" else lambda path, **given: MADE[what](str(path), use_cpu=True, **given)
    with pytest.raises(ValueError) as error:
        made(tmp_path, **options)
    assert [name for name in names if name not in str(error.value)] == []


@pytest.mark.parametrize("what", MADE)
def test_an_option_that_is_none_is_refused(tmp_path, what):
    with pytest.raises(TypeError, match="no_such_option"):
        MADE[what](tmp_path, no_such_option=1) if what == "dpo" else MADE[what](str(tmp_path), no_such_option=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_init_kwargs": {"dtype": "float32"}}, "model_init_kwargs is for a model given by name"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 is for a mixture of experts"),
    ],
)
def test_options_that_do_not_go_with_the_model(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_a_reference_that_nothing_would_look_at(tmp_path):
    """reference_free=True beside ref_model: one of the two was a mistake."""
    with pytest.raises(ValueError, match="ref_model") as error:
        trainer(tmp_path, ref_model=tiny_model(seed=1), reference_free=True)
    assert "reference_free" in str(error.value)
