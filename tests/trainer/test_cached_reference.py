"""The trainer and the reference: from a cache, from the rows, or beside it."""

import copy

import pytest
import torch
from tiny import naive_sequence_logps, random_rows, tiny_model
from trainer_runs import losses_of, trainer

from fastdpo.reference import ReferenceCache, precompute, reference_columns
from fastdpo.types import UserError


@pytest.mark.parametrize("options", [{}, {"max_length": 9}, {"max_length": 9, "truncation_mode": "keep_end"}])
def test_a_curve_with_the_cache_is_that_with_an_online_reference(tmp_path, options):
    rows = random_rows(20, seed=3)
    online = trainer(tmp_path, rows=rows, max_steps=8, **options)
    cached = trainer(tmp_path, rows=rows, max_steps=8, ref_logps=str(tmp_path / "cache"), **options)
    assert online.ref_model is not None and cached.ref_model is None
    online.train()
    cached.train()
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "grad_norm"):
        curves = [[entry[name] for entry in run.state.log_history if name in entry] for run in (online, cached)]
        assert len(curves[0]) == 8 and curves[0] == pytest.approx(curves[1], rel=1e-5, abs=1e-5), name


def test_a_second_run_computes_no_reference(tmp_path, scored):
    first = trainer(tmp_path, precompute_ref_log_probs=True)
    assert sum(scored) == 40
    first.train()
    scored.clear()
    # Another beta, loss, learning rate, order and subset; the policy starts from the same weights.
    second = trainer(
        tmp_path, rows=random_rows(20)[9:0:-1], precompute_ref_log_probs=True, beta=0.5, loss_type="ipo",
        learning_rate=1e-5, seed=7, train_sampling_strategy="group_by_length",
    )  # fmt: skip
    assert not scored
    second.train()
    assert trainer(tmp_path, ref_logps=str(tmp_path / "cache")).args.precompute_ref_log_probs
    assert sum(scored) == 40 and list((tmp_path / "cache").glob("shard-*.parquet"))


