"""The same short run by TRL's trainers and by ours, and what both have logged."""

import copy
import importlib
import random

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, word_tokenizer

import fastdpo
import fastdpo.trainer

STEPS, BATCH, MAX_LENGTH = 20, 4, 16
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
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32")

    def config(self, library, kind="DPO", *, own=None, **options):
        """`own`: options that only ours has."""
        common = {
            "output_dir": str(self.output()),
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
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


def assert_same(ours, theirs, *, rel=1e-5, abs=1e-5, leave_out=(), tied_at_first=False):
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
            if our_entry[name] != pytest.approx(their_entry[name], rel=rel, abs=abs)
        }
        assert not gaps, f"entry {number}: (ours, theirs) {gaps}"


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
