"""The same short run by TRL's trainers and by ours, and what both have logged."""

import contextlib
import copy
import importlib
import random

import pytest
import torch
from datasets import Dataset
from tiny import in_double_precision, tiny_model, word_tokenizer

import fastdpo
import fastdpo.trainer

STEPS, BATCH, MAX_LENGTH = 6, 4, 16  # an epoch and a half of 16 rows
WORDS = ["a", "b", "c", "d", "e", "yes", "no", "why", "hello"]
# Times; and transformers' estimate of FLOPs by the number of elements in a batch, whatever they are.
NOT_COMPARED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "total_flos")


def text_rows(count, seed=0, prompt=(1, 12), answer=(1, 9)):
    """Rows of random words, of unequal lengths, a third of them longer than MAX_LENGTH."""
    draw = random.Random(seed)

    def words(bounds):
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(*bounds)))

    return [
        {"prompt": words(prompt), "chosen": f" {words(answer)}", "rejected": f" {words(answer)}"} for _ in range(count)
    ]


def chat_rows(count, seed=0, prompt=(1, 6)):
    """The same as conversations, some of several turns; some prompts alone fill MAX_LENGTH."""
    return [
        {
            "prompt": _turns(row["prompt"].split(), number),
            "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
        }
        for number, row in enumerate(text_rows(count, seed, prompt))
    ]


def _turns(words, number):
    last = {"role": "user", "content": " ".join(words)}
    if number % 3:
        return [last]
    return [{"role": "user", "content": words[0]}, {"role": "assistant", "content": "yes"}, last]


def answer_rows(count, seed=0, **lengths):
    """Single answers, desirable or not."""
    draw = random.Random(seed + 1)
    rows = []
    for row in text_rows(count, seed, **lengths):
        label = draw.random() < 0.5
        rows.append({"prompt": row["prompt"], "completion": row["chosen" if label else "rejected"], "label": label})
    return rows


def save(folder):
    """A tiny model with its tokenizer; the folder's name."""
    tiny_model().save_pretrained(folder)
    word_tokenizer(chat=True).save_pretrained(folder)
    return str(folder)


