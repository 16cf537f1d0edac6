"""examples/dpo_trainer.py gives one curve however it is launched, and the configs of examples/accelerate are read."""

import importlib.util
import json
import math

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from checkout import ROOT
from processes import environment, run
from tiny import text_rows, tiny_model, word_tokenizer, write_rows

SCRIPT, CONFIGS = ROOT / "examples" / "dpo_trainer.py", ROOT / "examples" / "accelerate"
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0", "--config_file"]


def options(folder, output, processes):
    values = {
        "model": folder / "model", "dataset": folder / "pairs.jsonl", "output_dir": output,
        "ref_logps": f"{output}-reference", "per_device_train_batch_size": 8 // processes, "max_steps": 4,
        "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "bf16": False,
    }  # fmt: skip
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def launch(arguments, folder, name):
    env = environment(HF_DATASETS_CACHE=folder / "datasets", DS_ACCELERATOR="cpu")
    run(*arguments, SCRIPT, *options(folder, folder / name, 2), env=env)
    return curve(folder / name)


def curve(output):
    history = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen")
    return [[entry[name] for name in names] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("launch")
    tiny_model().save_pretrained(made / "model")
    word_tokenizer().save_pretrained(made / "model")
    write_rows(made / "pairs.jsonl", text_rows(32))
    return made


@pytest.fixture(scope="module")
def alone(folder):
    """The curve of one process."""
    run_here(folder, folder / "one")
    return curve(folder / "one")


def run_here(folder, output):
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(options(folder, output, 1))


@pytest.mark.slow
def test_one_process_trains_and_goes_on_from_a_whole_checkpoint(folder, alone):
    losses = [loss for loss, *_ in alone]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[3] < losses[0] - 0.1
    assert (folder / "one" / "model.safetensors").exists()
    (folder / "one" / "checkpoint-4" / "trainer_state.json").unlink()  # as if it had been killed while it saved
    run_here(folder, folder / "one")
    assert curve(folder / "one") == alone


@pytest.mark.slow
def test_two_processes_give_the_same_curve(folder, alone):
    """Through accelerate's launcher, which starts torchrun's; elsewhere tests start torchrun's ranks themselves."""
    two = launch([*ACCELERATE, str(CONFIGS / "ddp.yaml")], folder, "two")
    for ours, theirs in zip(two, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_so_do_two_of_deepspeed(folder, alone, name):
    pytest.importorskip("deepspeed")
    for ours, theirs in zip(launch([*ACCELERATE, str(CONFIGS / f"{name}.yaml")], folder, name), alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    config = ClusterConfig.from_yaml_file(str(path))  # raises on a key of the first level that it does not know
    assert config.num_processes == 8 and not config.use_cpu
    assert config.mixed_precision == "no"  # else it would stand over --bf16, and the reference's log-probs would not
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[path.stem]
    assert config.distributed_type.value == kind
    # Keys of the second level go into the arguments of `accelerate launch`, by name, known or not.
    known = {action.dest for action in launch_command_parser()._actions}
    values = yaml.safe_load(path.read_text())
    below = {key for name in ("fsdp_config", "deepspeed_config") for key in values.get(name, {})}
    assert below <= known and bool(below) == (kind != "MULTI_GPU")
