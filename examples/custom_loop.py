"""DPO in a training loop of one's own: batches, reference log-probs once, loss, metrics.

python examples/custom_loop.py --model PATH --dataset pairs.jsonl
"""

import argparse

import torch

import fastdpo
from fastdpo.data import read_rows, tokenize_row
from fastdpo.reference import reference_columns


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    options = parser.parse_args(arguments)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [tokenize_row(row, tokenizer) for row in read_rows(options.dataset)[0]]

    cache = fastdpo.precompute(model, rows)  # the policy before training; kept on disk
    columns = reference_columns(cache, rows)
    rows = [
        {**row, **dict(zip(columns, refs, strict=True))}
        for row, refs in zip(rows, zip(*columns.values(), strict=True), strict=True)
    ]

    loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True, collate_fn=fastdpo.PreferenceCollator())
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    losses = []
    for batch in loader:
        batch = batch.to(model.device)
        output = fastdpo.batch_loss(model, batch, beta=0.1)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
        print(f"loss {losses[-1]:.4f}  margin {output.metrics()['rewards/margins'].item():+.3f}")
    return losses


if __name__ == "__main__":
    main()
