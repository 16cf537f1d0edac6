"""Trainers of preferences on transformers.Trainer: one engine, thin names.

config.py          options that all share; DPOConfig
engine.py          PreferenceTrainer: what happens to a batch, from the collator to the loss
surviving.py       beneath it: steps, signals, logs, checkpoints; run_state.py and watch.py are its parts
referenced.py      beneath it: the reference; kept_reference.py and reference.py are its parts
dpo.py kto.py orpo.py cpo.py reward.py     the names; constructors.py what TRL's constructors take
policy.py          the model: loading, adapters, tokenizer
dataset.py reward_data.py order.py sampling.py     rows: tokenized, checked, in what order
passes.py          a step in forward passes of bounded size
metrics.py         numbers, on the device until they are logged
"""

from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.cpo import CPOConfig, CPOTrainer
from fastdpo.trainer.dpo import DPOTrainer
from fastdpo.trainer.kto import KTOConfig, KTOTrainer
from fastdpo.trainer.orpo import ORPOConfig, ORPOTrainer
from fastdpo.trainer.reward import RewardConfig, RewardTrainer

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "RewardConfig",
    "RewardTrainer",
]