def perturbed(model):
    """The model, somewhere else."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model


@contextlib.contextmanager
def sums_in_dtype_of(model):
    """Of float64 for such a model: transformers' sums of losses, and TRL's constants and logged means."""
    before, own = torch.get_default_dtype(), next(model.parameters()).dtype
    torch.set_default_dtype(torch.float64 if own == torch.float64 else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def float64():
    """Every model that is loaded comes in float64, its norms too, and TRL's head works in it.

    So both libraries round alike on every machine: what differs by more than 1e-9 is another formula.
    """
    import transformers
    import trl.trainer.utils

    load = transformers.PreTrainedModel.from_pretrained.__func__

    def loaded(cls, *args, **kwargs):
        return in_double_precision(load(cls, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(loaded))
        patch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", PlainHead)
        yield


class PlainHead:
    """What TRL's fused head gives for each token, by its equations: TRL's own computes in float32 whatever it gets."""

    @staticmethod
    def apply(hidden, weight, bias, labels, temperature, chunk_size, softcap=None, scale=1.0, outputs=("log_probs",)):
        """hidden (N, D), weight (V, D), labels (N,): log-probs, entropy, log sum p^2, mean logit and is-top-1, (N,)."""
        raw = torch.nn.functional.linear(hidden, weight, bias) * scale
        raw = raw if softcap is None else softcap * torch.tanh(raw / softcap)
        logps = torch.log_softmax(raw / temperature, -1)
        known = {
            "entropy": -(logps.exp() * logps).sum(-1),
            "log_sum_sq_probs": torch.logsumexp(2 * logps, -1),
            "mean_logits": raw.mean(-1),
            "is_top1": raw.argmax(-1) == labels,
        }
        told = [known[name].detach() if name in outputs else None for name in known]
        return logps.gather(1, labels[:, None]).squeeze(1), *told


def named(library, name):
    """A trainer or config of ours, or of TRL, also where it calls it experimental."""
    if library is fastdpo:
        return getattr(fastdpo.trainer, name)
    if hasattr(library, name):
        return getattr(library, name)
    method = name.removesuffix("Trainer").removesuffix("Config").lower()
    return getattr(importlib.import_module(f"trl.experimental.{method}"), name)


class Runs:
    """Runs of either library on the model in `folder`; `output` makes a folder for one."""

    def __init__(self, folder, output):
        self.folder, self.output, self.kept = folder, output, {}

    def load(self):
        """The model, as from_pretrained gives it now: in float64 or not."""
        from transformers import AutoModelForCausalLM, PreTrainedModel

        key = "model", PreTrainedModel.from_pretrained.__name__
        if key not in self.kept:
            self.kept[key] = AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32")
        return copy.deepcopy(self.kept[key])

    def config(self, library, kind="DPO", *, own=None, **options):
        """`own`: options that only ours has."""
        common = {
            "output_dir": str(self.output()),
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "max_steps": STEPS,
            "learning_rate": 2e-3,
            "logging_steps": 1,
            "max_length": MAX_LENGTH,
            "bf16": False,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "gradient_checkpointing": False,
        }
        own = own if own and library is fastdpo else {}
        return named(library, f"{kind}Config")(**(common | options | own))

    def trainer(
        self, library, kind="DPO", *, rows=None, eval_rows=None, model=None, ref_model=None, peft_config=None,
        tokenizer=None, optimizers=None, **options,
    ):  # fmt: skip
        """`model`, `ref_model`, `tokenizer` and `optimizers` are functions that make one for each library."""
        model = (model or self.load)()
        further = {} if eval_rows is None else {"eval_dataset": as_dataset(eval_rows)}
        if ref_model is not None:
            further["ref_model"] = ref_model()
        if peft_config is not None:
            further["peft_config"] = copy.deepcopy(peft_config)
        if optimizers is not None:
            further["optimizers"] = optimizers(model)
        return named(library, f"{kind}Trainer")(
            model=model,
            args=self.config(library, kind, **options),
            train_dataset=as_dataset(text_rows(16) if rows is None else rows),
            processing_class=tokenizer() if tokenizer else word_tokenizer(chat=True),
            **further,
        )

    def logs(self, library, kind="DPO", **options):
        trainer = self.trainer(library, kind, **options)
        with sums_in_dtype_of(trainer.model):
            trainer.train()
        return trainer.state.log_history

    def theirs(self, library, key=None, **options):
        """What TRL logs; a run that has a `key` is made once."""
        if key is None:
            return self.logs(library, **options)
        if key not in self.kept:
            self.kept[key] = self.logs(library, **options)
        return self.kept[key]


def as_dataset(rows):
    if isinstance(rows, dict):
        return {name: as_dataset(part) for name, part in rows.items()}
    return Dataset.from_list(rows) if isinstance(rows, list) else rows


def compared(entry, leave_out=()):
    """The names in a log entry, without those of times and those left out."""
    return [name for name in entry if not name.endswith(NOT_COMPARED) and name not in leave_out]


def assert_same(ours, theirs, *, rel=1e-9, abs=1e-9, leave_out=(), tied_at_first=False):
    """Every number that TRL has logged, entry by entry, to `rel` or `abs`, whichever is more.

    tied_at_first: policy and reference are the same before the first step, but come from different passes, so that
    which of the two rewards of 0 is higher is rounding.
    """
    assert len(ours) == len(theirs) and len(theirs) > 1
    for number, (our_entry, their_entry) in enumerate(zip(ours, theirs, strict=True)):
        names = compared(their_entry, leave_out)
        assert not set(names) - set(our_entry), f"entry {number}: not logged"
        if tied_at_first and number == 0:
            names.remove("rewards/accuracies")
        gaps = {
            name: (our_entry[name], their_entry[name])
            for name in names
            if our_entry[name] != pytest.approx(their_entry[name], rel=max(rel, rounding(name)), abs=abs)
        }
        assert not gaps, f"entry {number}: (ours, theirs) {gaps}"


def assert_rounded(ours, theirs, truth, *, leave_out=(), times=4):
    """Runs in which something is rounded to float32, against the same run in float64.

    Over the run, the largest error of each number is at most `times` that of TRL, and a little (2^-20 of the number
    itself, some units in the last place of its parts). Shares are left out: rounding may turn one over.
    """
    assert len(ours) == len(theirs) == len(truth) > 1
    names = {name for entry in theirs for name in compared(entry, leave_out) if not rounding(name)}
    names -= {name for name in names if name.startswith("perf/")}
    for name in sorted(names):
        entries = [each for each in zip(ours, theirs, truth, strict=True) if name in each[1]]
        our_error, their_error = (max(abs(each[k][name] - each[2][name]) for each in entries) for k in (0, 1))
        little = 2**-20 * max(1.0, *(abs(each[2][name]) for each in entries))
        assert our_error <= times * their_error + little, (name, our_error, their_error, little)


def rounding(name):
    """Of the number as TRL logs it: shares are counted in float32, whatever the model's dtype."""
    return 2**-23 if name.endswith(("accuracy", "accuracies")) else 0.0


def assert_moved(logs):
    """The policy has left its reference behind: otherwise any two losses would look alike."""
    for name, least in (("rewards/margins", 0.02), ("rewards/chosen", 0.02), ("loss", 0.1)):
        values = [entry[name] for entry in logs if name in entry]
        if values and max(values) - min(values) > least:
            return
    raise AssertionError("nothing has moved; raise the learning rate")


def options_named(options):
    """What a test with them is called: a name, the names of options, or pytest's own way."""
    if isinstance(options, dict):
        texts = [f"{name}={value}" if isinstance(value, int | str) else name for name, value in options.items()]
        return ",".join(texts) or "plain"
    return ",".join(map(str, options)) if isinstance(options, list) else None
