"""Names of options that transformers and TRL have dropped: carried over with a warning, or refused with the remedy."""

import dataclasses
import math
import os
import pickle
import warnings

import pytest
import trainer_runs
import transformers
from reward_models import tiny_reward_model
from tiny import random_rows, text_rows, tiny_model, word_tokenizer
from transformers import HfArgumentParser, TrainingArguments

import fastdpo
from fastdpo.trainer.old_names import OLD_NAMES

CONFIGS = {
    "DPO": fastdpo.DPOConfig,
    "KTO": fastdpo.KTOConfig,
    "CPO": fastdpo.CPOConfig,
    "ORPO": fastdpo.ORPOConfig,
    "Reward": fastdpo.RewardConfig,
}
QUIET = {"bf16": False, "use_cpu": True, "report_to": [], "disable_tqdm": True}

# Name -> (value, what is set in its place).
CARRIED = {
    "warmup_ratio": (0.1, {"warmup_steps": 0.1}),
    "evaluation_strategy": ("steps", {"eval_strategy": "steps"}),
    "no_cuda": (True, {"use_cpu": True}),
    "per_gpu_train_batch_size": (3, {"per_device_train_batch_size": 3}),
    "per_gpu_eval_batch_size": (3, {"per_device_eval_batch_size": 3}),
    "push_to_hub_model_id": ("model", {"hub_model_id": "model"}),
    "push_to_hub_organization": ("me", {"hub_model_id": "me/out"}),
    "push_to_hub_token": ("hf_x", {"hub_token": "hf_x"}),
    "group_by_length": (True, {"train_sampling_strategy": "group_by_length"}),
    "adafactor": (True, {"optim": "adafactor"}),
    "torchdynamo": ("eager", {"torch_compile": True, "torch_compile_backend": "eager"}),
    "max_target_length": (7, {"max_completion_length": 7}),
}
# Name -> a value that changes nothing any more.
WITHOUT_EFFECT = {
    "use_mps_device": True,
    "overwrite_output_dir": True,
    "fp16_backend": "auto",
    "half_precision_backend": "cuda_amp",
    "fp16_opt_level": "O1",
    "include_tokens_per_second": True,
    "ray_scope": "last",
    "mp_parameters": "",
    "past_index": -1,
    "tp_size": 1,
    "tpu_num_cores": 0,
    "sharded_ddp": "",
    "label_pad_token_id": -100,
    "use_logits_to_keep": True,
    "use_num_logits_to_keep": True,
    "use_liger_loss": True,
    "base_model_attribute_name": "model",
    "force_use_ref_model": True,
}
# Name -> (value, words of the message).
REFUSED = {
    "warmup_ratio": (1.5, ["[0, 1]", "warmup_steps"]),
    "save_safetensors": (False, ["safetensors", "leave it out"]),
    "fp16_backend": ("apex", ["fp16=True"]),
    "half_precision_backend": ("cpu_amp", ["fp16=True"]),
    "fp16_opt_level": ("O2", ["fp16=True"]),
    "include_inputs_for_metrics": (True, ["include_for_metrics"]),
    "dispatch_batches": (True, ["cut packed rows apart"]),
    "split_batches": (True, ["cut packed rows apart", "per_device_train_batch_size"]),
    "jit_mode_eval": (True, ["leave it out"]),
    "use_ipex": (True, ["leave it out"]),
    "ray_scope": ("all", ["hyperparameter_search"]),
    "mp_parameters": ("{}", ["SageMaker"]),
    "past_index": (0, ["leave it out"]),
    "use_legacy_prediction_loop": (True, ["leave it out"]),
    "tpu_num_cores": (8, ["TPU"]),
    "tpu_metrics_debug": (True, ["TPU"]),
    "sharded_ddp": ("simple", ["fsdp"]),
    "tp_size": (2, ["FSDP2"]),
    "label_pad_token_id": (0, ["leave it out"]),
    "padding_value": (0, ["leave it out"]),
    "is_encoder_decoder": (True, ["decoder"]),
    "generate_during_eval": (True, ["show_generations"]),
    "tools": ([{"name": "search"}], ["apply_chat_template"]),
}
ELSEWHERE = {"logging_dir", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"}  # tests of their own below

FIELDS_OF_4_40 = """
output_dir overwrite_output_dir do_train do_eval do_predict evaluation_strategy prediction_loss_only
per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size per_gpu_eval_batch_size
gradient_accumulation_steps eval_accumulation_steps eval_delay learning_rate weight_decay adam_beta1 adam_beta2
adam_epsilon max_grad_norm num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps
log_level log_level_replica log_on_each_node logging_dir logging_strategy logging_first_step logging_steps
logging_nan_inf_filter save_strategy save_steps save_total_limit save_safetensors save_on_each_node save_only_model
no_cuda use_cpu use_mps_device seed data_seed jit_mode_eval use_ipex bf16 fp16 fp16_opt_level half_precision_backend
bf16_full_eval fp16_full_eval tf32 local_rank ddp_backend tpu_num_cores tpu_metrics_debug debug dataloader_drop_last
eval_steps dataloader_num_workers dataloader_prefetch_factor past_index run_name disable_tqdm remove_unused_columns
label_names load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip fsdp fsdp_min_num_params
fsdp_config fsdp_transformer_layer_cls_to_wrap accelerator_config deepspeed label_smoothing_factor optim optim_args
adafactor group_by_length length_column_name report_to ddp_find_unused_parameters ddp_bucket_cap_mb
ddp_broadcast_buffers dataloader_pin_memory dataloader_persistent_workers skip_memory_metrics
use_legacy_prediction_loop push_to_hub resume_from_checkpoint hub_model_id hub_strategy hub_token hub_private_repo
hub_always_push gradient_checkpointing gradient_checkpointing_kwargs include_inputs_for_metrics fp16_backend
push_to_hub_model_id push_to_hub_organization push_to_hub_token mp_parameters auto_find_batch_size full_determinism
torchdynamo ray_scope ddp_timeout torch_compile torch_compile_backend torch_compile_mode dispatch_batches split_batches
include_tokens_per_second include_num_input_tokens_seen neftune_noise_alpha optim_target_modules
"""


def made(tmp_path, kind="DPO", **options):
    return CONFIGS[kind](output_dir=str(tmp_path / "out"), **(QUIET | options))


def gone(cases):
    """Those that the installed transformers does not have itself."""
    return [name for name in cases if name in OLD_NAMES]


def test_every_name_has_a_case():
    assert set(OLD_NAMES) - CARRIED.keys() - WITHOUT_EFFECT.keys() - REFUSED.keys() - ELSEWHERE == set()
    assert set(FIELDS_OF_4_40.split()) - set(TrainingArguments.__dataclass_fields__) - set(OLD_NAMES) == set()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", gone(CARRIED))
def test_carried_over(tmp_path, name, kind):
    if (kind, name) == ("Reward", "max_target_length"):
        pytest.skip("a reward model scores whole sequences")
    value, wanted = CARRIED[name]
    options = {} if name == "no_cuda" else {"use_cpu": True}
    with pytest.warns(FutureWarning, match=f"{name} is an older name"):
        config = CONFIGS[kind](output_dir=str(tmp_path / "out"), bf16=False, report_to=[], **options, **{name: value})
    assert {new: getattr(config, new) for new in wanted} == wanted
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{name}")  # it is said once, and a copy is the same
        again = pickle.loads(pickle.dumps(dataclasses.replace(config)))
    assert {new: getattr(again, new) for new in wanted} == wanted
    assert name not in config.to_dict() and f"{name}=" not in str(config) + repr(config)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", gone(WITHOUT_EFFECT))
def test_without_effect(tmp_path, name, kind):
    with pytest.warns(FutureWarning, match=f"{name} is an older name: it has no effect .*leave it out"):
        config = made(tmp_path, kind, **{name: WITHOUT_EFFECT[name]})
    assert config.to_dict() == made(tmp_path, kind).to_dict()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", gone(REFUSED))
def test_refused(tmp_path, name, kind):
    value, words = REFUSED[name]
    with warnings.catch_warnings(), pytest.raises(ValueError) as error:
        warnings.simplefilter("ignore")
        made(tmp_path, kind, **{name: value})
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    "name", [name for name, old in OLD_NAMES.items() if old.kind is bool and name != "save_safetensors"]
)
def test_a_switch_that_is_off_is_no_news(tmp_path, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{name}")
        made(tmp_path, **{name: False})


@pytest.mark.parametrize("ratio, steps", [(0.0, 0), (0.1, 2), (0.25, 5), (1, 20), (1.0, 20)])
def test_a_share_of_warmup(tmp_path, ratio, steps):
    """transformers 4.40: ceil(ratio * all steps), for ratios up to all of them."""
    assert made(tmp_path, warmup_ratio=ratio).get_warmup_steps(20) == steps == math.ceil(ratio * 20)


def test_a_number_of_warmup_steps_has_precedence(tmp_path):
    with pytest.warns(FutureWarning, match="warmup_steps=3 has precedence"):
        assert made(tmp_path, warmup_ratio=0.5, warmup_steps=3).get_warmup_steps(20) == 3


def test_a_name_that_contradicts_the_newer_one(tmp_path):
    with pytest.raises(ValueError, match="eval_strategy is 'epoch'"):
        made(tmp_path, evaluation_strategy="steps", eval_strategy="epoch")
    with pytest.warns(FutureWarning):
        made(tmp_path, evaluation_strategy="steps", eval_strategy="steps")


def test_owner_and_name_on_the_hub(tmp_path):
    with pytest.warns(FutureWarning):
        config = made(tmp_path, push_to_hub_organization="me", push_to_hub_model_id="model")
    assert config.hub_model_id == "me/model"


def test_the_folder_of_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    with pytest.warns(FutureWarning, match="TENSORBOARD_LOGGING_DIR"):
        made(tmp_path, logging_dir="logs")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"


@pytest.mark.parametrize(
    "name, new, value",
    [
        ("fsdp_min_num_params", "min_num_params", 100),
        ("fsdp_transformer_layer_cls_to_wrap", "transformer_layer_cls_to_wrap", "Layer"),
    ],
)
def test_parts_of_the_fsdp_config(tmp_path, name, new, value):
    with pytest.warns(FutureWarning, match=f"{name} is an older name"):
        config = made(tmp_path, **{name: value})
    assert config.fsdp_config[new] in (value, [value])


def test_a_command_line(tmp_path):
    line = (
        f"--output_dir {tmp_path} --use_cpu --bf16 false --warmup_ratio 0.2 --group_by_length --save_safetensors true"
    )
    with pytest.warns(FutureWarning):
        (config,) = HfArgumentParser(fastdpo.DPOConfig).parse_args_into_dataclasses(line.split())
    assert (config.warmup_steps, config.train_sampling_strategy) == (0.2, "group_by_length")
    with pytest.warns(FutureWarning):
        (config,) = HfArgumentParser(fastdpo.DPOConfig).parse_dict(QUIET | {"warmup_ratio": 0.3})
    assert config.warmup_steps == 0.3


def dpo(tmp_path, args=None, **options):
    return fastdpo.DPOTrainer(
        tiny_model(), args=args, train_dataset=random_rows(8), processing_class=word_tokenizer(), **options
    )


def test_options_that_older_scripts_pass_to_the_trainer(tmp_path):
    with pytest.warns(FutureWarning, match="beta as an argument of DPOTrainer is deprecated") as said:
        run = dpo(
            tmp_path, made(tmp_path, learning_rate=3e-4), beta=0.3, max_length=30, max_prompt_length=9,
            max_target_length=8, label_pad_token_id=-100, loss_type="ipo", disable_dropout=True,
        )  # fmt: skip
    values = (run.args.beta, run.args.max_length, run.args.max_prompt_length, run.args.max_completion_length)
    assert values == (0.3, 30, 9, 8) and run.args.loss_type == ["ipo"] and run.args.learning_rate == 3e-4
    assert run.data_collator.max_length == 30
    assert any("max_length=30" in str(each.message) for each in said)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("KTO", {"max_length": 30}),
        ("CPO", {"beta": 0.3, "max_length": 30}),
        ("ORPO", {"beta": 0.3}),
        ("Reward", {"max_length": 30}),
    ],
)
def test_options_passed_to_other_trainers(tmp_path, kind, options):
    if kind == "Reward":
        model = tiny_reward_model()
    else:
        model = tiny_model()
    with pytest.warns(FutureWarning, match=f"{next(iter(options))} as an argument of {kind}Trainer is deprecated"):
        run = getattr(fastdpo, f"{kind}Trainer")(
            model, args=made(tmp_path, kind), train_dataset=text_rows(8), processing_class=word_tokenizer(), **options
        )
    assert {name: getattr(run.args, name) for name in options} == options


