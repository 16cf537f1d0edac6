"""Filling a reference cache: right values, only what is new, in whatever order, slices and windows the rows come."""

import random

import numpy as np
import pytest
import torch
from cache_contents import assert_same, contents
from tiny import naive_sequence_logps, random_rows, tiny_model, word_tokenizer

from fastdpo.data import tokenize_row
from fastdpo.reference import ReferenceCache, fill, fill_cache, model_fingerprint, precompute, reference_columns, work
from fastdpo.reference.fingerprint import sequence_key
from fastdpo.types import DataError, UserError

TEXTS = [
    {"prompt": "why a b", "chosen": " yes c", "rejected": " no"},
    {"prompt": "why a b", "chosen": " hello d", "rejected": " no"},
    {"prompt": "hello e", "chosen": " a", "rejected": " b c d e"},
]


def pairs(rows, tmp_path, model, **options):
    """Reference columns of rows through a new cache."""
    cache = precompute(model, rows, tmp_path, progress=False, **options)
    return torch.tensor([*reference_columns(cache, rows, options.get("max_length")).values()])


@pytest.mark.parametrize("packing", ["auto", "prefix", "varlen", "padded"])
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_values_equal_the_model_run_alone(tmp_path, packing, max_tokens):
    model, rows = tiny_model(), random_rows(7, seed=1)
    columns = pairs(rows, tmp_path / "c", model, packing=packing, max_tokens=max_tokens)
    exact = naive_sequence_logps(model, rows).view(2, -1)
    torch.testing.assert_close(columns, exact.to(columns), rtol=1e-5, atol=1e-4)
    cache = ReferenceCache(tmp_path / "c")
    assert len(cache) == 14
    assert cache[sequence_key(rows[0]["prompt_ids"], rows[0]["chosen_ids"])].shape == (len(rows[0]["chosen_ids"]),)


def test_five_hundred_tokens_are_right_to_1e_5(tmp_path):
    model = tiny_model(max_position_embeddings=1024)
    rows = random_rows(3, seed=2, prompt=(200, 300), answer=(500, 520))
    columns = pairs(rows, tmp_path / "c", model)
    exact = naive_sequence_logps(model.double(), rows).view(2, -1)
    error = (columns - exact).abs() / exact.abs()
    assert error.max() < 1e-5 / 10, error  # the sums are of some thousand nats: 1e-5 of one nat a token
    assert (columns - exact).abs().max() / 500 < 1e-5


def test_only_what_is_new_is_computed(tmp_path, scored):
    model, rows = tiny_model(), random_rows(20, seed=2)
    precompute(model, rows, tmp_path / "c", progress=False)
    assert sum(scored) == 40
    scored.clear()
    precompute(model, rows[::-1][:15], tmp_path / "c", progress=False)  # another order, a subset
    assert scored == []
    changed = [dict(rows[0], chosen_ids=[4, 4, 4, 4]), *rows[1:], *random_rows(3, seed=9)]
    precompute(model, changed, tmp_path / "c", progress=False)
    assert sum(scored) == 1 + 6


@pytest.mark.slow
def test_ten_rows_more_of_ten_thousand(tmp_path, scored):
    model, rows = tiny_model(num_hidden_layers=1, hidden_size=16), random_rows(10_010, seed=3, answer=(3, 6))
    cache = precompute(model, rows[:10_000], tmp_path / "c", progress=False)
    before = len(cache)
    assert sum(scored) == before > 19_900
    scored.clear()
    more = fill_cache(model, rows, cache, progress=False)
    assert sum(scored) == more.computed == 20 and more.found == before
    scored.clear()
    random.Random(0).shuffle(rows)
    assert fill_cache(model, rows, cache, progress=False).computed == 0 == len(scored)
    rows[5_000] = dict(rows[5_000], rejected_ids=[5] * 11)
    assert fill_cache(model, rows, cache, progress=False).computed == 1 == sum(scored)


def test_the_counts_of_a_run(tmp_path):
    model, rows = tiny_model(), random_rows(6, seed=3)
    cache = precompute(model, rows[:2], tmp_path / "c", progress=False)
    filled = fill_cache(model, [*rows, rows[5]], cache, progress=False)
    assert (filled.rows, filled.sequences, filled.found, filled.computed) == (7, 12, 4, 8)
    new = [len(row["prompt_ids"]) + len(row[side]) for row in rows[2:] for side in ("chosen_ids", "rejected_ids")]
    assert filled.tokens == sum(new) and filled.seconds > 0


