"""Small runs of DPOTrainer."""

from tiny import random_rows, tiny_model, word_tokenizer

from fastdpo import DPOConfig, DPOTrainer


def config(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0.0,
    }
    return DPOConfig(**(defaults | options))


def trainer(tmp_path, model=None, rows=None, **options):
    arguments = {k: options.pop(k) for k in ("ref_model", "eval_dataset", "peft_config") if k in options}
    return DPOTrainer(
        tiny_model() if model is None else model,
        args=config(tmp_path, **options),
        train_dataset=random_rows(20) if rows is None else rows,
        processing_class=word_tokenizer(),
        **arguments,
    )


def losses_of(a_trainer):
    return [entry["loss"] for entry in a_trainer.state.log_history if "loss" in entry]