def test_an_option_that_is_set_twice(tmp_path):
    with pytest.raises(ValueError, match=r"beta is 0\.3 as an argument of the trainer and 0.2 in args"):
        dpo(tmp_path, made(tmp_path, beta=0.2), beta=0.3)
    with pytest.warns(FutureWarning):
        assert dpo(tmp_path, made(tmp_path, beta=0.3), beta=0.3).args.beta == 0.3


def test_an_argument_that_is_none(tmp_path):
    with pytest.raises(TypeError, match=r"DPOTrainer.__init__\(\) got an unexpected keyword argument 'betta'"):
        dpo(tmp_path, made(tmp_path), betta=0.3)
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics is not supported"):
        dpo(tmp_path, made(tmp_path), preprocess_logits_for_metrics=print)


def test_plain_training_arguments(tmp_path):
    """As older scripts pass them, with the rest as arguments of the trainer; what they set stays."""
    plain = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[], max_steps=1, learning_rate=3e-4,
                              save_strategy="no", hub_token="hf_x")  # fmt: skip
    with pytest.warns(FutureWarning, match="beta"):
        run = dpo(tmp_path, plain, beta=0.3)
    assert isinstance(run.args, fastdpo.DPOConfig)
    wanted = {"beta": 0.3, "learning_rate": 3e-4, "max_steps": 1, "bf16": False, "hub_token": "hf_x"}
    assert {name: getattr(run.args, name) for name in wanted} == wanted
    assert trainer_runs.losses_of(run) == [] and run.train().global_step == 1


