"""A model that has become non-finite reaches the report that names step and rows, whatever is computed from it."""

import math

import pytest
import torch
from tiny import random_rows, tiny_model, word_tokenizer
from transformers import TrainerCallback

import fastdpo
from fastdpo import unpaired_loss
from fastdpo.trainer.watch import NotFiniteError

RUN = {
    "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 10, "bf16": False, "use_cpu": True,
    "report_to": [], "save_strategy": "no", "disable_tqdm": True, "packing": "padded", "learning_rate": 1e-3,
    "train_sampling_strategy": "sequential",
}  # fmt: skip
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}


class Poison(TrainerCallback):
    """After the first step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            with torch.no_grad():
                model.get_input_embeddings().weight.fill_(math.nan)


def answers(count):
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": number % 3 != 1}
        for number, row in enumerate(random_rows(count, seed=1, prompt=(2, 12)))
    ]


def run_of(tmp_path, method, **options):
    args = getattr(fastdpo, f"{method}Config")(output_dir=str(tmp_path / "out"), **(RUN | options))
    rows = answers(12) if method == "KTO" else random_rows(12)
    return getattr(fastdpo, f"{method}Trainer")(
        tiny_model(), args=args, train_dataset=rows, eval_dataset=rows[:4], processing_class=word_tokenizer(),
        callbacks=[Poison()],
    )  # fmt: skip


CASES = [("KTO", {}), ("KTO", MOVING), ("DPO", MOVING), ("CPO", {}), ("ORPO", {})]


@pytest.mark.parametrize("method, options", CASES)
def test_the_report_names_the_rows(tmp_path, method, options):
    with pytest.raises(NotFiniteError, match=r"the loss of step 2 is nan .* Rows 4, 5, 6, 7 of the training data"):
        run_of(tmp_path, method, **options).train()


@pytest.mark.parametrize("method, options", CASES[:3])
def test_such_steps_are_skipped(tmp_path, method, options):
    run = run_of(tmp_path, method, nan_loss="skip", **options)
    run.train()
    aside = (tmp_path / "out" / "nan_rows.jsonl").read_text().splitlines()
    assert [line.split(",")[0] for line in aside] == ['{"step": 2'] * 4 + ['{"step": 3'] * 4
    assert math.isnan(run.evaluate()["eval_loss"])


# What the user gives is looked at; what comes of the policy is not


@pytest.mark.parametrize("kl", [math.nan, torch.tensor(math.inf)])
def test_an_estimate_that_is_given(kl):
    with pytest.raises(ValueError, match=r"kl is (nan|inf); it must be a finite number"):
        unpaired_loss(torch.zeros(2), torch.zeros(2), desirable=torch.tensor([True, False]), kl=kl)


def test_references_that_are_given():
    options = {"desirable": torch.tensor([True, False]), "kl_logps": torch.zeros(1)}
    with pytest.raises(ValueError, match="ref_kl_logps is nan at 0"):
        unpaired_loss(torch.zeros(2), torch.zeros(2), ref_kl_logps=torch.tensor([math.nan]), **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_estimate_made_of_the_policy(value):
    options = {"desirable": torch.tensor([True, False]), "ref_kl_logps": torch.zeros(1)}
    output = unpaired_loss(torch.zeros(2), torch.zeros(2), kl_logps=torch.tensor([value]), **options)
    assert output.losses.isnan().all()
