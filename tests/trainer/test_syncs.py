"""The step's path waits for no device, keeps nothing, and costs little beside the model's own work."""

import contextlib
import ctypes
import gc
import os
import sys
import traceback
import tracemalloc
from collections import Counter

import pytest
import torch
from tiny import random_rows, tiny_model, word_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_runs import config, trainer
from transformers import TrainerCallback

from fastdpo import CPOConfig, CPOTrainer, KTOConfig, KTOTrainer

# What a GPU would have to be waited for: a number, or a shape, that depends on values.
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__")
OPERATIONS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_consecutive.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.bincount.default,
    torch.ops.aten.allclose.default,
}


# Looks at values of tensors that are on the host wherever the model is, or only if the model is on a CPU, too.
ON_THE_HOST = {
    ("eager.py", "_chunks"),  # `if kept.device.type != "cpu"` comes first
    ("linear_logps.py", "linear_token_logps_with_stats"),  # `if hidden.device.type == "cpu"`
    ("masks.py", "recognize"),  # probes of a mask function, made by torch.tensor
    (
        "masking_utils.py",
        "_ignore_causal_mask_sdpa",
    ),  # transformers' own look at a padding mask, with packing="padded" alone
}


class Waits(TorchDispatchMode):
    """Counts the places, outside of itself, at which a value of a tensor reaches the host."""

    def __init__(self):
        super().__init__()
        self.places = Counter()
        self.own = False  # a read is made of operations

    def add(self, what):
        frames = [frame for frame in traceback.extract_stack()[:-2] if "test_syncs" not in frame.filename]
        if any((frame.filename.split("/")[-1], frame.name) in ON_THE_HOST for frame in frames):
            return
        places = [f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno}" for frame in frames[-4:]]
        self.places[f"{what} at {' > '.join(places)}"] += 1

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not self.own:
            masks = isinstance(args[1], list | tuple) if operation is torch.ops.aten.index.Tensor else False
            if operation in OPERATIONS or (
                masks and any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
            ):
                self.add(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    import fastdpo.groups.checks as checks
    import fastdpo.groups.tokens as tokens

    # Values are looked at on a CPU that a GPU would have to be waited for: these looks are taken away.
    monkeypatch.setattr(checks, "check_finite", lambda *of: None)
    monkeypatch.setattr(tokens, "known_on_host", lambda tensor: False)
    mode = Waits()
    active = []

    def counted(name):
        original = getattr(torch.Tensor, name)

        def reads(self, *args, **kwargs):
            if active and not mode.own:
                mode.add(f"Tensor.{name}")
                mode.own = True
                try:
                    return original(self, *args, **kwargs)
                finally:
                    mode.own = False
            return original(self, *args, **kwargs)

        return reads

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name))

    @contextlib.contextmanager
    def counting():
        with mode:
            active.append(1)
            try:
                yield
            finally:
                active.pop()

    mode.counting = counting
    return mode


def watched(run, waits, looked_at=lambda: True):
    """Counts from the batches at hand to the optimizer's step, and from its end to the end of the step.

    What is left out is done on the host anyway: to collate rows, and AdamW's own count of steps on a CPU.
    """
    batches, step = run.get_batch_samples, run.training_step
    norm, end = run._get_grad_norm, run._maybe_log_save_evaluate

    def get_batch_samples(iterator, count, device):
        fetched = [batch for _, batch in zip(range(count), iterator, strict=False)]
        with waits.counting() if looked_at() else contextlib.nullcontext():
            return batches(iter(fetched), count, device)

    def counted(function):
        def call(*args, **kwargs):
            with waits.counting() if looked_at() else contextlib.nullcontext():
                return function(*args, **kwargs)

        return call

    run.get_batch_samples = get_batch_samples
    run.training_step, run._get_grad_norm = counted(step), counted(norm)
    run._maybe_log_save_evaluate, run.floating_point_ops = counted(end), counted(run.floating_point_ops)
    clip = run._clip_grad_norm
    run._clip_grad_norm = counted(clip)
    for callback in run.callback_handler.callbacks:
        if type(callback).__module__.startswith("fastdpo"):
            callback.on_step_end = counted(callback.on_step_end)


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def answers(count):
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": number % 2 == 0}
        for number, row in enumerate(random_rows(count))
    ]


def other(tmp_path, Trainer, Config, rows, **options):
    given = vars(config(tmp_path))
    names = ("output_dir", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "report_to",
             "save_strategy", "disable_tqdm", "use_cpu")  # fmt: skip
    return Trainer(
        tiny_model(), args=Config(**({name: given[name] for name in names} | {"bf16": False} | options)),
        train_dataset=rows, processing_class=word_tokenizer(),
    )  # fmt: skip