@pytest.fixture(params=[False, True], ids=["inline", "ahead"])
def early(request, monkeypatch):
    """Windows and passes as on a CPU, and as they are made beside a GPU."""
    if request.param:
        monkeypatch.setattr(fill, "_early", lambda items, device: work.ahead(items))


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("window", [1, 3, 5])
def test_windows_change_nothing(tmp_path, monkeypatch, window):
    model, rows = tiny_model(), [*random_rows(9, seed=4), *random_rows(3, seed=4)]
    whole = precompute(model, rows, tmp_path / "whole", progress=False)
    monkeypatch.setattr(work, "WINDOW_ROWS", window)
    cut = precompute(model, iter(rows), tmp_path / "cut", progress=False)
    assert len(whole) == len(cut) == 18
    assert_same(contents(tmp_path / "whole"), contents(tmp_path / "cut"))
    monkeypatch.setattr(work, "WINDOW_TOKENS", 10)
    assert len(precompute(model, rows, tmp_path / "short", progress=False)) == 18


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("window", [4, 100])
def test_a_stream_that_breaks_off_loses_nothing(tmp_path, monkeypatch, window):
    monkeypatch.setattr(work, "WINDOW_ROWS", window)

    def stream():
        yield from random_rows(42, seed=5)
        raise RuntimeError("the connection is gone")

    with pytest.raises(RuntimeError, match="connection"):
        precompute(tiny_model(), stream(), tmp_path / "c", progress=False)
    assert len(ReferenceCache(tmp_path / "c")) == 84


@pytest.mark.usefixtures("early")
def test_an_endless_stream_is_read_as_it_is_worked_through(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "WINDOW_ROWS", 4)
    read, original, added = [], ReferenceCache.add, []

    def stream():
        for row in random_rows(4000, seed=5):
            read.append(row)
            yield row

    def add(cache, values):
        original(cache, values)
        added.append(len(read))
        if len(added) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ReferenceCache, "add", add)
    with pytest.raises(KeyboardInterrupt):
        precompute(tiny_model(), stream(), tmp_path / "c", progress=False)
    assert max(read for read in added) <= 5 * 4 + 3 * 4  # a window in use, one ready, one being read


def test_streamed_data_set(tmp_path):
    IterableDataset = pytest.importorskip("datasets").IterableDataset

    model, rows = tiny_model(), random_rows(6, seed=6)
    streamed = precompute(model, IterableDataset.from_generator(lambda: iter(rows)), tmp_path / "s", progress=False)
    listed = precompute(model, rows, tmp_path / "l", progress=False)
    assert reference_columns(streamed, rows) == reference_columns(listed, rows)


def test_rows_of_a_table_are_those_of_a_list(tmp_path, scored):
    datasets = pytest.importorskip("datasets")
    Dataset, Features, LargeList = datasets.Dataset, datasets.Features, datasets.LargeList
    Sequence, Value = datasets.Sequence, datasets.Value

    model, rows = tiny_model(), random_rows(9, seed=7)
    cache = precompute(model, rows, tmp_path / "c", progress=False)
    scored.clear()
    table = Dataset.from_list([{"other": "x", **row} for row in rows])
    narrow = table.cast(Features({name: Sequence(Value("int32")) if name != "other" else Value("string")
                                  for name in table.column_names}))  # fmt: skip
    large = table.cast(Features({name: LargeList(Value("int64")) if name != "other" else Value("string")
                                 for name in table.column_names}))  # fmt: skip
    for each in (table, narrow, large, table.select([4, 2, 7]), table.filter(lambda row: len(row["prompt_ids"]) > 3)):
        assert fill_cache(model, each, cache, progress=False).computed == 0
        assert reference_columns(cache, each) == reference_columns(cache, each.to_list())
    assert not scored


