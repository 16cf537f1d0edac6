"""The reference of a run, whatever the policy is: against plain loops over sequences run alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from drawing import in_turn, pairwise
from tiny import naive_sequence_logps, random_rows, tiny_model
from trainer_runs import losses_of, trainer
from transformers import TrainerCallback, set_seed

from fastdpo.types import UserError

peft = pytest.importorskip("peft")

STEPS = 4
RUN = {
    "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1.0, "max_steps": STEPS, "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
}  # fmt: skip
ROWS = random_rows(4 * STEPS, seed=1, prompt=(2, 12))
HOW = pytest.mark.parametrize("how", ["online", pytest.param("cache", marks=pytest.mark.slow)])


def lora(**options):
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options))


def learnt(model=None, name="default", seed=3, **options):
    """A PeftModel whose adapter gives something else than its base."""
    torch.manual_seed(seed)
    made = peft.get_peft_model(tiny_model() if model is None else model, lora(**options), adapter_name=name)
    with torch.no_grad():
        for value in made.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    return made


def plain_loop(policy, frozen, rows=ROWS, beta=0.1, after=None):
    """DPO written out: SGD with clipped gradients; the losses of the steps. `after(step)` follows each."""
    trained = [value for value in policy.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RUN["learning_rate"])
    losses = []
    for first in range(0, len(rows), 4):
        batch = rows[first : first + 4]
        with torch.no_grad():
            ref_chosen, ref_rejected = naive_sequence_logps(frozen, batch).view(2, -1)
        chosen, rejected = naive_sequence_logps(policy, batch).view(2, -1)
        margins = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        loss = -torch.nn.functional.logsigmoid(margins).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, RUN["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
        if after is not None:
            after(first // 4 + 1)
    return losses


def values_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same_run(run, plain, frozen, after=None):
    """Trains both, and compares losses and the way of all weights; `plain` is a copy of the policy at the start."""
    start = values_of(plain)
    trained = {name for name, value in plain.named_parameters() if value.requires_grad}
    run.train()
    expected = plain_loop(plain, frozen, after=after)
    assert losses_of(run) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    ours, theirs = values_of(run.model), values_of(plain)
    moved = torch.cat([(theirs[name] - start[name]).flatten() for name in sorted(trained)])
    assert moved.norm() > 1e-3
    off = torch.cat([(ours[name] - theirs[name]).flatten() for name in sorted(trained)])
    assert off.norm() <= 1e-3 * moved.norm()
    for name in start.keys() - trained:
        assert ours[name].equal(start[name]), f"{name} was to stay as it is"


def run_of(tmp_path, model, how="online", **options):
    return trainer(tmp_path, model, ROWS, precompute_ref_log_probs=how == "cache", **(RUN | options))


# Without adapters


@HOW
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_initial_weights(tmp_path, how, kind):
    model = tiny_model(kind)
    run = run_of(tmp_path, model, how)
    assert run._reference.kind == ("copy" if how == "online" else "initial")
    assert_same_run(run, tiny_model(kind), tiny_model(kind))
    if how == "online":
        assert not any(value.requires_grad for value in run.ref_model.parameters())
        assert all(a.equal(b) for a, b in zip(run.ref_model.parameters(), tiny_model(kind).parameters(), strict=True))


@HOW
def test_an_explicit_model(tmp_path, how):
    other = tiny_model(seed=7, num_hidden_layers=1)
    run = run_of(tmp_path, tiny_model(), how, ref_model=other)
    assert run._reference.kind == "explicit"
    assert_same_run(run, tiny_model(), copy.deepcopy(other))


def test_weights_that_were_frozen_stay_so(tmp_path):
    def made():
        model = tiny_model(tie_word_embeddings=False)
        model.model.layers[0].requires_grad_(False)
        return model

    assert_same_run(run_of(tmp_path, made()), made(), made())


# Adapters


NEW = {
    "lora": {},
    "random": {"init_lora_weights": False},
    "all linear": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "dora, random": {"use_dora": True, "init_lora_weights": False},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "norms": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("name, how", in_turn(NEW, ["online", "cache"]))
def test_a_new_adapter_is_switched_off(tmp_path, how, name):
    run = run_of(tmp_path, tiny_model(), how, peft_config=lora(**NEW[name]))
    assert run._reference.kind == "adapters off" and run.ref_model is None
    assert list(run.model.peft_config) == ["default"]
    assert_same_run(run, copy.deepcopy(run.model), tiny_model())


@HOW
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_head_that_is_trained_whole(tmp_path, how, tied):
    base = tiny_model(tie_word_embeddings=tied)
    frozen = copy.deepcopy(base)
    run = run_of(tmp_path, base, how, peft_config=lora(modules_to_save=["lm_head"]))
    assert_same_run(run, copy.deepcopy(run.model), frozen)


KINDS = {
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("given", ["config", "model"])
@pytest.mark.parametrize("name", KINDS)
def test_other_adapters_of_weights(tmp_path, name, given):
    """Given as a config, or as a PeftModel, whose adapter is copied unless it is known to have learnt nothing."""
    set_seed(42)
    base = tiny_model()
    if given == "config":
        run = run_of(tmp_path, base, peft_config=KINDS[name]())
        assert_same_run(run, copy.deepcopy(run.model), tiny_model())
        return
    model = peft.get_peft_model(base, KINDS[name]())
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    plain, frozen = copy.deepcopy(model), copy.deepcopy(model)
    assert_same_run(run_of(tmp_path, model), plain, frozen)


LEARNT = {
    "lora": {},
    "named": {"name": "tuned"},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"], "model": {"tie_word_embeddings": False}},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "rank-stabilized": {"use_rslora": True},
    "some layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("name, how", in_turn(LEARNT, ["online", "cache"]))
def test_an_adapter_that_has_learnt_something_is_copied(tmp_path, how, name):
    options = dict(LEARNT[name])
    model = learnt(tiny_model(**options.pop("model", {})), **options)
    own = model.active_adapters[0]
    plain, frozen = copy.deepcopy(model), copy.deepcopy(model)
    run = run_of(tmp_path, model, how)
    assert run.ref_model is None
    assert list(run.model.peft_config) == ([own, "ref"] if how == "online" else [own])
    assert_same_run(run, plain, frozen)
    assert run.model.active_adapters == [own]
    optimized = {id(value) for group in run.optimizer.param_groups for value in group["params"]}
    for name, value in run.model.named_parameters():
        if ".ref." in name or name.endswith(".ref"):
            assert not value.requires_grad and value.grad is None and id(value) not in optimized
            before = dict(frozen.named_parameters())[name.replace(".ref", f".{own}")]
            assert value.equal(before), name


def test_what_is_saved_of_a_policy_with_a_copied_adapter_is_the_policy(tmp_path):
    from peft import PeftModel

    run = run_of(tmp_path, learnt())
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    ids = torch.tensor([[4, 5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, run.model(ids).logits)
    assert not (tmp_path / "saved" / "ref").exists()


def test_a_run_with_a_copied_adapter_resumes(tmp_path):
    curves = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-2")):
        run = run_of(tmp_path, learnt(), save_strategy="steps", save_steps=2)
        run.train(resume_from_checkpoint=resume)
        curves.append((losses_of(run), values_of(run.model)))
    assert curves[0][0] == curves[1][0]
    for name, value in curves[0][1].items():
        assert value.equal(curves[1][1][name]), name


@HOW
def test_an_adapter_that_has_learnt_nothing_is_not_copied(tmp_path, how):
    model = peft.get_peft_model(tiny_model(), lora(modules_to_save=["norm"]))
    plain = copy.deepcopy(model)
    run = run_of(tmp_path, model, how)
    assert run._reference.kind == "adapters off" and list(run.model.peft_config) == ["default"]
    assert_same_run(run, plain, tiny_model())


@pytest.mark.parametrize(
    "how, start, given", pairwise(["online", "cache"], ["pissa", "pissa_niter_4", "olora"], ["config", "model"])
)
def test_an_adapter_that_changes_its_base(tmp_path, how, start, given):
    """The policy is at first what the model was, and its base alone is not."""
    if given == "config":
        run = run_of(tmp_path, tiny_model(), how, peft_config=lora(init_lora_weights=start))
    else:
        torch.manual_seed(0)
        run = run_of(tmp_path, peft.get_peft_model(tiny_model(), lora(init_lora_weights=start)), how)
    with torch.no_grad():
        first = naive_sequence_logps(run.model, ROWS)
    torch.testing.assert_close(first, naive_sequence_logps(tiny_model(), ROWS), rtol=1e-3, atol=1e-3)
    plain, frozen = copy.deepcopy(run.model), tiny_model()
    assert_same_run(run, plain, frozen)
    assert losses_of(run)[0] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize("kind", ["new", "learnt"])
def test_biases_that_are_trained_beside_the_adapter(tmp_path, kind):
    """bias="all" trains the base's own biases: switching the adapter off brings the old ones not back. Right or refused
    in words."""
    base = tiny_model(attention_bias=True)
    with torch.no_grad():
        for name, value in base.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    model = learnt(base, bias="all") if kind == "learnt" else base
    frozen = copy.deepcopy(model)
    try:
        run = run_of(tmp_path, model, peft_config=lora(bias="all") if kind == "new" else None)
    except ValueError as error:
        assert "bias" in str(error)
        return
    assert_same_run(run, copy.deepcopy(run.model), frozen)


@HOW
@pytest.mark.parametrize("kind", ["new", "learnt"])
def test_what_was_frozen_of_an_adapter_stays_so(tmp_path, how, kind):
    """LoRA-FA, say, trains only the second factors."""
    model = learnt() if kind == "learnt" else peft.get_peft_model(tiny_model(), lora())
    for name, value in model.named_parameters():
        if "lora_A" in name:
            value.requires_grad_(False)
    plain, frozen = copy.deepcopy(model), copy.deepcopy(model)
    run = run_of(tmp_path, model, how)
    trained = {name for name, value in plain.named_parameters() if value.requires_grad}
    assert {name for name, value in run.model.named_parameters() if value.requires_grad} == trained
    assert_same_run(run, plain, frozen)
    assert {name for name, value in run.model.named_parameters() if value.requires_grad} == trained


def test_tokens_that_are_trained_alone(tmp_path):
    """trainable_token_indices: with a tied head, the tokens' rows of the head move, too."""
    for tied in (False, True):
        base = tiny_model(tie_word_embeddings=tied)
        frozen = copy.deepcopy(base)
        try:
            run = run_of(tmp_path, base, peft_config=lora(trainable_token_indices=[5, 6, 7]))
        except UserError as error:
            assert "head" in str(error) and tied
            continue
        assert_same_run(run, copy.deepcopy(run.model), frozen)


