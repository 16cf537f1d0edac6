"""What would fail at the end of a run, or at its first evaluation, is told by the constructor."""

import logging

import pytest
import torch
from reward_models import tiny_reward_model
from tiny import random_rows, text_rows, tiny_model, word_tokenizer
from trainer_runs import trainer
from transformers import AutoModelForCausalLM

import fastdpo

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}
BEST = EVERY_STEP | {"save_strategy": "best"}


def with_generation(**options):
    model = tiny_model()
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("wrap", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"top_p": 0.9, "do_sample": False}, {"top_k": 5}], ids=str)
def test_options_of_sampling_are_mended(tmp_path, options, wrap, caplog):
    """As in published models: temperature=0.6 and do_sample=False, with which save_pretrained raises."""
    model = with_generation(**options)
    with pytest.raises(ValueError):
        model.generation_config.save_pretrained(tmp_path)
    peft_config = None
    if wrap:
        peft_config = pytest.importorskip("peft").LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with caplog.at_level(logging.WARNING, "fastdpo"):
        run = trainer(tmp_path, model, max_steps=1, peft_config=peft_config)
    assert [each for each in caplog.messages if "do_sample is set to True" in each]
    run.train()
    run.save_model()
    if not wrap:
        saved = AutoModelForCausalLM.from_pretrained(run.args.output_dir).generation_config
        assert saved.do_sample and {name: getattr(saved, name) for name in options if name != "do_sample"} == {
            name: value for name, value in options.items() if name != "do_sample"
        }


def test_a_valid_generation_config_stays(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fastdpo"):
        run = trainer(tmp_path, with_generation(temperature=0.6, do_sample=True))
    assert run.model.generation_config.temperature == 0.6 and not caplog.messages
    assert not trainer(tmp_path).model.generation_config.do_sample


def test_a_generation_config_that_sampling_does_not_mend(tmp_path):
    model = with_generation(temperature=0.6, num_return_sequences=3, num_beams=2)
    with pytest.raises(ValueError, match=r"correct model\.generation_config: .*num_return_sequences"):
        trainer(tmp_path, model)
    assert not model.generation_config.do_sample


def test_a_config_that_is_no_json(tmp_path):
    model = tiny_model()
    model.config.my_own = object()
    with pytest.raises(ValueError, match=r"LlamaConfig cannot be saved; correct it first: .*not JSON serializable"):
        trainer(tmp_path, model)


def test_weights_that_share_memory(tmp_path):
    model = tiny_model()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"weights cannot be saved; .*up_proj"):
        trainer(tmp_path, model)
    second.weight = torch.nn.Parameter(first.weight.detach().clone())
    trainer(tmp_path, model)


@pytest.mark.parametrize("below", [False, True])
def test_an_output_folder_that_cannot_be_written(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"output_dir .*file.* cannot be written"):
        trainer(tmp_path, output_dir=str(file / "out" if below else file))


def test_a_reward_model_that_cannot_be_saved(tmp_path):
    model = tiny_reward_model()
    model.config.my_own = object()
    args = fastdpo.RewardConfig(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="cannot be saved"):
        fastdpo.RewardTrainer(model, args=args, train_dataset=text_rows(4), processing_class=word_tokenizer())


@pytest.mark.parametrize("metric", ["accuracy", "eval_rewards/accurracies", "logps"])
@pytest.mark.parametrize("how", [BEST, EVERY_STEP | {"save_strategy": "steps", "save_steps": 1,
                                                     "load_best_model_at_end": True}])  # fmt: skip
def test_a_metric_that_no_evaluation_has(tmp_path, metric, how):
    with pytest.raises(ValueError, match=rf"metric_for_best_model is '{metric}'.* rewards/accuracies"):
        trainer(tmp_path, eval_dataset=random_rows(4), metric_for_best_model=metric, **how)


@pytest.mark.parametrize("metric", ["loss", "eval_loss", "rewards/accuracies", "eval_rewards/margins"])
def test_a_metric_that_evaluations_have(tmp_path, metric):
    run = trainer(tmp_path, eval_dataset=random_rows(4), metric_for_best_model=metric, max_steps=1, **BEST)
    run.train()
    assert run.state.best_model_checkpoint is not None


def test_metrics_of_several_evaluation_sets(tmp_path):
    sets = {"a": random_rows(4), "b": random_rows(4, seed=1)}
    trainer(tmp_path, eval_dataset=sets, metric_for_best_model="b_rewards/margins", **BEST)
    with pytest.raises(ValueError, match="which no evaluation has"):
        trainer(tmp_path, eval_dataset=sets, metric_for_best_model="rewards/margins", **BEST)


def test_the_best_without_evaluation(tmp_path):
    """transformers saves nothing then, and says nothing."""
    with pytest.raises(ValueError, match=r"save_strategy='best' .* eval_strategy"):
        trainer(tmp_path, save_strategy="best", metric_for_best_model="loss")
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer(tmp_path, **EVERY_STEP)


@pytest.mark.parametrize("name, sizes", [("eval", (8, 3)), ("train", (3, 8))])
def test_a_data_set_that_drop_last_leaves_nothing_of(tmp_path, name, sizes):
    train, evaluated = sizes
    with pytest.raises(ValueError, match=f"leaves nothing of the {name} data set: it has 3 rows"):
        trainer(tmp_path, rows=random_rows(train), eval_dataset=random_rows(evaluated), dataloader_drop_last=True,
                per_device_eval_batch_size=4)  # fmt: skip
    trainer(tmp_path, rows=random_rows(8), eval_dataset=random_rows(4), dataloader_drop_last=True,
            per_device_eval_batch_size=4)  # fmt: skip


def test_half_precision_without_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="fp16=True computes in float16 on GPUs alone"):
        trainer(tmp_path, fp16=True)


def test_options_of_an_optimizer(tmp_path):
    with pytest.raises(ValueError, match=r"optim_args='eps=0\.5' changes nothing for optim='adamw_torch'"):
        trainer(tmp_path, optim="adamw_torch", optim_args="eps=0.5")
    trainer(tmp_path, optim="sgd", optim_args="momentum=0.5")