@pytest.mark.parametrize("count", [2, 3, 16])
def test_slices_make_the_whole(tmp_path, count):
    model, rows = tiny_model(), random_rows(30, seed=8)
    rows += [dict(rows[0], chosen_ids=[7, 8]), dict(rows[1], chosen_ids=[9])]
    whole = precompute(model, rows, tmp_path / "whole", progress=False)
    sizes = []
    for index in range(count):
        shuffled = random.Random(index).sample(rows, len(rows))  # each machine reads them in an order of its own
        part = precompute(model, shuffled, tmp_path / str(index), num_shards=count, shard_index=index, progress=False)
        sizes.append(len(part))
        for shard in (tmp_path / str(index)).glob("*"):
            (tmp_path / "merged").mkdir(exist_ok=True)
            (tmp_path / "merged" / shard.name).write_bytes(shard.read_bytes())
    assert sum(sizes) == len(whole)
    assert count > 3 or min(sizes) > 0.4 * len(whole) / count
    assert_same(contents(tmp_path / "whole"), contents(tmp_path / "merged"))


def test_a_prompt_stays_in_its_slice():
    texts = [{"prompt": "why", "chosen": "a", "rejected": "b"}, {"prompt": "why", "chosen": "c", "rejected": "d"}]
    assert work.content_slice(texts[0], 1000) == work.content_slice(texts[1], 1000)
    message = {"role": "user", "content": "why"}
    chats = [
        {"prompt": [message], "chosen": [{"role": "assistant", "content": "a"}]},
        {"prompt": [{**message, "tool_calls": None}], "chosen": [{"role": "assistant", "content": "b"}]},
        {"chosen": [message, {"role": "assistant", "content": "a"}],
         "rejected": [message, {"role": "assistant", "content": "b"}]},
    ]  # fmt: skip
    assert len({work.content_slice(chat, 1000) for chat in chats}) == 1
    tokens = [{"prompt_ids": [1, 2]}, {"prompt_ids": np.array([1, 2], np.int32)}, {"prompt_ids": (1, 2)}]
    assert len({work.content_slice(row, 1000) for row in tokens}) == 1
    assert len({work.content_slice({"prompt_ids": [n]}, 1000) for n in range(100)}) > 80


def test_rows_of_text(tmp_path):
    model, tokenizer = tiny_model(), word_tokenizer()
    cache = precompute(model, TEXTS, tmp_path / "c", tokenizer=tokenizer, progress=False)
    rows = [tokenize_row(text, tokenizer) for text in TEXTS]
    exact = naive_sequence_logps(model, rows).view(2, -1)
    columns = reference_columns(cache, TEXTS, tokenizer=tokenizer)
    torch.testing.assert_close(torch.tensor([*columns.values()]), exact, rtol=1e-5, atol=1e-4)
    assert columns == reference_columns(cache, rows)
    assert len(cache) == 5  # one answer is given twice


def test_truncation_is_part_of_the_content(tmp_path):
    model, rows = tiny_model(), random_rows(5, seed=3, prompt=(4, 6), answer=(5, 9))
    cut = [{**r, **{s: r[s][: 8 - len(r["prompt_ids"])] for s in ("chosen_ids", "rejected_ids")}} for r in rows]
    columns = pairs(rows, tmp_path / "c", model, max_length=8)
    exact = naive_sequence_logps(model, cut).view(2, -1)
    torch.testing.assert_close(columns, exact.to(columns), rtol=1e-5, atol=1e-4)


