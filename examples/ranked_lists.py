"""Listwise preferences: K ranked answers to each prompt, one forward pass in which the prompt stands once.

    python examples/ranked_lists.py --model PATH --dataset lists.jsonl [--epochs 2] [--learning_rate 1e-6]

A line of the data, ranks counted from 1, the best (no two alike; without ranks, the first answer is the best):

    {"prompt": "Name a prime.", "completions": [" 7", " 9", " Seven, I think."], "ranks": [1, 3, 2]}

The loss is that of Plackett and Luce over the implicit rewards (Rafailov et al. 2023, appendix A.3).
"""

import argparse

import torch

import fastdpo
from fastdpo.data import read_rows, tokenize_row
from fastdpo.reference import add_reference_columns


def train(model, rows, epochs, learning_rate):
    rows = add_reference_columns(fastdpo.precompute(model, rows), rows)
    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=fastdpo.PreferenceCollator())
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    history = []
    for epoch in range(epochs):
        for batch in loader:
            output = fastdpo.batch_loss(model, batch.to(model.device), loss_type="listwise", beta=0.1)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ordered = output.metrics()["rewards/accuracies"].item()  # of two answers, how often in the right order
            history.append((output.loss.item(), ordered))
            print(f"epoch {epoch + 1}: loss {history[-1][0]:.4f}  in order {ordered:.2f}")
    return history


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    options = parser.parse_args(arguments)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [tokenize_row(row, tokenizer) for row in read_rows(options.dataset)[0]]
    return train(model, rows, options.epochs, options.learning_rate)


if __name__ == "__main__":
    main()
