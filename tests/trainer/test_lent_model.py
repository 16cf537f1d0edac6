"""The model after training and evaluation: it computes what it did before, under the same calls."""

import copy
import io
import json

import pytest
import torch
from processes import run_script
from reward_models import tiny_reward_model
from tiny import random_rows, tiny_model, word_tokenizer
from trainer_runs import losses_of, trainer
from transformers import AutoModelForCausalLM

import fastdpo
from fastdpo import KTOConfig, KTOTrainer, PreferenceCollator, RewardConfig, RewardTrainer, sequence_logps
from fastdpo.reference import ReferenceCache, model_fingerprint

_IGNORED = ("_parameters", "_buffers", "_modules", "config", "generation_config", "model_tags", "_is_hf_initialized")


def state_of(model):
    """All that the modules hold beside their tensors."""
    state = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key in _IGNORED or isinstance(value, torch.Tensor):
                continue
            state[name, key] = list(value) if isinstance(value, dict | set) else str(value)
    known = model.config.to_dict()
    settings = {key: known[key] for key in known if key not in ("pad_token_id", "architectures", "dtype")}
    return state, settings, model.config._attn_implementation


def eager_model(seed=0):
    """With the attention that gives attention weights."""
    made = tiny_model(seed=seed).config
    made._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    model.load_state_dict(tiny_model(seed=seed).state_dict())
    return model


def used(kind, tmp_path, what, **options):
    """A model, before and after."""
    model = tiny_reward_model() if kind == "reward" else eager_model()
    before = state_of(model)
    if kind == "reward":
        args = RewardConfig(str(tmp_path), **vars_of(tmp_path, options))
        run = RewardTrainer(model, args=args, train_dataset=random_rows(8), processing_class=word_tokenizer())
    elif kind == "kto":
        args = KTOConfig(str(tmp_path), **vars_of(tmp_path, options))
        run = KTOTrainer(model, args=args, train_dataset=random_rows(8), processing_class=word_tokenizer())
    else:
        run = trainer(tmp_path, model, random_rows(8), max_steps=2, eval_dataset=random_rows(4), **options)
    if what == "train":
        run.train()
    elif what == "evaluate":
        run.evaluate(random_rows(4))
    return model, before, run


def vars_of(tmp_path, options):
    base = {"max_steps": 2, "use_cpu": True, "report_to": [], "bf16": False, "per_device_train_batch_size": 4}
    return base | {"disable_tqdm": True} | options


@pytest.mark.parametrize(
    "kind, what, bf16",
    [
        *((kind, "train", True) for kind in ("dpo", "kto", "reward")),
        *(("dpo", "train", False), ("dpo", "evaluate", True), ("dpo", "construct", True)),
        *(("kto", "evaluate", True), ("kto", "construct", False)),
        *(("reward", "evaluate", False), ("reward", "construct", True)),
    ],
)
def test_the_model_is_left_as_it_was(tmp_path, kind, what, bf16):
    model, before, _ = used(kind, tmp_path, what, bf16=bf16, neftune_noise_alpha=5.0)
    after = state_of(model)
    for name in (0, 1, 2):
        assert after[name] == before[name]


def test_the_model_is_left_as_it_was_by_a_training_that_failed(tmp_path):
    model = eager_model()
    before = state_of(model)
    run = trainer(tmp_path, model, bf16=True, neftune_noise_alpha=5.0)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    run._clip_grad_norm = run._get_grad_norm = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train()
    assert state_of(model) == before


def test_calls_of_a_trained_model(tmp_path):
    """Attention weights, copies, pickling and generation, and log-probs in float32."""
    model, _, run = used("dpo", tmp_path, "train", bf16=True)
    rows = random_rows(4)
    ids = torch.tensor([rows[0]["prompt_ids"]])
    logits = model(ids).logits
    assert logits.dtype == torch.float32
    plain = tiny_model()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    for copied in (copy.deepcopy(model), pickled(model)):
        assert torch.equal(copied(ids).logits, logits)
    attentions = model(ids, output_attentions=True).attentions
    assert attentions[0] is not None and attentions[0].shape[-1] == ids.shape[1]
    batch = PreferenceCollator()(rows)
    expected = sequence_logps(plain, batch)
    torch.testing.assert_close(sequence_logps(model, batch), expected, rtol=1e-4, atol=1e-3)
    later = trainer(tmp_path / "later", model, rows, max_steps=1)  # float32
    later.train()
    cache = ReferenceCache(tmp_path / "cache", model_fingerprint(model))
    fastdpo.precompute(model, rows, cache)
    assert len(cache) == 8
    assert run.evaluate()["eval_loss"] > 0  # the first trainer goes on


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_gradients_without_checkpointing_leave_the_attention(tmp_path):
    model = eager_model()
    loss = fastdpo.batch_loss(model, PreferenceCollator()(random_rows(2)), torch.zeros(4)).loss
    assert model.config._attn_implementation == "eager"
    loss.backward()
    with torch.no_grad():
        sequence_logps(model, PreferenceCollator()(random_rows(2)))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("first", [False, True])