def test_answers_and_prompts_of_no_tokens(tmp_path):
    model = tiny_model()
    rows = [{"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [8]},
            {"prompt_ids": [3] * 9, "chosen_ids": [5], "rejected_ids": [6]}]  # fmt: skip
    cache = precompute(model, rows, tmp_path / "c", max_length=8, progress=False)
    columns = reference_columns(cache, rows, 8)
    with torch.no_grad():
        logps = model(torch.tensor([[5, 6, 7]])).logits[0].log_softmax(-1)
    # Nothing predicts a first token; of a row whose prompt fills max_length, no answer is left.
    assert columns["ref_chosen_logps"] == pytest.approx([float(logps[0, 6] + logps[1, 7]), 0.0], abs=1e-4)
    assert columns["ref_rejected_logps"] == [0.0, 0.0]


def test_many_completions_of_one_prompt_are_cut_by_the_budget(tmp_path, scored):
    rows = [{"prompt_ids": [3, 4, 5], "chosen_ids": [6 + n, 7], "rejected_ids": [6 + n, 8, 9]} for n in range(40)]
    columns = pairs(rows, tmp_path / "c", model := tiny_model(), max_tokens=23)
    assert sum(scored) == 80 and max(scored) <= 10
    torch.testing.assert_close(columns, naive_sequence_logps(model, rows).view(2, -1).to(columns), rtol=1e-5, atol=1e-4)
    scored.clear()
    pairs(rows, tmp_path / "d", model, max_tokens=10_000, batch_size=1)
    assert scored == [80]


def test_sums_only(tmp_path):
    model, rows = tiny_model(), random_rows(5, seed=9)
    whole = precompute(model, rows, tmp_path / "whole", progress=False)
    sums = precompute(model, rows, tmp_path / "sums", per_token=False, progress=False)
    assert reference_columns(whole, rows) == reference_columns(sums, rows)
    with pytest.raises(UserError, match="keeps only the sums"):
        sums[sequence_key(rows[0]["prompt_ids"], rows[0]["chosen_ids"])]
    assert sum(f.stat().st_size for f in sums.path.iterdir()) < sum(f.stat().st_size for f in whole.path.iterdir())


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty"])
def test_a_damaged_shard_is_named_set_aside_and_computed_again(tmp_path, scored, harm):
    model, rows = tiny_model(), random_rows(6, seed=4)
    cache = precompute(model, rows, tmp_path / "c", progress=False)
    exact = reference_columns(cache, rows)
    (shard,) = (tmp_path / "c").glob("shard-*.parquet")
    data = bytearray(shard.read_bytes())
    if harm == "flip":
        data[60] ^= 0x10  # a key: keys and sums are read at the start, log-probs when they are asked for
    shard.write_bytes(data if harm == "flip" else data[:100] if harm == "truncate" else b"")
    scored.clear()
    with pytest.warns(UserWarning, match=rf"{shard.name} is damaged"):
        cache = precompute(model, rows, tmp_path / "c", progress=False)
    assert sum(scored) == 12
    assert shard.with_name(shard.name + ".damaged").exists() and not shard.exists()
    assert reference_columns(cache, rows) == exact


@pytest.mark.usefixtures("early")
def test_interrupted_work_is_kept(tmp_path, monkeypatch):
    model, rows = tiny_model(), random_rows(8, seed=5)
    original, calls = fill.score, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(fill, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        precompute(model, rows, tmp_path / "c", max_tokens=1, progress=False)
    assert len(ReferenceCache(tmp_path / "c")) == 3  # the fourth was on its way to the host
    monkeypatch.setattr(fill, "score", original)
    precompute(model, rows, tmp_path / "c", max_tokens=1, progress=False)
    precompute(model, rows, tmp_path / "undisturbed", max_tokens=1, progress=False)
    assert_same(contents(tmp_path / "c"), contents(tmp_path / "undisturbed"), exactly=True)


@pytest.mark.usefixtures("early")
def test_what_another_process_computes_is_not_computed_again(tmp_path, scored, monkeypatch):
    """The other process writes while this one runs; this one sees it with its next shard."""
    model, rows = tiny_model(), random_rows(40, seed=6)
    precompute(model, rows, tmp_path / "done", max_tokens=30, progress=False)
    scored.clear()
    monkeypatch.setattr(fill, "PASSES_PER_SHARD", 2)
    folder, calls = tmp_path / "c", []
    original = ReferenceCache.add

    def add(cache, values):
        original(cache, values)
        if not calls:
            calls.append(1)
            for shard in (tmp_path / "done").glob("shard-*"):
                (folder / shard.name).write_bytes(shard.read_bytes())

    monkeypatch.setattr(ReferenceCache, "add", add)
    filled = fill_cache(model, rows, ReferenceCache(folder, model_fingerprint(model)), max_tokens=30, progress=False)
    assert filled.computed == sum(scored) < 15
    assert len(ReferenceCache(folder)) == 80


def test_a_model_that_gives_nan_is_not_believed(tmp_path, monkeypatch):
    model, rows, original = tiny_model(), random_rows(12, seed=7), fill.score
    rows = [{name: [min(token, 95) for token in ids] for name, ids in row.items()} for row in rows]
    rows[7]["rejected_ids"] = [5, 96, 7]
    monkeypatch.setattr(
        fill, "score", lambda model, batch, **o: original(model, batch, **o).where(batch.target_ids != 96, float("nan"))
    )
    problem = r"gives a log-prob of nan for row 7 of the data set \(counted from 0\), in a completion of 3 tokens"
    with pytest.raises(UserError, match=problem):
        precompute(model, rows, tmp_path / "c", max_tokens=1, progress=False)
    kept = contents(tmp_path / "c")
    assert kept and all(np.isfinite(value).all() for value in kept.values())


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt_ids": [1], "chosen_ids": [2]}, "row 1 of the data set.*'rejected_ids' is missing"),
        (
            {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [97]},
            "row 1.*'rejected_ids' holds the id 97.*97 tokens",
        ),
        ({"prompt_ids": [-1], "chosen_ids": [2], "rejected_ids": [3]}, "row 1.*'prompt_ids' holds the id -1"),
        ({"prompt_ids": [1.5], "chosen_ids": [2], "rejected_ids": [3]}, "row 1.*must be a list of token ids"),
        ({"prompt_ids": "ab", "chosen_ids": [2], "rejected_ids": [3]}, "row 1.*must be a list of token ids"),
        ({"prompt_ids": [1], "chosen_ids": [[2], [3]], "rejected_ids": [3]}, "row 1.*must be a list of token ids"),
        ({"prompt_ids": [[1], [2, 3]], "chosen_ids": [2], "rejected_ids": [3]}, "row 1.*must be a list of token ids"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "row 1.*text, not token ids; pass the tokenizer"),
        ({"prompt": "a", "chosen": "b"}, "row 1.*'rejected' is missing"),
        ({"prompt_ids": [1] * 300, "chosen_ids": [2], "rejected_ids": [3]}, "row 1.*301 tokens, and the model has 256"),
    ],
)
def test_bad_rows(tmp_path, row, problem):
    model = tiny_model("gpt2")
    good = random_rows(1, seed=1)
    with pytest.raises(DataError, match=problem):
        precompute(model, [*good, row], tmp_path / "c", progress=False)