RUNS = {
    "online": lambda path, o: trainer(path, **o),
    "cached": lambda path, o: trainer(path, precompute_ref_log_probs=True, **o),
    "padded": lambda path, o: trainer(path, packing="padded", **o),
    "checkpointed": lambda path, o: trainer(path, gradient_checkpointing=True, **o),
    "lora": lambda path, o: trainer(path, peft_config=lora(), **o),
    "sft": lambda path, o: trainer(path, loss_type=["sigmoid", "sft"], **o),
    "weighting": lambda path, o: trainer(path, use_weighting=True, **o),
    "lengths": lambda path, o: trainer(path, loss_type=["ipo", "sigmoid_norm"], **o),
    "ld": lambda path, o: trainer(path, ld_alpha=0.5, **o),
    "simpo": lambda path, o: trainer(path, loss_type="simpo", **o),
    "cut": lambda path, o: trainer(path, max_tokens_per_microbatch=50, **o),
    "accumulated": lambda path, o: trainer(path, gradient_accumulation_steps=2, **o),
    "moving": lambda path, o: trainer(path, sync_ref_model=True, ref_model_sync_steps=2, **o),
    "kto": lambda path, o: other(path, KTOTrainer, KTOConfig, answers(24), **o),
    "cpo": lambda path, o: other(path, CPOTrainer, CPOConfig, random_rows(24), **o),
}


@pytest.mark.parametrize(
    "name, clip",
    [*((name, 1.0) for name in RUNS), *((name, 0.0) for name in ("online", "lora", "cut", "accumulated", "kto"))],
)
def test_no_step_between_logs_waits(tmp_path, waits, name, clip):
    """From the second step on: in the first, a reference's packing is verified."""
    run = RUNS[name](
        tmp_path, {"max_steps": 5, "logging_steps": 100, "max_grad_norm": clip, "gradient_checkpointing": False}
        if name != "checkpointed" else {"max_steps": 5, "logging_steps": 100, "max_grad_norm": clip},
    )  # fmt: skip
    looked = []
    watched(run, waits, lambda: 0 < run.state.global_step < 4 and not looked.append(1))
    run.train()
    assert len(looked) > 9
    assert run.state.global_step == 5
    assert not waits.places, "\n".join(f"{count} x {place}" for place, count in waits.places.most_common(12))


def test_a_log_waits_a_few_times(tmp_path, waits):
    """The counter sees what it is for: at a log the sums are read, once."""
    run = trainer(tmp_path, max_steps=2, logging_steps=2)
    ends = run._maybe_log_save_evaluate

    def counted(*args, **kwargs):
        with waits.counting():
            return ends(*args, **kwargs)

    run._maybe_log_save_evaluate = counted
    run.train()
    ours = [place for place in waits.places if "fastdpo" in place.split(" > ")[-1]]
    assert sum(waits.places[place] for place in ours) == 1 and "metrics.py" in ours[0]
    assert sum(waits.places.values()) == 3  # and transformers: the loss, the norm of the gradient


def test_skipping_waits_for_the_end_of_the_step_alone(tmp_path, waits):
    """Then it reads the loss and the norm of the gradient."""
    run = trainer(tmp_path, max_steps=5, logging_steps=100, nan_loss="skip")
    watched(run, waits, lambda: 0 < run.state.global_step < 4)
    run.train()
    assert 3 <= sum(waits.places.values()) <= 2 * 3, waits.places
    assert {place.split(" at ")[0] for place in waits.places} == {"Tensor.__float__"}


# Memory


def in_use():
    """Bytes that the C allocator has given out and not got back, tensors among them; None without glibc."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    # arena, ordblks, smblks, hblks, hblkhd, usmblks, fsmblks, uordblks, fordblks, keepcost
    sizes = [(f"_{number}", ctypes.c_size_t) for number in range(10)]
    mallinfo2.restype = type("mallinfo2", (ctypes.Structure,), {"_fields_": sizes})
    found = mallinfo2()
    return found._4 + found._7  # in mappings of their own, and within the arena


class Memory(TrainerCallback):
    """Memory in use, Python's own and the number of tensors at some steps."""

    def __init__(self, every, traced):
        self.every, self.traced = every, traced
        self.seen = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            gc.collect()
            kept = sum(1 for each in gc.get_objects() if type(each) is torch.Tensor)
            own = tracemalloc.get_traced_memory()[0] if self.traced else 0
            self.seen[state.global_step] = (in_use(), own, kept)


def long_run(tmp_path, steps, logging_steps=100, traced=False, every=100, **options):
    rows = random_rows(400, seed=1, prompt=(1, 60), answer=(1, 40))
    run = trainer(
        tmp_path, tiny_model(num_hidden_layers=1), rows, max_steps=steps, logging_steps=logging_steps,
        gradient_checkpointing=False, train_sampling_strategy="random", learning_rate=1e-6, **options,
    )  # fmt: skip
    memory = Memory(every, traced)
    run.add_callback(memory)
    longest = []
    add = run._watch.add
    run._watch.add = lambda *of: add(*of) or longest.append(len(run._watch.steps))
    if traced:
        tracemalloc.start()
    try:
        run.train()
    finally:
        tracemalloc.stop()
    return run, memory.seen, max(longest)


