"""DPO training on transformers.Trainer."""

from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.dpo import DPOTrainer

__all__ = ["DPOConfig", "DPOTrainer"]