@pytest.mark.parametrize("second", ["ref", "other"])
def test_a_second_adapter_that_is_not_active(tmp_path, second):
    model = learnt()
    torch.manual_seed(9)
    model.add_adapter(second, lora(init_lora_weights=False))
    model.set_adapter("default")
    plain, frozen, before = copy.deepcopy(model), copy.deepcopy(model), values_of(model)
    try:
        run = run_of(tmp_path, model)
    except ValueError as error:
        assert second == "ref" and "ref" in str(error)
        return
    assert_same_run(run, plain, frozen)
    for name, value in run.model.named_parameters():
        if f".{second}." in name:
            assert value.equal(before[name]), name


def test_two_adapters_that_are_active_together(tmp_path):
    model = learnt()
    torch.manual_seed(9)
    model.add_adapter("second", lora(init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    plain, frozen = copy.deepcopy(model), copy.deepcopy(model)
    try:
        run = run_of(tmp_path, model)
    except ValueError as error:
        assert "adapters" in str(error) and "second" in str(error)
        return
    assert_same_run(run, plain, frozen)


def test_adapters_with_dropout(tmp_path):
    """Off in the reference, where it is left on in the policy."""
    run = run_of(tmp_path, tiny_model(), peft_config=lora(lora_dropout=0.5), disable_dropout=False)
    run.train()
    assert losses_of(run)[0] == pytest.approx(0.693147, abs=1e-5)  # what is dropped is 0
    run = run_of(tmp_path, learnt(lora_dropout=0.5), disable_dropout=False, logging_steps=STEPS)
    seen, reference = [], run._online_reference
    run._online_reference = lambda batch: seen.append(batch) or [reference(batch), reference(batch)][0]
    first = reference(run.data_collator(ROWS[:4]))
    torch.testing.assert_close(first, reference(run.data_collator(ROWS[:4])), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(first, naive_sequence_logps(learnt().eval(), ROWS[:4]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["explicit", "copied"])
def test_references_under_gradient_checkpointing(tmp_path, kind):
    model = learnt()
    plain = copy.deepcopy(model)
    other = tiny_model(seed=2) if kind == "explicit" else None
    frozen = copy.deepcopy(model) if other is None else copy.deepcopy(other)
    assert_same_run(run_of(tmp_path, model, gradient_checkpointing=True, ref_model=other), plain, frozen)


TIED = {
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("name, state, tied", pairwise(list(TIED), ["new", "learnt"], [True, False]))
def test_embeddings_and_head_that_are_trained_whole(tmp_path, name, state, tied):
    """Of a PeftModel; the original head of tied weights is no parameter of its own."""
    base = tiny_model(tie_word_embeddings=tied)
    model = learnt(base, **TIED[name]) if state == "learnt" else peft.get_peft_model(base, lora(**TIED[name]))
    plain, frozen = copy.deepcopy(model), copy.deepcopy(model)
    run = run_of(tmp_path, model)
    assert run._reference.kind == ("adapters off" if state == "new" else "adapter copy")
    assert_same_run(run, plain, frozen)


def lora_b(model):
    return [value for name, value in model.named_parameters() if "lora_B" in name]


@pytest.mark.parametrize("part", ["trainable_tokens_delta", "lora_magnitude_vector", "modules_to_save"])
def test_what_else_than_the_second_factors_has_learnt(tmp_path, part):
    """Its second factors are still zero, and the base is not the policy any more."""
    options = {
        "trainable_tokens_delta": {"trainable_token_indices": [5, 6, 7]},
        "lora_magnitude_vector": {"use_dora": True},
        "modules_to_save": {"modules_to_save": ["norm"]},
    }[part]
    model = learnt(tiny_model(tie_word_embeddings=False), **options)
    with torch.no_grad():
        for value in lora_b(model):
            value.zero_()
    plain, frozen = copy.deepcopy(model), copy.deepcopy(model)
    run = run_of(tmp_path, model)
    assert run._reference.kind == "adapter copy"
    assert_same_run(run, plain, frozen)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"trainable_token_indices": [5, 6, 7]}], ids=["dora", "tokens"]
)
def test_what_else_has_learnt_nothing(tmp_path, options):
    model = peft.get_peft_model(tiny_model(tie_word_embeddings=False), lora(**options))
    plain = copy.deepcopy(model)
    run = run_of(tmp_path, model)
    assert run._reference.kind == "adapters off"
    assert_same_run(run, plain, tiny_model(tie_word_embeddings=False))


@HOW
def test_an_adapter_whose_scaling_was_set_at_run_time(tmp_path, how):
    model = learnt()
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 3
    plain, frozen = copy.deepcopy(model), copy.deepcopy(model)
    assert_same_run(run_of(tmp_path, model, how), plain, frozen)


def test_an_adapter_named_like_a_module(tmp_path):
    model = learnt(name="layers")
    plain, frozen = copy.deepcopy(model), copy.deepcopy(model)
    assert_same_run(run_of(tmp_path, model), plain, frozen)


@pytest.mark.parametrize("state", ["new", "learnt"])
@pytest.mark.parametrize("part", ["norm", "embed_tokens"])
def test_what_is_trained_beside_the_adapters(tmp_path, part, state):
    """The base without adapters moves then: no reference online, and ahead only as long as it stands still."""

    def made():
        model = learnt() if state == "learnt" else peft.get_peft_model(tiny_model(), lora())
        for name, value in model.named_parameters():
            if f".{part}." in name:
                value.requires_grad_(True)
        return model

    with pytest.raises(
        UserError, match=rf"{part}.weight would be trained beside the adapters.*precompute_ref_log_probs"
    ):
        run_of(tmp_path, made())
    plain, frozen = made(), copy.deepcopy(made())
    run = run_of(tmp_path, made(), "cache")
    assert_same_run(run, plain, frozen)
    with pytest.raises(ValueError, match="cannot be computed any more"):
        run.evaluate(random_rows(4, seed=9))


@pytest.mark.parametrize("how", ["base model", "shallow copy", "same head"])
def test_a_reference_that_shares_what_is_trained(tmp_path, how):
    model = tiny_model() if how != "base model" else learnt()
    if how == "base model":
        other = model.get_base_model()
    elif how == "shallow copy":
        other = copy.copy(model)
    else:
        other = tiny_model(seed=4)
        other.model.layers[0] = model.model.layers[0]
    with pytest.raises(UserError, match=r"ref_model and the model share .* which is trained"):
        run_of(tmp_path, model, ref_model=other)


def test_a_reference_that_shares_what_stays_frozen(tmp_path):
    def made():
        model = tiny_model(tie_word_embeddings=False)
        model.model.embed_tokens.requires_grad_(False)
        return model

    model, other = made(), tiny_model(seed=4, tie_word_embeddings=False)
    other.model.embed_tokens.weight = model.model.embed_tokens.weight
    frozen = copy.deepcopy(other)
    assert_same_run(run_of(tmp_path, model, ref_model=other), made(), frozen)


# What is refused


@pytest.mark.parametrize("given", ["config", "model"])
def test_adapters_that_look_for_tokens_in_the_row(tmp_path, given):
    config = lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    model = tiny_model() if given == "config" else peft.get_peft_model(tiny_model(), config)
    with pytest.raises(UserError, match="the adapter 'default' looks for its invocation tokens in each row"):
        run_of(tmp_path, model, peft_config=config if given == "config" else None)


def test_an_adapter_on_the_head(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"there is an adapter on the model's head.*modules_to_save"):
        run_of(tmp_path, model, peft_config=lora(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UserError, match=r"there is an adapter on the model's head"):
        run_of(tmp_path, learnt(tiny_model(tie_word_embeddings=False), target_modules=["lm_head"]))


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=["prompt", "prefix"],
)
def test_virtual_tokens(tmp_path, config):
    with pytest.raises(UserError, match="puts virtual tokens before every sequence"):
        run_of(tmp_path, tiny_model(), peft_config=config)


def test_adapters_upon_adapters_and_what_is_no_config(tmp_path):
    with pytest.raises(ValueError, match="the model has adapters, and peft_config would put one more"):
        run_of(tmp_path, learnt(), peft_config=lora())
    with pytest.raises(ValueError, match="peft_config is dict; it must be a peft config"):
        run_of(tmp_path, tiny_model(), peft_config={"r": 4})


# QLoRA


def four_bit(model):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                four = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                four.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                four.support_avx512bf16_for_cpu = False  # its CPU product for evaluation, in bfloat16
                setattr(parent, name, four.to("cpu"))
    return model


@HOW
@pytest.mark.parametrize("kind", ["new", "learnt"])
def test_adapters_on_four_bit_weights(tmp_path, how, kind):
    base = four_bit(tiny_model(hidden_size=64, intermediate_size=128))
    frozen = copy.deepcopy(base)
    if kind == "new":
        run = run_of(tmp_path, base, how, peft_config=lora())
        plain = copy.deepcopy(run.model)
    else:
        model = learnt(base)
        plain, frozen = copy.deepcopy(model), copy.deepcopy(model)
        run = run_of(tmp_path, model, how)
    assert_same_run(run, plain, frozen)


# A reference that moves


@pytest.mark.parametrize("every, share", [(1, 0.6), (2, 0.6), (3, 1.0), (2, 0.0)])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_moving_reference(tmp_path, every, share, explicit):
    """alpha * policy + (1 - alpha) * reference after every so many steps, and at no other time."""
    other = tiny_model(seed=5) if explicit else None
    run = run_of(
        tmp_path, tiny_model(), sync_ref_model=True, ref_model_sync_steps=every, ref_model_mixup_alpha=share,
        ref_model=other,
    )  # fmt: skip
    seen = [(values_of(run.model), values_of(run.ref_model))]

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((values_of(run.model), values_of(run.ref_model)))

    run.add_callback(Looks())
    plain, frozen = tiny_model(), tiny_model(seed=5) if explicit else tiny_model()

    def move(step):
        if step % every == 0:
            with torch.no_grad():
                for mine, theirs in zip(frozen.parameters(), plain.parameters(), strict=True):
                    mine.copy_(share * theirs + (1 - share) * mine)

    assert_same_run(run, plain, frozen, after=move)
    for step in range(1, STEPS + 1):
        for name, before in seen[step - 1][1].items():
            now, policy = seen[step][1][name], seen[step][0][name]
            if step % every:
                assert now.equal(before)
            else:
                mixed = share * policy.double() + (1 - share) * before.double()
                torch.testing.assert_close(now.double(), mixed, rtol=1e-6, atol=1e-7)
                assert share != 1.0 or now.equal(policy)


def test_moving_references_that_cannot_be(tmp_path):
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 2}
    with pytest.raises(ValueError, match=r"sync_ref_model=True mixes whole weights.*without PEFT"):
        run_of(tmp_path, tiny_model(), peft_config=lora(), **sync)
    with pytest.raises(ValueError, match="sync_ref_model=True mixes whole weights"):
        run_of(tmp_path, learnt(), **sync)
    rows = [{**row, "ref_chosen_logps": -9.0, "ref_rejected_logps": -9.0} for row in ROWS]
    with pytest.raises(ValueError, match="sync_ref_model=True moves the reference, and the rows carry its sums"):
        trainer(tmp_path, rows=rows, **(RUN | sync))
    with pytest.raises(ValueError, match="sync_ref_model=True moves the reference, and the rows carry its sums"):
        trainer(tmp_path, rows=ROWS, eval_dataset=rows, **(RUN | sync))


@pytest.mark.parametrize("other", ["layers", "wider", "peft"])
def test_a_reference_of_another_shape_cannot_move(tmp_path, other):
    """Told at the start, not in the step in which it should move."""
    made = {
        "layers": lambda: tiny_model(num_hidden_layers=1),
        "wider": lambda: tiny_model(hidden_size=64),
        "peft": learnt,
    }[other]()
    with pytest.raises(ValueError, match="sync_ref_model"):
        run_of(tmp_path, tiny_model(), ref_model=made, sync_ref_model=True, ref_model_sync_steps=STEPS)


# None at all


def test_no_reference(tmp_path):
    run = run_of(tmp_path, tiny_model(), reference_free=True)
    assert run.ref_model is None and run._reference.kind == "initial"

    class Zero(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            chances = torch.full((*input_ids.shape, 97), -torch.inf)
            chances[0, torch.arange(input_ids.shape[1] - 1), input_ids[0, 1:]] = 0.0
            return SimpleNamespace(logits=chances)

    assert_same_run(run, tiny_model(), Zero())
