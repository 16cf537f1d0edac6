"""DPO for a model that is no transformers model: anything that gives logits. Here a small recurrent network.

    python examples/plain_logits.py [--steps 30]

`fastdpo.loss` takes padded logits and labels as they are, one row a sequence, chosen rows first. The pairs are drawn:
the chosen answer counts upwards from the prompt's last token, the rejected one downwards.
"""

import argparse
import copy

import torch

import fastdpo

VOCABULARY = 50


class RecurrentModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 64)
        self.layers = torch.nn.GRU(64, 64, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(64, VOCABULARY)

    def forward(self, ids):
        return self.head(self.layers(self.embedding(ids))[0])


def draw_batch(pairs, generator):
    """ids and labels (2B, T), chosen rows first; -100 where a token is no answer's."""
    prompt = torch.randint(10, VOCABULARY - 10, (pairs, 3), generator=generator)
    steps = torch.arange(1, 5)
    chosen = torch.cat([prompt, prompt[:, -1:] + steps], dim=1)
    rejected = torch.cat([prompt, prompt[:, -1:] - steps], dim=1)
    ids = torch.cat([chosen, rejected])
    labels = ids.clone()
    labels[:, :3] = -100
    return ids, labels


def sequence_logps(model, ids, labels):
    """The (2B,) sums under a model that is not trained."""
    with torch.no_grad():
        logps = fastdpo.token_logps(model(ids)[:, :-1], labels[:, 1:])
    return logps.sum(dim=1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = RecurrentModel().to(device)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accuracies = []
    for step in range(options.steps):
        ids, labels = (tensor.to(device) for tensor in draw_batch(16, generator))
        output = fastdpo.loss(model(ids), labels, sequence_logps(reference, ids, labels), beta=0.1)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        accuracies.append(output.metrics()["rewards/accuracies"].item())
        print(f"step {step}: loss {output.loss.item():.4f}  accuracy {accuracies[-1]:.2f}")
    return accuracies


if __name__ == "__main__":
    main()