def test_a_second_trainer_has_the_precision_it_asks_for(tmp_path, first):
    """Policy and reference start at one another: in bfloat16, and in float32, whatever ran before."""
    rows, curves = random_rows(8), []
    for second in (False, True):
        model = tiny_model()
        weights = copy.deepcopy(model.state_dict())
        trainer(tmp_path / f"{second} 1", model, rows, max_steps=1, bf16=first).train()
        model.load_state_dict(weights)
        run = trainer(tmp_path / f"{second} 2", model, rows, max_steps=3, bf16=second)
        run.train()
        fresh = trainer(tmp_path / f"{second} 3", tiny_model(), rows, max_steps=3, bf16=second)
        fresh.train()
        curves.append(losses_of(run))
        assert losses_of(run) == losses_of(fresh)
        assert losses_of(run)[0] == pytest.approx(0.693147, abs=1e-5)
    assert curves[0] != curves[1]


def test_a_model_that_another_trainer_left_in_autocast(tmp_path):
    """As transformers.Trainer leaves it: with accelerate's autocast around its forward."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the trainer of a test before this one
    model = tiny_model()
    rows = random_rows(8)
    wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert wrapped is model and "_original_forward" in model.__dict__
    run = trainer(tmp_path, model, rows, max_steps=2)
    run.train()
    fresh = trainer(tmp_path / "fresh", tiny_model(), rows, max_steps=2)
    fresh.train()
    assert losses_of(run) == losses_of(fresh)


# Noise on the embeddings


class Watched:
    """The noise of a run, which notes how large it was in each pass."""

    def __init__(self, noise):
        self.noise, self.widths = noise, []

    def __setattr__(self, name, value):
        if name == "longest":
            self.noise.longest = value
        super().__setattr__(name, value)

    def __call__(self, module, args, output):
        changed = self.noise(module, args, output)
        if module.training:
            self.widths.append(float((changed - output).detach().abs().max()))
        return changed

    def on(self, model):
        return type(self.noise).on(self, model)


@pytest.mark.parametrize("packing, budget", [("prefix", None), ("prefix", 60), ("varlen", 60), ("padded", None)])
def test_the_noise_of_embeddings_does_not_depend_on_the_packing(tmp_path, packing, budget):
    """Half-width alpha / sqrt(L * D), L that of the batch's longest sequence, as in a padded batch."""
    short, long = random_rows(4, seed=4, prompt=(1, 4), answer=(1, 4)), random_rows(4, seed=5, prompt=(20, 30))
    run = trainer(
        tmp_path, rows=short + long, packing=packing, max_steps=2, neftune_noise_alpha=5.0,
        train_sampling_strategy="sequential", max_tokens_per_microbatch=budget,
    )  # fmt: skip
    watched = run._noise = Watched(run._noise)
    run.train()
    expected = []
    for batch in (short, long):
        sides = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in batch]
        longest = max(len(row["prompt_ids"]) + side for row, side in zip(batch, sides, strict=True))
        expected.append(5.0 / (longest * 32) ** 0.5)
    assert expected[0] > 1.5 * expected[1]
    first, last = watched.widths[0], watched.widths[-1]
    for width, half in ((first, expected[0]), (last, expected[1])):  # the largest of hundreds of uniform draws
        assert 0.95 * half < width <= half
    assert len(watched.widths) > 2 if budget else len(watched.widths) == 2


def test_a_noisy_training_runs_and_ends(tmp_path):
    quiet, loud = (trainer(tmp_path / str(a), neftune_noise_alpha=a, max_steps=2) for a in (None, 5.0))
    quiet.train(), loud.train()
    assert losses_of(quiet) != losses_of(loud)
    assert not loud.model.get_input_embeddings()._forward_hooks


# Workers of data loaders


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ends", "fails", "evaluates"])
def test_a_program_with_persistent_workers_ends(tmp_path, how):
    run_script("tests/trainer/workers_run.py", tmp_path, how, folder=tmp_path)
    assert json.loads((tmp_path / "done.json").read_text()) == how
