"""DPO in a training loop of one's own, full fine-tuning or LoRA: reference log-probs once, then loss after loss.

    python examples/custom_loop.py --model PATH --dataset pairs.jsonl [--lora] [--learning_rate 1e-6]

`train` is the whole of it. With LoRA the reference is the base model, and the head, which then is frozen, costs half.
"""

import argparse

import torch

import fastdpo
from fastdpo.data import read_rows, tokenize_row
from fastdpo.reference import add_reference_columns


def train(model, rows, lora=False, learning_rate=1e-6):
    rows = add_reference_columns(fastdpo.precompute(model, rows), rows)  # the model as it is now; kept on disk
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True, collate_fn=fastdpo.PreferenceCollator())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for batch in loader:
        output = fastdpo.batch_loss(model, batch.to(model.device), beta=0.1)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
        print(f"loss {losses[-1]:.4f}  margin {output.metrics()['rewards/margins'].item():+.3f}")
    return losses


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    options = parser.parse_args(arguments)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [tokenize_row(row, tokenizer) for row in read_rows(options.dataset)[0]]
    return train(model, rows, options.lora, options.learning_rate)


if __name__ == "__main__":
    main()
