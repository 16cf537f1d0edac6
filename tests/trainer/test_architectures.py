"""Models that read no row from left to right are refused, wherever one is given, before anything runs."""

import pytest
import torch
import transformers
from reward_models import tiny_reward_model
from tiny import random_rows, tiny_model, word_tokenizer

import fastdpo
from fastdpo import DPOConfig, DPOTrainer, PreferenceCollator, RewardConfig, RewardTrainer
from fastdpo.run import load_model
from fastdpo.types import UserError

RUN = {"bf16": False, "use_cpu": True, "report_to": [], "max_steps": 1, "per_device_train_batch_size": 2}
T5 = transformers.T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
BART = transformers.BartConfig(
    vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
)  # fmt: skip
BERT = transformers.BertConfig(
    vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)
MODELS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(T5),
    "bart": lambda: transformers.BartForConditionalGeneration(BART),
    "bert": lambda: transformers.BertForMaskedLM(BERT),
    "bert as lm": lambda: transformers.BertLMHeadModel(BERT),
}
SAID = {"t5": "is an encoder-decoder (t5)", "bart": "is an encoder-decoder (bart)", "bert": "is an encoder (bert)"}
SAID["bert as lm"] = SAID["bert"]


def made(tmp_path, method, model, **options):
    args = getattr(fastdpo, f"{method}Config")(output_dir=str(tmp_path / "out"), **RUN)
    rows = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": True} for row in random_rows(4)
    ]
    return getattr(fastdpo, f"{method}Trainer")(
        model, args=args, train_dataset=rows if method == "KTO" else random_rows(4),
        processing_class=word_tokenizer(), **options,
    )  # fmt: skip


def lora(model):
    from peft import LoraConfig, get_peft_model

    names = {"t5": ["q"], "bart": ["q_proj"]}.get(model.config.model_type, ["query"])
    return get_peft_model(model, LoraConfig(r=2, target_modules=names))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["DPO", "KTO", "CPO", "ORPO"])
def test_every_trainer_refuses(tmp_path, method, kind):
    with pytest.raises(UserError) as refused:
        made(tmp_path, method, MODELS[kind]())
    assert SAID[kind] in str(refused.value)
    assert "decoder-only" in str(refused.value)


@pytest.mark.parametrize("kind", MODELS)
def test_as_reference_and_with_adapters(tmp_path, kind):
    with pytest.raises(UserError) as refused:
        made(tmp_path, "DPO", tiny_model(), ref_model=MODELS[kind]())
    assert SAID[kind] in str(refused.value)
    with pytest.raises(UserError) as refused:
        made(tmp_path, "DPO", lora(MODELS[kind]()))
    assert SAID[kind] in str(refused.value)


@pytest.mark.parametrize("kind, config", [("t5", T5), ("bart", BART), ("bert", BERT)])
def test_by_path_before_weights_are_read(tmp_path, kind, config):
    """There are none."""
    config.save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    for make in (
        lambda: made(tmp_path, "DPO", path),
        lambda: made(tmp_path, "DPO", tiny_model(), ref_model=path),
        lambda: load_model(path, "float32"),
    ):
        with pytest.raises(UserError) as refused:
            make()
        assert f"{path} {SAID[kind]}" in str(refused.value)


@pytest.mark.parametrize("kind", MODELS)
def test_without_a_trainer(tmp_path, kind):
    model, batch = MODELS[kind](), PreferenceCollator(packing="padded")(random_rows(2))
    for run in (
        lambda: fastdpo.sequence_logps(model, batch),
        lambda: fastdpo.batch_loss(model, batch, torch.zeros(4)),
        lambda: fastdpo.precompute(model, random_rows(2), tmp_path / "cache"),
    ):
        with pytest.raises(UserError) as refused:
            run()
        assert SAID[kind] in str(refused.value)


def reward(tmp_path, model):
    args = RewardConfig(output_dir=str(tmp_path / "out"), **RUN)
    return RewardTrainer(model, args=args, train_dataset=random_rows(4), processing_class=word_tokenizer())


def test_reward_models(tmp_path):
    """An encoder scores whole rows as well as a decoder does; an encoder-decoder reads them twice."""
    BART.save_pretrained(tmp_path / "bart")
    for model in (transformers.BartForSequenceClassification(BART), str(tmp_path / "bart")):
        with pytest.raises(UserError, match=r"is an encoder-decoder \(bart\)"):
            reward(tmp_path, model)
    assert reward(tmp_path, tiny_reward_model("bert")).packing == "padded"


def test_the_decoder_of_bart_trains(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path / "out"), packing="padded", disable_tqdm=True, **RUN)
    bart = transformers.BartForCausalLM(BART)
    run = DPOTrainer(bart, args=args, train_dataset=random_rows(4), processing_class=word_tokenizer())
    assert run.packing == "padded"


def test_a_vision_language_model_trains_on_text(tmp_path):
    """Given by name it is loaded whole, though no causal LM goes by its kind; what sees images stays as it is."""
    text = {
        "vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "layer_types": ["full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    special = {"image_token_id": 93, "video_token_id": 94, "vision_start_token_id": 95, "vision_end_token_id": 96}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    run = made(tmp_path, "DPO", str(tmp_path / "model"))
    assert type(run.model).__name__ == "Qwen2_5_VLForConditionalGeneration" and run.packing == "prefix"
    start = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    run.train()
    moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, start[name])}
    assert "lm_head.weight" in moved and not any("visual" in name for name in moved)
