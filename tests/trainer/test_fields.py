"""Every field of every config works or is refused; one of a new transformers that nobody has looked at fails here."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny import random_rows, tiny_model
from trainer_runs import config, losses_of, trainer
from transformers import TrainingArguments

import fastdpo
from fastdpo.trainer.meaningless import REFUSED as MEANINGLESS
from fastdpo.trainer.old_names import OLD_NAMES

TESTS = Path(__file__).parent.parent
CONFIGS = [getattr(fastdpo, f"{kind}Config") for kind in ("DPO", "KTO", "CPO", "ORPO", "Reward")]

# Options of a run -> whether its losses are those of a run without them.
SAME, OTHER = True, False
RUNS = {
    "activation_checkpointing": ({"activation_checkpointing": False}, SAME),
    "activation_checkpointing_kwargs": ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, SAME),
    "gradient_checkpointing_kwargs": ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, SAME),
    "adam_beta1": ({"adam_beta1": 0.1, "adam_beta2": 0.2}, OTHER),
    "adam_beta2": ({"adam_beta2": 0.2}, OTHER),
    "adam_epsilon": ({"adam_epsilon": 1.0}, OTHER),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, SAME),
    "average_tokens_across_devices": ({"average_tokens_across_devices": False}, SAME),  # one process
    "data_seed": ({"data_seed": 7}, OTHER),
    "dataloader_pin_memory": ({"dataloader_pin_memory": False}, SAME),
    "debug": ({"debug": "underflow_overflow"}, SAME),
    "full_determinism": ({"full_determinism": True}, SAME),
    "logging_first_step": ({"logging_first_step": True}, SAME),
    "logging_nan_inf_filter": ({"logging_nan_inf_filter": True}, SAME),
    "lr_scheduler_kwargs": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-4}},
        OTHER,
    ),
    "remove_unused_columns": ({"remove_unused_columns": False}, SAME),
    "skip_memory_metrics": ({"skip_memory_metrics": False}, SAME),
    "torch_empty_cache_steps": ({"torch_empty_cache_steps": 1}, SAME),
    "use_cache": ({"use_cache": True}, SAME),
}
# Fields of transformers that fastdpo acts on, or whose effect is shown elsewhere -> the test.
SHOWN = {
    "trainer/test_lent_model.py": "neftune_noise_alpha",
    "trainer/workers_run.py": "dataloader_persistent_workers dataloader_multiprocessing_context",
    "trainer/test_evaluation.py": "include_num_input_tokens_seen",
    "trainer/test_resume.py": "save_strategy save_steps eval_steps logging_steps num_train_epochs "
    "resume_from_checkpoint gradient_accumulation_steps",
    "trainer/test_old_names.py": "warmup_steps bf16 use_cpu report_to disable_tqdm hub_token hub_model_id "
    "eval_strategy per_device_train_batch_size per_device_eval_batch_size train_sampling_strategy",
    "trainer/test_preflight.py": "dataloader_drop_last optim_args metric_for_best_model load_best_model_at_end fp16 "
    "output_dir",
    "trainer/test_passes.py": "torch_compile torch_compile_backend",
    "trainer/test_syncs.py": "max_grad_norm lr_scheduler_type logging_strategy gradient_checkpointing",
    "trainer/test_master_weights.py": "optim learning_rate weight_decay max_steps",
    "trainer/test_survival.py": "seed accelerator_config deepspeed",
    "trainer/test_dpo.py": "dataloader_num_workers",
    "trainer/test_reward.py": "fsdp fsdp_config",
    "trainer/test_fields.py": "batch_eval_metrics eval_do_concat_batches eval_use_gather_object "
    "eval_accumulation_steps prediction_loss_only include_for_metrics eval_on_start eval_delay greater_is_better "
    "save_total_limit save_only_model restore_callback_states_from_checkpoint ignore_data_skip parallelism_config "
    "torch_compile_mode",
}
# transformers' own, which nothing here touches: they act on logs, hubs, workers, processes, not on batches or losses.
UNTOUCHED = """
    log_on_each_node log_level log_level_replica run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id save_on_each_node push_to_hub hub_private_repo hub_strategy hub_always_push hub_revision
    dataloader_prefetch_factor dataloader_in_order
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    local_rank tf32 optim_target_modules use_liger_kernel liger_kernel_config
    do_train do_eval do_predict