def test_only_the_rest_is_computed(tmp_path, scored):
    rows = random_rows(9, seed=4)
    precompute(tiny_model(), rows[:5], tmp_path / "cache", progress=False)
    scored.clear()
    run = trainer(tmp_path, rows=rows, ref_logps=str(tmp_path / "cache"), eval_dataset=rows[3:7])
    assert sum(scored) == 8
    exact = naive_sequence_logps(run.model, rows).view(2, -1)
    for name, values in zip(("ref_chosen_logps", "ref_rejected_logps"), exact, strict=True):
        torch.testing.assert_close(torch.tensor(run.train_dataset[name]), values, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(torch.tensor(run.eval_dataset[name]), values[3:7], rtol=1e-5, atol=1e-4)


def test_a_cache_of_sums_is_enough(tmp_path, scored):
    rows = random_rows(6, seed=5)
    precompute(tiny_model(), rows, tmp_path / "cache", per_token=False, progress=False)
    scored.clear()
    trainer(tmp_path, rows=rows, ref_logps=str(tmp_path / "cache"), max_steps=1).train()
    assert not scored


@pytest.mark.parametrize("model", [tiny_model(seed=1), tiny_model().bfloat16()], ids=["weights", "dtype"])
def test_the_cache_of_another_model_is_refused(tmp_path, model):
    rows = random_rows(4)
    precompute(model, rows, tmp_path / "cache", progress=False)
    with pytest.raises(UserError, match=r"cache holds|cache were computed") as error:
        trainer(tmp_path, rows=rows, ref_logps=str(tmp_path / "cache"))
    assert "bfloat16" in str(error.value) or "weights" in str(error.value)


@pytest.mark.parametrize("seed", [0, 1])
def test_adapters_share_the_cache_of_the_model_they_are_put_on(tmp_path, scored, seed):
    peft = pytest.importorskip("peft")
    rows = random_rows(6, seed=6)
    precompute(tiny_model(), rows, tmp_path / "cache", progress=False)
    scored.clear()
    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trainer(tmp_path, rows=rows, ref_logps=str(tmp_path / "cache"), peft_config=lora)
    assert not scored


def test_an_adapter_may_be_the_reference(tmp_path):
    """An SFT adapter as explicit reference, computed by fastdpo.precompute, taken by the trainer."""
    peft = pytest.importorskip("peft")
    rows = random_rows(6, seed=7)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    cache = precompute(tuned, rows, tmp_path / "cache", progress=False)
    own = reference_columns(cache, rows)
    base = reference_columns(precompute(tiny_model(), rows, tmp_path / "base", progress=False), rows)
    assert own["ref_chosen_logps"] != pytest.approx(base["ref_chosen_logps"], rel=1e-3)
    run = trainer(tmp_path, tiny_model(), rows, ref_model=copy.deepcopy(tuned), ref_logps=str(tmp_path / "cache"))
    assert run.train_dataset["ref_chosen_logps"][:] == pytest.approx(own["ref_chosen_logps"], abs=1e-6)


@pytest.mark.parametrize("filled", [False, True])
def test_streamed_data_are_looked_up_as_they_come(tmp_path, scored, filled):
    from datasets import IterableDataset

    rows = random_rows(8, seed=8)
    if filled:
        precompute(tiny_model(), rows, tmp_path / "cache", progress=False)
        scored.clear()
    streamed = IterableDataset.from_generator(lambda: iter(rows))
    run = trainer(tmp_path, rows=streamed, max_steps=4, ref_logps=str(tmp_path / "cache"))
    listed = trainer(tmp_path, rows=rows, max_steps=4, train_sampling_strategy="sequential")
    assert sum(scored) == (0 if filled else 16)
    run.train()
    listed.train()
    assert run.ref_model is None and losses_of(run) == pytest.approx(losses_of(listed), rel=1e-5)


def test_a_set_to_evaluate_later(tmp_path, scored):
    rows = random_rows(6, seed=9)
    run = trainer(tmp_path, rows=rows[:4], ref_logps=str(tmp_path / "cache"), ref_model=tiny_model(seed=3), max_steps=1)
    run.train()
    scored.clear()
    assert run.evaluate(rows[2:])["eval_loss"] > 0
    assert sum(scored) == 4 and len(ReferenceCache(tmp_path / "cache")) == 12


def test_reference_columns_of_the_data_are_taken_as_they_are(tmp_path):
    rows = [dict(row, ref_chosen_logps=-1.0 - i, ref_rejected_logps=-2.0) for i, row in enumerate(random_rows(4))]
    model = tiny_model()
    with torch.no_grad():
        chosen, rejected = naive_sequence_logps(model, rows).view(2, -1)
    run = trainer(tmp_path, model, rows, max_steps=1)
    assert run.ref_model is None
    run.train()
    margin = (chosen - torch.tensor([-1.0, -2.0, -3.0, -4.0])) - (rejected + 2.0)
    exact = -torch.nn.functional.logsigmoid(0.1 * margin).mean().item()
    assert losses_of(run) == pytest.approx([exact], rel=1e-5)


@pytest.mark.parametrize(
    ("environment", "divisions"),
    [
        ({}, [(0, 1)]),
        ({"RANK": 5, "WORLD_SIZE": 12, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}, [(5, 12), (1, 4), (0, 1)]),
        ({"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3}, [(3, 4), (3, 4), (0, 1)]),
        ({"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}, [(1, 2), (0, 1), (0, 1)]),
    ],
)
def test_every_process_meets_the_others_as_often(monkeypatch, environment, divisions):
    from types import SimpleNamespace

    from fastdpo.trainer.reference import _divisions

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    args = SimpleNamespace(
        process_index=environment.get("RANK", 0),
        world_size=environment.get("WORLD_SIZE", 1),
        local_process_index=environment.get("LOCAL_RANK", 0),
    )
    assert list(_divisions(args)) == divisions


def test_a_later_set_without_columns_needs_a_reference(tmp_path):
    rows = [dict(row, ref_chosen_logps=-1.0, ref_rejected_logps=-2.0) for row in random_rows(4)]
    run = trainer(tmp_path, rows=rows, max_steps=1)
    run.train()
    with pytest.raises(ValueError, match="these rows have no ref_chosen_logps"):
        run.evaluate(random_rows(4, seed=1))
    assert run.evaluate(rows)["eval_loss"] > 0
    other = trainer(tmp_path, rows=rows, ref_model=tiny_model(seed=1), max_steps=1)
    assert other.evaluate(random_rows(4, seed=1))["eval_rewards/margins"] != 0


def test_a_later_set_and_a_sharded_base(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    run = trainer(tmp_path, rows=random_rows(4), peft_config=lora, precompute_ref_log_probs=True, max_steps=1)
    run.train()
    assert run.evaluate(random_rows(3, seed=1))["eval_loss"] > 0
    monkeypatch.setattr(run, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="cannot be computed any more"):
        run.evaluate(random_rows(3, seed=2))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"ref_rejected_logps": None}, r"row 2 \(counted from 0\): it has ref_chosen_logps but not the other"),
        ({"ref_chosen_logps": float("nan")}, "row 2.*'ref_chosen_logps' is nan; it must be a sum"),
        ({"ref_chosen_logps": None, "ref_rejected_logps": None}, "1 of 4 rows of the train data set have no"),
    ],
)
@pytest.mark.parametrize("table", [False, True])
def test_columns_that_are_none(tmp_path, change, problem, table):
    from datasets import Dataset

    rows = [dict(row, ref_chosen_logps=-1.0, ref_rejected_logps=-2.0) for row in random_rows(4)]
    rows[2] |= change
    with pytest.raises(UserError, match=problem):
        trainer(tmp_path, rows=Dataset.from_list(rows) if table else rows, precompute_ref_log_probs=True)


def test_streamed_data_with_columns_need_no_reference(tmp_path, scored):
    from datasets import IterableDataset

    rows = [dict(row, ref_chosen_logps=-1.0, ref_rejected_logps=-2.0) for row in random_rows(8)]
    streamed = IterableDataset.from_generator(lambda: iter(rows))
    for options in ({}, {"precompute_ref_log_probs": True}):
        run = trainer(tmp_path, rows=streamed, max_steps=2, **options)
        assert run.ref_model is None and not scored
        run.train()