@pytest.mark.slow
@pytest.mark.skipif(in_use() is None, reason="asks glibc")
def test_memory_is_flat(tmp_path):
    """Rows of 2 to 140 tokens. The log itself grows by an entry each 50 steps, of some kB."""
    _, seen, longest = long_run(tmp_path, 300, logging_steps=50)  # three epochs
    assert longest <= 50
    model = 4 * sum(weight.numel() for weight in tiny_model(num_hidden_layers=1).parameters())
    grown = seen[300][0] - seen[100][0]
    # In 200 steps: if each kept its gradients, it would be 200.
    assert grown < 10 * model, {step: values[0] for step, values in seen.items()}
    assert seen[300][2] <= seen[100][2] + 2  # no tensor more than at another log


@pytest.mark.slow
def test_python_keeps_nothing(tmp_path):
    _, seen, _ = long_run(tmp_path, 110, logging_steps=20, traced=True, every=20)
    assert seen[100][1] - seen[40][1] < 64 * 1024, {step: values[1] for step, values in seen.items()}
    assert seen[80][2] <= seen[40][2] + 2


@pytest.mark.slow
@pytest.mark.parametrize("logging", [{"logging_strategy": "no"}, {"logging_steps": 10**6}], ids=str)
def test_without_logs_nothing_is_kept_either(tmp_path, logging):
    """What is known of the steps since the last log must not grow with them where there is none."""
    options = {"logging_steps": 100, **logging}
    _, seen, longest = long_run(tmp_path, 120, every=60, **options)
    assert longest <= 100
    assert seen[120][2] - seen[60][2] < 60


@pytest.mark.skipif(os.environ.get("FASTDPO_LONG") != "1", reason="FASTDPO_LONG=1 runs it; some minutes")
@pytest.mark.timeout(3600)
def test_memory_is_flat_for_long(tmp_path):
    _, seen, longest = long_run(tmp_path, 10_000, every=1000)
    print({step: round(values[0] / 2**20, 1) for step, values in seen.items()})
    assert longest <= 100
    assert (seen[10_000][0] - seen[1000][0]) / 2**20 < 8
    assert seen[10_000][2] <= seen[1000][2] + 2


# Time


@pytest.mark.slow
def test_what_a_step_costs_beside_the_model(tmp_path):
    """Calls of Python beside forward, backward and optimizer: as many for a large model and long rows as for small
    ones, and fewer than the model's own. (Seconds depend on what else a machine does.)"""
    beside, within = [], []
    for size, tokens in ((32, 20), (64, 120)):
        model = tiny_model(hidden_size=size, num_hidden_layers=4, max_position_embeddings=512)
        rows = random_rows(40, seed=2, prompt=(tokens, tokens), answer=(tokens, tokens))
        run = trainer(
            tmp_path, model, rows, max_steps=4, logging_steps=100, gradient_checkpointing=False, max_length=512,
            precompute_ref_log_probs=False, loss_type="simpo", dataloader_num_workers=0,
        )  # fmt: skip
        counts = Counted(run)
        run.train()
        beside.append(counts.beside[1:])
        within.append(counts.within[1:])
    small, large = (min(each) for each in beside)
    assert large <= 1.2 * small + 200, beside
    assert large < 2 * max(within[1]), (beside, within)


class Counted:
    """Function calls of each step of a run: within the model's forward and the optimizer, and beside them."""

    def __init__(self, run):
        self.beside, self.within = [], []
        self._depth, counts = 0, [0, 0]

        def counting(frame, event, argument):
            if event in ("call", "c_call"):
                counts[self._depth > 0] += 1

        def entered(function):
            def call(*args, **kwargs):
                self._depth += 1
                try:
                    return function(*args, **kwargs)
                finally:
                    self._depth -= 1

            return call

        run.model.register_forward_pre_hook(lambda *call: self._move(1))
        run.model.register_forward_hook(lambda *call: self._move(-1))
        run.accelerator.backward = entered(run.accelerator.backward)
        owner = self

        class Steps(TrainerCallback):
            def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
                optimizer.step = entered(optimizer.step)

            def on_step_begin(self, *args, **kwargs):
                counts[:] = [0, 0]
                sys.setprofile(counting)

            def on_step_end(self, *args, **kwargs):
                sys.setprofile(None)
                owner.beside.append(counts[0])
                owner.within.append(counts[1])

        run.add_callback(Steps())

    def _move(self, by):
        self._depth += by