"""

# Fields of our configs -> the test that shows them.
OWN = {
    "trainer/test_old_names.py": "max_length max_prompt_length max_completion_length beta loss_type",
    "packing/test_packing.py": "truncation_mode",
    "packing/test_microbatch.py": "pad_to_multiple_of",
    "reference/test_fill.py": "attention_backend packing",
    "trainer/test_survival.py": "max_tokens_per_microbatch pad_token nan_loss show_generations padding_free "
    "rpo_alpha sync_ref_model ref_model_mixup_alpha ref_model_sync_steps desirable_weight cpo_alpha alpha "
    "simpo_gamma generate_during_eval is_encoder_decoder padding_value",
    "trainer/test_reward.py": "dataset_num_proc model_init_kwargs trust_remote_code activation_offloading "
    "memory_budget center_rewards_coefficient eos_token chat_template_path",
    "trainer/test_resume.py": "disable_dropout",
    "trainer/test_passes.py": "router_aux_loss_coef",
    "trainer/test_master_weights.py": "master_weights",
    "trainer/test_dpo.py": "precompute_ref_log_probs",
    "trainer/test_fields.py": "precompute_ref_batch_size",
    "trainer/test_named_adapters.py": "model_adapter_name ref_adapter_name ref_model_init_kwargs",
    "reference/test_kinds.py": "ref_logps",
    "models/test_group_models.py": "undesirable_weight",
    "functional/test_linear_losses.py": "loss_weights label_smoothing ld_alpha use_weighting discopop_tau",
    "losses/test_register_loss.py": "f_divergence_type",
    "losses/test_loss_refusals.py": "f_alpha_divergence_coef reference_free",
    "trainer/test_losses.py": "loss_options",
}
REFUSED = [
    ("label_smoothing_factor", 0.1, "set label_smoothing"),
    ("label_names", ["targets"], "no columns of labels"),
    ("include_for_metrics", ["inputs"], "not one input for each sample"),
    ("include_for_metrics", ["los"], "only 'loss'"),
    ("length_column_name", "tokens", "counted from the token ids"),
    ("bf16_full_eval", True, "set bf16=True"),
    ("fp16_full_eval", True, "set fp16=True"),
    ("enable_jit_checkpoint", True, "SIGTERM"),
    ("precompute_ref_batch_size", 4, "without precompute_ref_log_probs=True"),
    ("ref_model_sync_steps", 64, "without sync_ref_model=True"),
    ("ref_model_mixup_alpha", 0.5, "without sync_ref_model=True"),
]


def listed(table):
    return {name: file for file, names in table.items() for name in names.split()}


def names_of(kind):
    return {field.name for field in dataclasses.fields(kind)}


def test_every_field_of_transformers_has_been_looked_at():
    looked_at = RUNS.keys() | listed(SHOWN).keys() | set(UNTOUCHED.split()) | MEANINGLESS.keys()
    assert names_of(TrainingArguments) - looked_at == set()


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_field_of_ours_is_shown(kind):
    own = names_of(kind) - names_of(TrainingArguments) - OLD_NAMES.keys()
    assert own - listed(OWN).keys() == set()


@pytest.mark.parametrize("name, file", [*listed(SHOWN).items(), *listed(OWN).items()])
def test_the_pointers_are_true(name, file):
    text = (TESTS / file).read_text()
    if file == "trainer/test_fields.py":
        text = text.split("def test_every_field_of_transformers", 1)[1]
    assert name in text


def test_everything_refused_has_a_case():
    assert MEANINGLESS.keys() <= {name for name, _, _ in REFUSED}


@pytest.mark.parametrize("name, value, told", REFUSED)
def test_refused(tmp_path, name, value, told):
    with pytest.raises(ValueError, match=told) as error:
        config(tmp_path, **{name: value})
    assert name in str(error.value)


@pytest.mark.parametrize("value", [None, [], ["labels"]])
def test_harmless_names_of_labels(tmp_path, value):
    config(tmp_path, label_names=value)


def run_of(path, **options):
    run = trainer(path, **({"max_steps": 3, "learning_rate": 1e-2} | options))
    run.train()
    return losses_of(run)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run(tmp_path, plain, name):
    options, same = RUNS[name]
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        losses = run_of(tmp_path, **options)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert (losses == pytest.approx(plain, rel=1e-6)) is same and len(losses) == 3


def evaluated(tmp_path, compute, **options):
    run = trainer(tmp_path, eval_dataset=random_rows(7, seed=3), per_device_eval_batch_size=3, max_steps=1, **options)
    run.compute_metrics = compute
    return run.evaluate()


GIVEN = [{}, {"eval_accumulation_steps": 1}, {"eval_use_gather_object": True}, {"include_for_metrics": ["loss"]}]


@pytest.mark.parametrize("options", GIVEN, ids=str)
def test_what_compute_metrics_is_given(tmp_path, options):
    def count(prediction):
        losses = getattr(prediction, "losses", None)
        return {"rows": len(prediction.predictions), "losses": 0 if losses is None else len(losses)}

    given = evaluated(tmp_path, count, **options)
    assert (given["eval_rows"], given["eval_losses"]) == (7, 7 if "include_for_metrics" in options else 0)


def test_metrics_batch_by_batch(tmp_path):
    sizes = []

    def count(prediction, compute_result):
        sizes.append(len(prediction.predictions))
        return {"rows": sum(sizes)} if compute_result else {}

    assert evaluated(tmp_path, count, batch_eval_metrics=True)["eval_rows"] == 7 and sizes == [3, 3, 1]


def test_batches_apart(tmp_path):
    given = evaluated(tmp_path, lambda p: {"batches": len(p.predictions)}, eval_do_concat_batches=False)
    assert given["eval_batches"] == 3
    given = evaluated(tmp_path, lambda p: {"none": 1}, prediction_loss_only=True)
    assert "eval_none" not in given and given["eval_loss"] > 0


def test_when_it_is_evaluated(tmp_path):
    def steps(**options):
        run = trainer(
            tmp_path, eval_dataset=random_rows(4), max_steps=3, eval_strategy="steps", eval_steps=1, **options
        )
        run.train()
        return [entry["step"] for entry in run.state.log_history if "eval_loss" in entry]

    assert (steps(eval_on_start=True), steps(eval_delay=2)) == ([0, 1, 2, 3], [2, 3])


def test_what_is_saved(tmp_path):
    run = trainer(
        tmp_path, eval_dataset=random_rows(4), max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=1, save_only_model=True, metric_for_best_model="rewards/margins",
        greater_is_better=False, load_best_model_at_end=True,
    )  # fmt: skip
    run.train()
    margins = {e["step"]: e["eval_rewards/margins"] for e in run.state.log_history if "eval_loss" in e}
    assert run.state.best_global_step == min(margins, key=margins.get)
    folders = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert folders == {f"checkpoint-{run.state.best_global_step}"}
    assert not list((tmp_path / "out").glob("*/optimizer.pt"))


@pytest.mark.parametrize("option", ["ignore_data_skip", "restore_callback_states_from_checkpoint"])
def test_resumed(tmp_path, option):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer(tmp_path, **saving).train()
    run = trainer(tmp_path, **saving, **{option: True})
    run.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert run.state.global_step == 3 and len(losses_of(run)) == 3


def test_other_parallelism(tmp_path):
    from accelerate.parallelism_config import ParallelismConfig

    with pytest.raises(ValueError, match="tp_size=2"):
        config(tmp_path, parallelism_config=ParallelismConfig(tp_size=2))


def test_a_mode_of_compilation_switches_it_on(tmp_path):
    made = config(tmp_path, torch_compile_mode="default")
    assert made.torch_compile and made.torch_compile_backend == "inductor"


def test_the_batch_size_of_references_computed_ahead(tmp_path):
    model, sizes = tiny_model(), []
    model.model.register_forward_hook(lambda module, args, kwargs, out: sizes.append(1), with_kwargs=True)

    def passes(size, folder):
        sizes.clear()
        trainer(tmp_path, model, random_rows(12), precompute_ref_log_probs=True, precompute_ref_batch_size=size,
                ref_logps=str(tmp_path / folder))  # fmt: skip
        return len(sizes)

    passes(12, "first")  # and those that choose the packing, once for a model
    # Of all 12 rows in one pass and in 12, beside a few that try the hook.
    assert passes(1, "a") - passes(12, "b") == 11


def test_a_record_of_the_options_can_be_read_back(tmp_path):
    made = config(tmp_path, loss_type=["sigmoid", "sft"], beta=0.3)
    assert json.loads(made.to_json_string())["beta"] == 0.3
    assert fastdpo.DPOConfig(**made.to_dict()).to_dict() == made.to_dict()
