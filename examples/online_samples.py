"""Online preference training: sample K answers to each prompt, score them by a reward, learn from the ranking.

    python examples/online_samples.py --model PATH [--steps 20] [--samples 6] [--learning_rate 1e-5]

`step` is the inner step of online DPO. The answers come from the policy itself, so their ranking is new in each step;
one forward pass packs all of them behind their prompts, and the reference runs over the same batch. The reward here is
a toy (the share of even token ids in an answer): put a reward model, a verifier or a person in its place.
"""

import argparse
import copy

import torch

import fastdpo

COLLATOR = fastdpo.PreferenceCollator()


def reward(completion):
    return sum(token % 2 == 0 for token in completion) / len(completion)


def sample(model, prompt, count, max_new_tokens):
    """`count` answers of the policy to a prompt (token ids), each ended by the end-of-text token or by length."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, num_return_sequences=count,
        max_new_tokens=max_new_tokens, pad_token_id=0,
    )  # fmt: skip
    answers = out[:, len(prompt) :].tolist()
    end = model.generation_config.eos_token_id
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]


def ranked_row(prompt, answers):
    """A row of the answers from best to worst; of those with the same reward one. None where all have the same."""
    by_reward = {reward(answer): answer for answer in answers}
    best_first = [by_reward[score] for score in sorted(by_reward, reverse=True)]
    return {"prompt_ids": prompt, "completions_ids": best_first} if len(best_first) > 1 else None


def step(model, reference, optimizer, prompts, samples, max_new_tokens=8):
    """One step; returns the mean reward of the samples that it learnt from."""
    answers = [sample(model, prompt, samples, max_new_tokens) for prompt in prompts]
    rows = [row for row in map(ranked_row, prompts, answers) if row is not None]
    if rows:
        batch = COLLATOR(rows).to(model.device)
        with torch.no_grad():
            ref_logps = fastdpo.sequence_logps(reference, batch)
        fastdpo.batch_loss(model, batch, ref_logps, loss_type="listwise", beta=0.1).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rewards = [reward(answer) for some in answers for answer in some]
    return sum(rewards) / len(rewards)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    options = parser.parse_args(arguments)

    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    rewards = []
    for number in range(options.steps):
        prompts = torch.randint(3, vocabulary, (4, 5), generator=generator).tolist()
        rewards.append(step(model, reference, optimizer, prompts, options.samples))
        print(f"step {number + 1}: mean reward {rewards[-1]:.3f}")
    return rewards


if __name__ == "__main__":
    main()