@pytest.mark.parametrize("options", [{"shard_index": 2, "num_shards": 2}, {"max_tokens": 0}, {"batch_size": -1}])
def test_bad_options(tmp_path, options):
    with pytest.raises(UserError, match="must be"):
        precompute(tiny_model(), random_rows(1), tmp_path / "c", progress=False, **options)
    assert not (tmp_path / "c").exists()


def test_the_bar_says_rows_speed_time_and_share(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(work, "WINDOW_ROWS", 8)
    model, rows = tiny_model(), random_rows(20, seed=8)
    cache = precompute(model, rows[:5], tmp_path / "c", progress=False)
    fill_cache(model, rows, cache, max_tokens=30)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "100%" in last and "20/20 rows" in last and "tokens/s" in last and "00:00 left" in last
    assert "25% found in the cache" in last
    fill_cache(model, iter(random_rows(3, seed=9)), cache)
    assert " 3 rows [" in capsys.readouterr().err.split("\r")[-1]


def test_items_made_ahead_come_in_order_and_errors_in_place():
    def items():
        yield from range(5)
        raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="gone"):
        for item in work.ahead(items()):
            seen.append(item)
    assert seen == list(range(5))
    made = []
    for item in work.ahead(made.append(n) or n for n in range(1000)):
        if item == 3:
            break
    assert len(made) <= 7  # the thread stops with its reader


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_tokens", [200, 100_000])
def test_on_a_gpu(tmp_path, dtype, max_tokens):
    """Passes that are packed and copied while others run give what the model gives alone."""
    model = tiny_model(dtype=torch.float32).to("cuda", dtype)
    rows = random_rows(300, seed=12, prompt=(1, 40), answer=(1, 30))
    columns = pairs(rows, tmp_path / "c", model, max_tokens=max_tokens)
    exact = naive_sequence_logps(model.cpu().float(), rows).view(2, -1)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(columns, exact.to(columns), rtol=tolerance, atol=10 * tolerance)


def test_a_cache_of_another_model_is_not_filled(tmp_path):
    rows = random_rows(4)
    cache = precompute(tiny_model(), rows, tmp_path / "c", per_token=False, progress=False)
    with pytest.raises(UserError, match="another reference model"):
        precompute(tiny_model(seed=1), random_rows(4, seed=1), cache, progress=False)
    with pytest.raises(UserError, match="only the sums"):
        precompute(tiny_model(), rows, cache, per_token=True, progress=False)
    assert len(cache) == 8


