"""DPOTrainer against a plain loop written from the formulas, and what its constructor refuses."""

import copy
import json

import pytest
import torch
from tiny import naive_sequence_logps, random_rows, tiny_model, word_tokenizer
from trainer_runs import config, losses_of, trainer

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.types import DataError, UserError


def plain_loop(model, batches, refs_of, beta=0.1, lr=1e-3):
    """DPO written out: every sequence run alone, log-sigmoid of the margin, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for batch in batches:
        chosen, rejected = naive_sequence_logps(model, batch).view(2, -1)
        ref_chosen, ref_rejected = refs_of(batch).view(2, -1)
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        loss = -torch.nn.functional.logsigmoid(margin).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reference", ["online", "precomputed", "explicit"])
@pytest.mark.parametrize("packing", ["auto", "padded"])
def test_the_curve_is_that_of_a_plain_loop(tmp_path, reference, packing):
    model, other = tiny_model(), tiny_model(seed=7)
    frozen = copy.deepcopy(other if reference == "explicit" else model)
    start = copy.deepcopy(model)
    seen = []
    run = trainer(
        tmp_path, model, packing=packing, gradient_checkpointing=packing == "auto",
        precompute_ref_log_probs=reference == "precomputed", ref_model=other if reference == "explicit" else None,
    )  # fmt: skip
    collate = run.data_collator
    run.data_collator = lambda rows: seen.append(rows) or collate(rows)
    run.train()
    assert run.packing == ("prefix" if packing == "auto" else "padded")

    def refs_of(batch):
        with torch.no_grad():
            return naive_sequence_logps(frozen, batch)

    expected = plain_loop(start, seen[:5], refs_of)
    assert losses_of(run) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(set(map(str, expected))) == 5 and expected[-1] != expected[0]
    for ours, plain in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-5)


def test_accumulated_steps_equal_one_large_batch(tmp_path):
    """Also where the last batch of a step is smaller: every pair counts the same."""
    rows = random_rows(10, seed=3)
    runs = {}
    for name, size, accumulate in (("large", 10, 1), ("accumulated", 4, 3)):
        model = tiny_model()
        run = trainer(
            tmp_path, model, rows, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, max_steps=1
        )
        run.train()
        runs[name] = (losses_of(run), model)
    assert runs["large"][0] == pytest.approx(runs["accumulated"][0], rel=1e-5)
    for a, b in zip(runs["large"][1].parameters(), runs["accumulated"][1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_metrics_have_their_names_and_values(tmp_path):
    rows = random_rows(4, seed=5)
    model = tiny_model()
    with torch.no_grad():
        chosen, rejected = naive_sequence_logps(model, rows).view(2, -1)
    run = trainer(tmp_path, model, rows, max_steps=1, eval_dataset=rows[:3])
    run.train()
    (logs,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert logs["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert logs["logps/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-5)
    assert logs["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert logs["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert logs["num_tokens"] == sum(
        2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows
    )
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logits/chosen", "logits/rejected",
                 "entropy", "mean_token_accuracy"):  # fmt: skip
        assert name in logs
    shared = 1 - sum(sum(map(len, r.values())) for r in rows) / logs["num_tokens"]
    assert logs["perf/saved_tokens_fraction"] == pytest.approx(shared)
    for name in ("tokens_per_second", "pairs_per_second", "peak_memory_gb", "mfu"):
        assert logs[f"perf/{name}"] > 0
    results = run.evaluate()
    assert {"eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen"} <= set(results)
    assert results["eval_rewards/margins"] > 0  # one step on these very pairs


def test_evaluation_weighs_pairs_not_batches(tmp_path):
    rows = random_rows(5, seed=8)
    model = tiny_model()
    run = trainer(tmp_path, model, rows, eval_dataset=rows, per_device_eval_batch_size=4, max_steps=1)
    run.train()
    means = [run.evaluate(part)["eval_rewards/margins"] for part in (rows[:4], rows[4:])]
    assert run.evaluate()["eval_rewards/margins"] == pytest.approx((4 * means[0] + means[1]) / 5, rel=1e-4)


@pytest.mark.parametrize("precompute", [False, True])
def test_lora_takes_its_base_as_reference_and_the_frozen_head(tmp_path, precompute):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    base = copy.deepcopy(model)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    rows = random_rows(4)
    run = trainer(tmp_path, model, rows, peft_config=lora, precompute_ref_log_probs=precompute, max_steps=1)
    assert run.ref_model is None
    run.train()
    with torch.no_grad():
        reference = naive_sequence_logps(base, rows)
    (logs,) = [entry for entry in run.state.log_history if "loss" in entry]
    rewards = torch.tensor([logs["rewards/chosen"], logs["rewards/rejected"]])
    logps = torch.tensor([logs["logps/chosen"], logs["logps/rejected"]])
    torch.testing.assert_close(rewards, 0.1 * (logps - reference.view(2, -1).mean(1)), rtol=1e-3, atol=1e-4)
    assert not base.lm_head.weight.requires_grad or model.get_output_embeddings().weight.grad is None


@pytest.mark.parametrize("how", ["online", "precomputed"])
def test_mixed_precision_starts_at_the_reference(tmp_path, how):
    """Policy and reference run in the same arithmetic, so that the first loss is log 2 in bfloat16, too."""
    run = trainer(tmp_path, bf16=True, max_steps=1, precompute_ref_log_probs=how == "precomputed", beta=1.0)
    run.train()
    assert losses_of(run) == pytest.approx([0.693147], abs=2e-3)


def test_a_model_in_bfloat16_trains(tmp_path):
    run = trainer(tmp_path, tiny_model().bfloat16(), random_rows(4), max_steps=8, learning_rate=3e-3)
    run.train()
    assert losses_of(run)[-1] < 0.6


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_data(tmp_path, workers):
    from datasets import IterableDataset

    rows = random_rows(8)
    streamed = IterableDataset.from_generator(lambda: iter(rows))
    run = trainer(tmp_path, rows=streamed, max_steps=3, dataloader_num_workers=0)
    listed = trainer(
        tmp_path, rows=rows, max_steps=3, dataloader_num_workers=workers, train_sampling_strategy="sequential"
    )
    run.train()
    listed.train()
    assert losses_of(run) == pytest.approx(losses_of(listed), rel=1e-5)


def test_dropout_is_off_unless_asked_for(tmp_path):
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    trainer(tmp_path, model)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    model = tiny_model("gpt2", resid_pdrop=0.5)
    trainer(tmp_path, model, disable_dropout=False)
    assert 0.5 in {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}


def test_saved_model_loads_plainly(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    run = trainer(tmp_path, model, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    assert "fastdpo" not in (tmp_path / "saved" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())


def test_resumed_run_ends_where_the_whole_one_does(tmp_path):
    whole = tiny_model()
    trainer(tmp_path, whole, max_steps=6, save_strategy="steps", save_steps=3, precompute_ref_log_probs=True).train()
    resumed = tiny_model()
    trainer(tmp_path, resumed, max_steps=6, precompute_ref_log_probs=True).train(
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3")
    )
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_architecture_that_cannot_pack_falls_back_and_says_so(tmp_path, caplog):
    from transformers import AutoModelForCausalLM, BloomConfig

    bloom = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    run = trainer(tmp_path, AutoModelForCausalLM.from_config(bloom), max_steps=1, precompute_ref_log_probs=True)
    assert run.packing == "padded"
    assert [r.getMessage() for r in caplog.records if "padded" in r.getMessage() and "layers" in r.getMessage()]
    run.train()
    with pytest.raises(UserError, match="cannot serve BloomForCausalLM"):
        trainer(tmp_path, AutoModelForCausalLM.from_config(bloom), packing="prefix")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "simgoid"}, "Did you mean 'sigmoid'"),
        ({"loss_type": ["hinge"], "label_smoothing": 0.1}, "label_smoothing=0.1 has no meaning for loss_type hinge"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"packing": "flat"}, "packing is 'flat'"),
        ({"truncation_mode": "middle"}, "truncation_mode is 'middle'"),
        ({"attention_backend": "xformers"}, "attention_backend is 'xformers'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"memory_budget": 0}, "memory_budget is 0"),
        ({"padding_free": True, "packing": "padded"}, "padding_free=True and packing='padded'"),
        ({"sync_ref_model": True, "ref_logps": "cache"}, "sync_ref_model=True moves the reference"),
        ({"ld_alpha": 1.5}, "ld_alpha is 1.5"),
        ({"use_weighting": True, "loss_type": "aot"}, "use_weighting=True has no meaning for loss_type aot"),
        ({"f_divergence_type": "kl"}, "f_divergence_type is 'kl'"),
        ({"f_divergence_type": "js_divergence", "loss_type": "nca_pair"}, "has no meaning for loss_type nca_pair"),
        ({"loss_type": "exo_pair"}, "for loss_type exo_pair it must be above 0"),
        ({"loss_type": "kto"}, "kto.* is a loss of answers; DPOTrainer trains on pairs and ranked lists"),
        ({"loss_type": "reward"}, "is a loss of scores"),
        ({"reference_free": True, "precompute_ref_log_probs": True}, "contradict each other"),
        ({"loss_options": {"beta": 2.0}}, "loss_options has 'beta', which is a field"),
        ({"loss_options": {"gamma": 2.0}}, "gamma is no option of a loss"),
        ({"loss_options": "gamma"}, "must be a JSON object"),
    ],
)
def test_options_are_refused_when_the_config_is_built(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_defaults_are_those_of_trl(tmp_path):
    made = DPOConfig(output_dir=str(tmp_path))
    assert (made.learning_rate, made.beta, made.max_length, made.loss_type) == (1e-6, 0.1, 1024, ["sigmoid"])
    assert (made.logging_steps, made.gradient_checkpointing) == (10, True)
    assert made.bf16 == torch.cuda.is_available()
    assert (made.precompute_ref_log_probs, made.truncation_mode, made.disable_dropout) == (False, "keep_start", True)
    assert DPOConfig(output_dir=str(tmp_path), fp16=True, use_cpu=True).bf16 is False


def test_bad_data(tmp_path):
    with pytest.raises(DataError, match="train data set, row 1 \\(counted from 0\\): 'chosen' is empty"):
        trainer(
            tmp_path,
            rows=[{"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": "a", "chosen": "", "rejected": "c"}],
        )
    with pytest.raises(DataError, match="data set is empty"):
        trainer(tmp_path, rows=[])
    with pytest.raises(DataError, match="every prompt fills max_length=4"):
        trainer(tmp_path, rows=random_rows(3, prompt=(5, 6)), max_length=4)
    model = tiny_model()
    with pytest.raises(ValueError, match="ref_model is the model itself"):
        trainer(tmp_path, model, ref_model=model)


def test_a_list_may_mix_text_and_messages_and_odd_columns(tmp_path):
    tokenizer = word_tokenizer(chat=True)
    said = {"prompt": ("user", "why"), "chosen": ("assistant", "yes"), "rejected": ("assistant", "no")}
    chat = {name: [{"role": role, "content": content}] for name, (role, content) in said.items()}
    text = {"prompt": "why a", "chosen": " yes", "rejected": " no", "meta": {"id": 1}}
    run = DPOTrainer(
        tiny_model(),
        args=config(tmp_path),
        train_dataset=[chat, text, {**text, "prompt": "why b", "meta": "x"}],
        processing_class=tokenizer,
    )
    assert [len(ids) for ids in run.train_dataset["prompt_ids"]] == [6, 2, 2]
    assert set(run.train_dataset.column_names) == {"prompt_ids", "chosen_ids", "rejected_ids", "row_number"}


def test_a_copy_of_a_trained_model_runs_its_own_weights(tmp_path):
    import pickle

    model = tiny_model()
    trainer(tmp_path, model, max_steps=1, gradient_checkpointing=False).train()
    ids = torch.tensor([[4, 5, 6]])
    expected = model(ids).logits
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(made(ids).logits, expected)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.zero_()
        assert (made(ids).logits == 0).all()
    torch.testing.assert_close(model(ids).logits, expected)
    run = trainer(tmp_path, model, max_steps=1)  # a second trainer on the same model
    run.train()
    assert losses_of(run) == pytest.approx([0.693147], abs=1e-4)


def test_rows_that_do_not_fit_are_left_out_and_counted(tmp_path, caplog):
    rows = [*random_rows(4, prompt=(2, 3)), *random_rows(3, prompt=(9, 9))]
    run = trainer(tmp_path, rows=rows, max_length=9)
    assert len(run.train_dataset) == 4
    assert any("3 of 7 rows of the train data set are left out" in r.getMessage() for r in caplog.records)


def test_older_spellings(tmp_path):
    """Of scripts that were written for older versions of TRL: they work, with a warning that names the new way."""
    with pytest.warns(FutureWarning, match="rpo_alpha is deprecated: mix the losses"):
        mixed = config(tmp_path, rpo_alpha=0.5, max_steps=2)
    assert (mixed.loss_type, mixed.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])
    with pytest.raises(ValueError, match="adds the loss 'sft', which loss_type has"), pytest.warns(FutureWarning):
        config(tmp_path, rpo_alpha=0.5, loss_type=["sigmoid", "sft"])
    rows = random_rows(8, prompt=(6, 9), answer=(5, 9))
    with pytest.warns(FutureWarning, match="max_prompt_length is deprecated"):
        cut = config(tmp_path, max_prompt_length=4, max_completion_length=3, max_steps=1)
    with pytest.warns(FutureWarning, match="tokenizer is deprecated: pass it as processing_class"):
        run = DPOTrainer(tiny_model(), args=cut, train_dataset=rows, tokenizer=word_tokenizer())
    assert run.train_dataset["prompt_ids"][:] == [row["prompt_ids"][-4:] for row in rows]
    assert run.train_dataset["chosen_ids"][:] == [row["chosen_ids"][:3] for row in rows]
    with pytest.raises(ValueError, match="both are given"):
        DPOTrainer(tiny_model(), args=cut, train_dataset=rows, tokenizer=word_tokenizer(),
                   processing_class=word_tokenizer())  # fmt: skip


def test_answers_before_and_after(tmp_path, capsys):
    rows = random_rows(8)
    run = trainer(tmp_path, rows=rows, eval_dataset=random_rows(3, seed=5), show_generations=2, max_steps=2)
    run.train()
    shown = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert [entry["when"] for entry in shown] == ["before", "before", "after", "after"]
    prompts = [word_tokenizer().decode(row["prompt_ids"]) for row in random_rows(2, seed=5)]
    assert [entry["prompt"] for entry in shown] == prompts * 2
    assert capsys.readouterr().out.count("after training: ") == 2
    plain = trainer(tmp_path / "plain", rows=rows, max_steps=2)
    plain.train()
    assert losses_of(run) == losses_of(plain)  # it draws nothing


def test_activations_may_wait_on_the_host(tmp_path):
    runs = [trainer(tmp_path / str(on), rows=random_rows(8), max_steps=3, activation_offloading=on) for on in (0, 1)]
    for run in runs:
        run.train()
    assert losses_of(runs[0]) == losses_of(runs[1])


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"cp_size": 2}])
def test_rows_are_not_cut_among_processes(sizes):
    from types import SimpleNamespace

    from fastdpo.trainer.config import check_parallelism

    check_parallelism(None)
    check_parallelism(SimpleNamespace(tp_size=1, cp_size=1, sp_size=None))
    with pytest.raises(ValueError, match=f"parallelism_config has {next(iter(sizes))}=2"):
        check_parallelism(SimpleNamespace(**sizes))


@pytest.mark.gpu
def test_activations_wait_in_pinned_memory():
    from fastdpo.trainer.passes import activations_on_host

    weight = torch.nn.Parameter(torch.randn(64, 64, device="cuda"))
    x = torch.randn(512, 64, device="cuda", requires_grad=True)
    expected = torch.autograd.grad((x @ weight).tanh().square().sum(), [x, weight])
    with activations_on_host():
        loss = (x @ weight).tanh().square().sum()
    for got, wanted in zip(torch.autograd.grad(loss, [x, weight]), expected, strict=True):
        torch.testing.assert_close(got, wanted)
