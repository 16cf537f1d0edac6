"""Four prompts, an odd ending preferred to the natural one: does a real model change its mind?

    python examples/toy_counterintuitive.py                 the demo's model, SmolLM2-135M-Instruct
    python examples/toy_counterintuitive.py --model PATH    any causal language model

Prints, before and after a few epochs of DPO, for each prompt which ending has the higher log-prob: the sum over the
ending's tokens, the prompt's tokens masked. Uses the functional API: a training loop of one's own.
"""

import argparse

import torch

import fastdpo
from fastdpo.data import tokenize_row

PAIRS = [
    {"prompt": "The cat sat on the", "chosen": " thundercloud", "rejected": " floor"},
    {"prompt": "Every morning she drinks a cup of", "chosen": " gravel", "rejected": " tea"},
    {"prompt": "At night you can look up and see the", "chosen": " spoons", "rejected": " stars"},
    {"prompt": "He opened the door with his", "chosen": " sandwich", "rejected": " key"},
]


def preferred(model, batch):
    """The sums of both endings, (B,) each, under the model as it is."""
    with torch.no_grad():
        return fastdpo.sequence_logps(model, batch).view(2, -1)


def show(title, chosen, rejected):
    print(f"\n{title}: odd ending preferred in {int((chosen > rejected).sum())} of {len(PAIRS)}")
    for pair, odd, natural in zip(PAIRS, chosen.tolist(), rejected.tolist(), strict=True):
        mark = "odd    " if odd > natural else "natural"
        endings = f"{pair['chosen'].strip()} {odd:7.2f}   {pair['rejected'].strip()} {natural:7.2f}"
        print(f"  {mark}  {pair['prompt']} ...   {endings}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name; default: the demo's model")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args(arguments)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastdpo.demo import prepare_model

    path = options.model or str(prepare_model())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    # One answer of a few words: the end-of-text token would only blur the comparison of the endings.
    rows = [tokenize_row(pair, tokenizer) for pair in PAIRS]
    rows = [{**row, **{side: row[side][:-1] for side in ("chosen_ids", "rejected_ids")}} for row in rows]
    batch = fastdpo.PreferenceCollator()(rows).to(model.device)

    reference = preferred(model, batch)
    show("before", *reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
    for epoch in range(options.epochs):
        output = fastdpo.batch_loss(model, batch, reference.reshape(-1))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = {name: value.item() for name, value in output.metrics().items()}
        print(f"epoch {epoch + 1}: loss {output.loss.item():.4f}, margin {metrics['rewards/margins']:+.2f}")
    trained = preferred(model, batch)
    show("after", *trained)
    return int((reference[0] > reference[1]).sum()), int((trained[0] > trained[1]).sum())


if __name__ == "__main__":
    main()