@pytest.mark.parametrize("packing", ["prefix", "varlen", "padded"])
def test_a_pass_runs_no_more_tokens_than_the_budget(tmp_path, packing, monkeypatch):
    ran, original = [], fill.score

    def score(model, batch, **options):
        ran.append(batch.input_ids.numel())
        return original(model, batch, **options)

    monkeypatch.setattr(fill, "score", score)
    rows = [{"prompt_ids": [3 + n % 5] * 60, "chosen_ids": [4 + n], "rejected_ids": [5 + n] * 9} for n in range(60)]
    columns = pairs(rows, tmp_path / "c", model := tiny_model(), packing=packing, max_tokens=300)
    assert max(ran) <= 300 and len(ran) < 60
    torch.testing.assert_close(columns, naive_sequence_logps(model, rows).view(2, -1).to(columns), rtol=1e-5, atol=1e-4)


def test_what_a_tokenizer_or_a_template_cannot_take_is_told_with_the_row(tmp_path):
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    chat = {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}]}  # fmt: skip
    for row, problem in ((chat, "roles must alternate"), ({**TEXTS[0], "chosen": "x \ud83d"}, "cannot be tokenized")):
        with pytest.raises(DataError, match=f"row 1 of the data set.*{problem}"):
            precompute(tiny_model(), [TEXTS[0], row], tmp_path / "c", tokenizer=tokenizer, progress=False)
    with pytest.raises(DataError, match="row 0 of the data set"):
        precompute(tiny_model(), [{"prompt": "a", "chosen": 5, "rejected": "b"}], tmp_path / "c",
                   tokenizer=tokenizer, num_shards=2, progress=False)  # fmt: skip


def test_a_backend_that_is_named_serves_or_is_refused(tmp_path):
    with pytest.raises(UserError, match="attention_backend is 'zzz'; it must be auto, flash_attn"):
        precompute(tiny_model(), random_rows(2), tmp_path / "c", attention_backend="zzz", progress=False)
    with pytest.raises(UserError, match="flash_attn"):
        precompute(tiny_model(), random_rows(2), tmp_path / "c", attention_backend="flash_attn", progress=False)
    assert len(precompute(tiny_model(), random_rows(2), tmp_path / "c", attention_backend="sdpa", progress=False)) == 4


class TestAModelThatChanges:
    """Its log-probs are not written beside those of what it was."""

    @pytest.mark.parametrize("by", ["data", "optimizer", "dtype", "other adapter", "buffer"])
    def test_between_the_cache_and_the_passes(self, tmp_path, by):
        model = tiny_model()
        if by == "other adapter":
            peft = pytest.importorskip("peft")
            config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            model = peft.get_peft_model(model, config)
        cache = ReferenceCache(tmp_path / "c", model_fingerprint(model))
        weight = model.get_input_embeddings().weight
        if by == "data":
            weight.data[3] += 1.0
        elif by == "optimizer":
            with torch.no_grad():
                weight[3] += 1.0
        elif by == "dtype":
            model.bfloat16()
        elif by == "buffer":
            model.model.rotary_emb.inv_freq.mul_(1.5)
        else:
            model.add_adapter("second", config)
            model.set_adapter("second")
        with pytest.raises(UserError, match=r"the model is not the one that .* is for"):
            fill_cache(model, random_rows(3), cache, progress=False)
        assert len(cache) == 0

    def test_in_the_middle(self, tmp_path, monkeypatch):
        from fastdpo.reference import fill

        monkeypatch.setattr(fill, "PASSES_PER_SHARD", 1)
        model, scored = tiny_model(), []
        cache = ReferenceCache(tmp_path / "c", model_fingerprint(model))
        score = fill.score

        def trains(*args, **kwargs):
            scored.append(score(*args, **kwargs))
            if len(scored) == 3:
                with torch.no_grad():
                    model.get_input_embeddings().weight[3:] += 1.0
            return scored[-1]

        monkeypatch.setattr(fill, "score", trains)
        with pytest.raises(UserError, match="it was changed since the cache was opened"):
            fill_cache(model, random_rows(12), cache, max_tokens=30, progress=False)
        monkeypatch.undo()
        held, right = contents(tmp_path / "c"), tiny_model()
        precompute(right, random_rows(12), tmp_path / "right", progress=False)
        everything = contents(tmp_path / "right")
        assert 0 < len(held) < len(everything)
        assert_same(held, {key: everything[key] for key in held})