def test_the_config_of_another_trainer(tmp_path):
    with pytest.raises(ValueError, match="args is ORPOConfig; DPOTrainer takes DPOConfig"):
        dpo(tmp_path, made(tmp_path, "ORPO"))
    with pytest.raises(ValueError, match="args is dict; DPOTrainer takes DPOConfig"):
        dpo(tmp_path, {"beta": 0.1})


def test_a_config_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    theirs = trl.DPOConfig(str(tmp_path / "out"), **QUIET, beta=0.3, max_length=30)
    run = dpo(tmp_path, theirs)
    assert isinstance(run.args, fastdpo.DPOConfig) and (run.args.beta, run.args.max_length) == (0.3, 30)
    theirs = trl.SFTConfig(str(tmp_path / "out"), **QUIET, dataset_text_field="words")
    with pytest.raises(ValueError, match="SFTConfig with dataset_text_field='words'"):
        dpo(tmp_path, theirs)


def test_the_seeds_script(tmp_path):
    """warmup_ratio, tokenizer and max_prompt_length as they are written in older examples, LoRA and no reference."""
    peft = pytest.importorskip("peft")
    with pytest.warns(FutureWarning) as said:
        args = fastdpo.DPOConfig(
            output_dir=str(tmp_path / "out"), warmup_ratio=0.1, bf16=True, use_cpu=True, max_length=64,
            max_prompt_length=32, beta=0.1, max_steps=2, report_to="none", logging_steps=1, save_strategy="no",
            disable_tqdm=True, remove_unused_columns=False, evaluation_strategy="no",
        )  # fmt: skip
        run = fastdpo.DPOTrainer(
            tiny_model(), ref_model=None, args=args, train_dataset=text_rows(8), tokenizer=word_tokenizer(),
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )  # fmt: skip
    told = " ".join(str(each.message) for each in said)
    assert "write warmup_steps=0.1" in told and "pass it as processing_class" in told
    run.train()
    assert len(trainer_runs.losses_of(run)) == 2


def test_the_installed_transformers_is_looked_at():
    """Names that a version of transformers still has are left to it."""
    assert not set(OLD_NAMES) & set(TrainingArguments.__dataclass_fields__), transformers.__version__
