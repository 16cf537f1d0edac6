"""Two gloo processes give the curve of one at the same global batch."""

import functools
import json

import pyarrow.parquet as pq
import pytest
import torch
from processes import run_script


def curve(folder, processes, **options):
    """The logged figures of a run, and how many passes each process took."""
    folder.mkdir()
    variables = {"FASTDPO_CACHE": folder / "cache", "DS_ACCELERATOR": "cpu"}
    words = [folder, json.dumps(options)]
    run_script("tests/trainer/distributed_run.py", *words, processes=processes, folder=folder, **variables)
    passes = [json.loads((folder / f"passes-{i}.json").read_text()) for i in range(processes)]
    return json.loads((folder / "curve.json").read_text()), passes


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The curve of one process, with some options; each is run once."""
    return functools.cache(lambda **options: curve(tmp_path_factory.mktemp("alone") / "run", 1, **options)[0])


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["online", "precompute", "own_disk"])
def test_two_processes_train_as_one(tmp_path, alone, reference):
    precompute = reference == "precompute"
    options = {"own_disk": True} if reference == "own_disk" else {"precompute_ref_log_probs": precompute}
    one, (two, _) = alone(), curve(tmp_path / "2", 2, **options)
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-4)
    if precompute:  # each did its share, and nothing twice
        shards = [pq.read_metadata(shard).num_rows for shard in (tmp_path / "2" / "cache").rglob("shard-*")]
        assert sum(shards) == 64 and len(shards) == 2 and min(shards) > 16
    if reference == "own_disk":  # each computed for itself what it could not see
        for rank in (0, 1):
            folder = tmp_path / "2" / f"cache-{rank}"
            assert sum(pq.read_metadata(shard).num_rows for shard in folder.glob("shard-*")) == 64


SYSTEMS = {
    "DistributedDataParallel": {},
    "fsdp2": {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
    "zero3": {
        "deepspeed": {
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            **dict.fromkeys(
                ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto"
            ),
        }
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_take_as_many_passes_and_train_as_one(tmp_path, alone, system):
    """With batches cut by tokens and accumulated; the weights whole, or sharded over the two."""
    if system == "zero3":
        pytest.importorskip("deepspeed")
    options = {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    whole = alone(max_tokens_per_microbatch=10**6, **options)
    cut, passes = curve(tmp_path / "cut", 2, max_tokens_per_microbatch=70, **options, **SYSTEMS[system])
    assert json.loads((tmp_path / "cut" / "system.json").read_text()) == system
    assert len(whole) == 4
    for a, b in zip(whole, cut, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-4)
    assert passes[0] == passes[1] > 4 * 2


@pytest.mark.slow
def test_sharded_in_bfloat16(tmp_path, alone):
    """Sharding casts what goes into and comes out of a model: not the batch, its references, or the loss."""
    options = {"bf16": True, "precompute_ref_log_probs": True}
    exact, whole = alone(), alone(**options)
    sharded, _ = curve(tmp_path / "sharded", 2, **options, **SYSTEMS["fsdp2"])
    assert json.loads((tmp_path / "sharded" / "system.json").read_text()) == "fsdp2"
    for number, name in enumerate(("loss", "grad_norm", "rewards/margins", "logps/chosen")):
        columns = [[entry[number] for entry in run] for run in (sharded, whole, exact)]
        error, allowed = (max(abs(a - b) for a, b in zip(each, columns[2], strict=True)) for each in columns[:2])
        little = torch.finfo(torch.bfloat16).eps * max(1.0, *map(abs, columns[2]))
        assert error <= 4 * allowed + little, (name, columns)
    losses = [loss for loss, *_ in sharded]
    assert any(torch.tensor(loss).bfloat16().item() != loss for loss in losses)  # float32, not what bfloat16 leaves


@pytest.mark.slow
@pytest.mark.parametrize("system", ["DistributedDataParallel", "fsdp2"])
def test_master_weights_of_two_processes(tmp_path, system):
    """Weights in bfloat16 at a learning rate that they alone would not feel; whole, or sharded over the two."""
    options = {"dtype": "bfloat16", "master_weights": True, "learning_rate": 1e-6, "bf16": False}
    one, _ = curve(tmp_path / "one", 1, **options)
    two, _ = curve(tmp_path / "two", 2, **options, **SYSTEMS[system])
    assert json.loads((tmp_path / "two" / "system.json").read_text()) == system
    for folder, ranks in (("one", 1), ("two", 2)):
        for rank in range(ranks):
            assert json.loads((tmp_path / folder / f"dtypes-{rank}.json").read_text()) == [
                "torch.bfloat16", "torch.float32",
            ]  # fmt: skip
            moved = json.loads((tmp_path / folder / f"moved-{rank}.json").read_text())
            assert min(moved.values()) > 0.5 and sum(moved.values()) > 0.9 * len(moved), moved
    for a, b in zip(one, two, strict=True):
        assert b[0] == pytest.approx(a[0], abs=2e-2)
