"""DPOTrainer on a file of pairs, on one device or very many: examples/launch.md has the launch lines.

Every field of DPOConfig is an option. Started again with the same --output_dir, it goes on from the last checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, HfArgumentParser

from fastdpo import DPOConfig, DPOTrainer


@dataclass
class Inputs:
    model: str  # folder or hub name
    dataset: str  # JSON lines with prompt, chosen and rejected
    dtype: str = "float32"  # in which the weights are loaded


def main(arguments=None):
    inputs, rest = HfArgumentParser(Inputs).parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    # Before the config, which under ZeRO-3 has from_pretrained cut the weights up; the trainer tries whole ones first.
    model = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=inputs.dtype)
    (args,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(rest)
    trainer = DPOTrainer(model, args=args, train_dataset=load_dataset("json", data_files=inputs.dataset, split="train"))
    # trainer_state.json comes last: a checkpoint without it was cut short.
    whole = [path.parent for path in Path(args.output_dir).glob("checkpoint-*/trainer_state.json")]
    last = max(map(str, whole), key=lambda path: int(path.rpartition("-")[2]), default=None)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or last)
    if trainer.is_fsdp_enabled:  # checkpoints are shards; the model at the end is one that from_pretrained reads
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


if __name__ == "__main__":
    main()
