"""Updates of bfloat16 weights that are too small to be seen: they are counted, and float32 copies keep them."""

import copy
import logging

import pytest
import torch
from tiny import random_rows, tiny_model
from trainer_runs import trainer

from fastdpo.trainer.master_weights import MASTER, lost_updates, with_master_weights

SMALL = {"learning_rate": 1e-6, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}


def half_model(dtype=torch.bfloat16):
    return tiny_model(dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rate", [1e-6, 1e-4, 4e-3])
def test_the_count_is_that_of_additions(dtype, rate):
    torch.manual_seed(0)
    values = torch.cat([torch.randn(4000) * 10.0 ** -torch.arange(4).repeat(1000), torch.zeros(7)]).to(dtype)
    lost, total = lost_updates([values, torch.ones(5)], rate)
    away = values.float() + rate * values.float().sign().where(values != 0, torch.ones(()))  # to the wider side
    assert total == len(values) and lost == int((away.to(dtype) == values).sum())


def test_a_sample_of_large_parameters():
    values = torch.ones(1 << 18, dtype=torch.bfloat16)
    values[::2] = 1e-7
    lost, total = lost_updates([values, values[:3]], 1e-6)
    assert total == len(values) + 3 and lost == pytest.approx(total / 2, rel=1e-4)


def warnings_of(caplog):
    return [each for each in caplog.messages if "rounded away" in each]


def test_it_is_said_at_the_start(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fastdpo"):
        trainer(tmp_path, half_model(), max_steps=1, learning_rate=1e-6).train()
    (told,) = warnings_of(caplog)
    model = half_model()
    lost, total = lost_updates(model.parameters(), 1e-6)
    assert f"about {round(lost)} of {total}" in told and "master_weights=True" in told and "dtype='float32'" in told
    assert lost / total > 0.9


@pytest.mark.parametrize(
    "model, options",
    [
        ("float32", {}),
        ("bfloat16", {"master_weights": True}),
        ("bfloat16", {"optim": "sgd"}),
    ],
)
def test_nothing_is_said_where_nothing_is_lost(tmp_path, caplog, model, options):
    with caplog.at_level(logging.WARNING, "fastdpo"):
        trainer(tmp_path, half_model(getattr(torch, model)), max_steps=1, learning_rate=1e-6, **options).train()
    assert warnings_of(caplog) == []


def masters_of(run):
    names = {value: name for name, value in run.model.named_parameters()}
    return {names[value]: state[MASTER] for value, state in run.optimizer.state.items()}


def test_all_numbers_move(tmp_path):
    before = dict(half_model().named_parameters())
    run = trainer(tmp_path, half_model(), master_weights=True, **SMALL)
    run.train()
    masters = masters_of(run)
    assert masters.keys() == before.keys()
    for name, master in masters.items():
        still = (master == before[name].float()).float().mean()
        assert master.dtype == torch.float32 and still < 0.01, name
        assert torch.equal(run.model.get_parameter(name), master.bfloat16())
    plain = trainer(tmp_path, half_model(), **SMALL)
    plain.train()
    stuck = sum(int((plain.model.get_parameter(name) == value).sum()) for name, value in before.items())
    assert stuck > 0.9 * sum(value.numel() for value in before.values())


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_copies_are_a_float32_run(optim, dtype):
    """Of gradients of the rounded weights, with groups of weight decay and a schedule."""
    from transformers import Trainer

    arguments = trainer_args(optim)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, None)
    torch.manual_seed(0)
    start = [torch.randn(5, 3).to(dtype), torch.randn(4).to(dtype)]
    mine = [value.clone().requires_grad_() for value in start]
    truth = [value.float().requires_grad_() for value in start]

    def groups(values):
        return [{"params": values[:1], "weight_decay": 0.1}, {"params": values[1:], "weight_decay": 0.0}]

    half, whole = with_master_weights(kind)(groups(mine), **options), kind(groups(truth), **options)
    schedules = [torch.optim.lr_scheduler.LinearLR(each, total_iters=5) for each in (half, whole)]
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for value, exact in zip(mine, truth, strict=True):
            value.grad = torch.randn(value.shape, generator=generator).to(dtype)
            exact.grad = value.grad.float()
        for optimizer, schedule in zip((half, whole), schedules, strict=True):
            optimizer.step()
            schedule.step()
        for value, exact in zip(mine, truth, strict=True):
            assert torch.equal(half.state[value][MASTER], exact)
            assert torch.equal(value, exact.to(dtype))
    again = copy.deepcopy(half.state_dict())
    other = with_master_weights(kind)(groups([value.detach().clone().requires_grad_() for value in mine]), **options)
    other.load_state_dict(again)
    for held, loaded in zip(half.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert held.keys() == loaded.keys()
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, loaded[name]) and value.dtype == loaded[name].dtype, name


def trainer_args(optim):
    from transformers import TrainingArguments

    return TrainingArguments("unused", optim=optim, learning_rate=1e-3, use_cpu=True, report_to=[])


def test_a_weight_that_is_set_from_outside(tmp_path):
    value = torch.ones(4, dtype=torch.bfloat16).requires_grad_()
    optimizer = with_master_weights(torch.optim.SGD)([value], lr=1e-4)
    value.grad = torch.ones_like(value)
    optimizer.step()
    with torch.no_grad():
        value[1] = 3.0
    optimizer.step()
    once = torch.tensor(1.0) - torch.tensor(1e-4)
    expected = torch.stack([once - 1e-4, torch.tensor(3.0) - 1e-4, once - 1e-4, once - 1e-4])
    torch.testing.assert_close(optimizer.state[value][MASTER], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}], ids=str)
def test_resumed_to_the_bit(tmp_path, options):
    whole = trainer(tmp_path, half_model(), master_weights=True, **SMALL, **options)
    whole.train()
    again = trainer(tmp_path, half_model(), master_weights=True, **SMALL, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    masters = masters_of(again)
    for name, master in masters_of(whole).items():
        assert torch.equal(master, masters[name]), name
        assert torch.equal(whole.model.get_parameter(name), again.model.get_parameter(name))


def test_where_it_would_do_nothing(tmp_path):
    with pytest.raises(ValueError, match="this model trains none"):
        trainer(tmp_path, master_weights=True)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="this model trains none"):
        trainer(tmp_path, half_model(), peft_config=config, master_weights=True)


def test_an_optimizer_of_ones_own(tmp_path):
    from tiny import word_tokenizer
    from trainer_runs import config

    import fastdpo

    model = half_model()
    with pytest.raises(ValueError, match="master_weights=True and optimizers contradict"):
        fastdpo.DPOTrainer(
            model, args=config(tmp_path, master_weights=True), train_dataset=random_rows(4),
            processing_class=word_tokenizer(), optimizers=(torch.optim.SGD(model.parameters()), None),
        )  # fmt: skip
