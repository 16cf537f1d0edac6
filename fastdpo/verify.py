"""Whether a model can run packed: compared with its own outputs, sequence by sequence, before any training."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastdpo.adapters import adapter_tensors, adapters_in_use
from fastdpo.attention import packed_layers
from fastdpo.models import causal_lm, evaluating, forward_logps
from fastdpo.packing import PACKINGS, PreferenceCollator
from fastdpo.types import UserError

logger = logging.getLogger(__name__)

Row = dict[str, list[int]]

# How far a packed log-prob may lie from the model's own, in nats a token, by the dtype of the arithmetic; and a score,
# in standard deviations.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}
_NOISE = 0.05  # in the place of zeros of an adapter
_CANNOT_RUN = (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError)


# What has been verified of a model: (packing, attention backend, dtype of the arithmetic, adapters in use).
_verified: weakref.WeakKeyDictionary[torch.nn.Module, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Compared:
    """What of a model is compared; R rows of token ids have 2R sequences, chosen first.

    what, unit  in messages: "log-probs" that are off by so many "nats a token"
    inner       model -> the transformers model inside adapters and wrappers
    vocabulary  of that model: a weight with a row a token, where batches must be
    ours        (model, rows, packing, attention backend) -> (2R,) on the CPU, of a batch of these rows
    theirs      (model, rows) -> (2R,) on the CPU, from the model's own outputs, each sequence run alone
    scale       (rows, theirs) -> by what differences are divided
    """

    what: str
    unit: str
    inner: Callable[[Any], Any]
    vocabulary: Callable[[Any], Tensor]
    ours: Callable[[Any, list[Row], str, str], Tensor]
    theirs: Callable[[Any, list[Row]], Tensor]
    scale: Callable[[list[Row], Tensor], Tensor]


def _packed_logps(model: Any, rows: list[Row], packing: str, attention_backend: str) -> Tensor:
    batch = PreferenceCollator(packing=packing)(rows).to(causal_lm(model).get_output_embeddings().weight.device)
    return forward_logps(model, batch, attention_backend=attention_backend).cpu()


def _own_logps(model: Any, rows: list[Row]) -> Tensor:
    """Sums of the completions' log-probs, chosen first, from the logits of each sequence run alone."""
    return torch.stack(
        [
            own_logps(model, row["prompt_ids"], row[side]).sum()
            for side in ("chosen_ids", "rejected_ids")
            for row in rows
        ]
    )


LOG_PROBS = Compared(
    what="log-probs",
    unit="nats a token",
    inner=causal_lm,
    vocabulary=lambda inner: inner.get_output_embeddings().weight,
    ours=_packed_logps,
    theirs=_own_logps,
    scale=lambda rows, _: torch.tensor([len(row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]),
)


def ensure_verified(model: Any, packing: str, attention_backend: str, compared: Compared = LOG_PROBS) -> None:
    """`verify_packing`, where the model has not passed it yet."""
    if torch.compiler.is_compiling():
        return
    inner = compared.inner(model)
    way, adapters = [packing, attention_backend, _arithmetic(inner)], adapters_in_use(inner)
    # Where adapters were verified, so was the model without them.
    if not any(verified == way and adapters <= others for *verified, others in _verified.get(inner, ())):
        verify_packing(model, packing, attention_backend=attention_backend, compared=compared)


def choose_packing(model: Any, wanted: str, attention_backend: str = "auto", compared: Compared = LOG_PROBS) -> str:
    """The wanted packing, verified; for "auto", the first one that gives this model's own log-probs (or scores).

    Raises:
        UserError: as `verify_packing`; for "auto", where none suits, or none that the named backend serves.
    """
    if wanted != "auto":
        ensure_verified(model, wanted, attention_backend, compared)
        return wanted
    refusals: list[str] = []
    # Padded rows run in the model's own attention, so whoever names a backend wants one of the others.
    for packing in PACKINGS if attention_backend == "auto" else PACKINGS[:2]:
        try:
            ensure_verified(model, packing, attention_backend, compared)
        except UserError as error:
            refusals.append(str(error))
            continue
        if refusals:
            logger.warning("Running with packing=%r: %s", packing, refusals[0])
        return packing
    raise UserError(f"no way of packing suits this model: {' '.join(refusals)}")


def verify_packing(
    model: Any, packing: str, *, attention_backend: str = "auto", compared: Compared = LOG_PROBS
) -> None:
    """Runs small random pairs as `packing` says and compares them with the model's own outputs.

    Three pairs: two with one prompt, one of these with answers that begin alike. Run again with other tokens in half of
    the sequences, the rest must stay as it was: nothing leaks from one to another. Adapters that have learnt nothing
    yet are given something to say meanwhile.

    Raises:
        UserError: the model does not run this way, or what is compared differs: packed attention, positions, or the
            head's scale and softcap are not what this architecture does.
    """
    inner = compared.inner(model)
    vocabulary = compared.vocabulary(inner).shape[0]
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    shared, common = draw(6), draw(3)
    rows = [
        {"prompt_ids": draw(7), "chosen_ids": draw(5), "rejected_ids": draw(3)},
        {"prompt_ids": shared, "chosen_ids": draw(2), "rejected_ids": draw(6)},
        {"prompt_ids": shared, "chosen_ids": common + draw(2), "rejected_ids": common + draw(4)},
    ]
    others = copy.deepcopy(rows)
    others[0] = {name: draw(len(ids)) for name, ids in rows[0].items()}
    others[1]["rejected_ids"] = draw(6)
    others[2]["rejected_ids"][3:] = draw(4)
    unchanged = torch.tensor([1, 2])  # the chosen answers of the last two
    attention = inner.config._attn_implementation
    _refuse_readers_of_rows(inner)
    try:
        with evaluating(model), _loud_adapters(inner), torch.no_grad():
            theirs = compared.theirs(model, rows)
            try:
                with packed_layers() as layers:
                    ours = compared.ours(model, rows, packing, attention_backend)
                again = compared.ours(model, others, packing, attention_backend)
            except torch.OutOfMemoryError:
                raise
            except _CANNOT_RUN as error:
                raise UserError(f"packing={packing!r} does not run on {type(inner).__name__}: {error}") from error
        wanted = 0 if packing == "padded" else inner.config.get_text_config().num_hidden_layers
        if len(layers) < wanted:
            raise UserError(
                f"packing={packing!r} cannot serve {type(inner).__name__}: only {len(layers)} of its {wanted} layers "
                "run attention through transformers' attention interface; the others (recurrent, linear or "
                "hand-written attention) would mix the packed sequences. Use packing='padded', or packing='auto'."
            )
        scale = compared.scale(rows, theirs)
        tolerance = _TOLERANCE.get(_arithmetic(inner), 1e-4)
        leak = ((ours - again).abs() / scale)[unchanged].max().item()
        if packing != "padded" and not leak <= tolerance / 3:
            raise UserError(
                f"packing={packing!r} cannot serve {type(inner).__name__}: other sequences of the row move the "
                f"{compared.what} of one by {leak:.2g} {compared.unit}. Use packing='padded', or packing='auto'."
            )
        off = ((ours - theirs).abs() / scale).max().item()
        if not off <= tolerance:
            raise UserError(
                f"packing={packing!r} does not give the {compared.what} of {type(inner).__name__}: off by {off:.2g} "
                f"{compared.unit} on a small test batch. Use packing='padded', or packing='auto' to have it chosen."
            )
        _verified.setdefault(inner, set()).add((packing, attention_backend, _arithmetic(inner), adapters_in_use(inner)))
    except ValueError:
        if inner.config._attn_implementation != attention:
            inner.set_attn_implementation(attention)
        raise


def _refuse_readers_of_rows(inner: Any) -> None:
    names = {use.split(" ")[0] for use in adapters_in_use(inner)}
    for name, config in getattr(inner, "peft_config", {}).items():
        if name in names and getattr(config, "alora_invocation_tokens", None):
            raise UserError(
                f"the adapter {name!r} looks for its invocation tokens in each row (alora_invocation_tokens), which "
                "packed rows and fused log-probs do not show it; take LoRA without them."
            )


@contextmanager
def _loud_adapters(inner: Any) -> Iterator[None]:
    """Within it, the zeros that adapters begin with are noise, so that what adapters do wrong is seen.

    By way of `data`: a graph that somebody holds stays valid.
    """
    before: list[tuple[Tensor, Tensor]] = []
    generator = torch.Generator().manual_seed(1)
    try:
        for _, _, _, tensor in adapter_tensors(inner):
            silent = isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta
            if not silent or isinstance(tensor, DTensor) or tensor.is_inference() or tensor.any():
                continue
            before.append((tensor, tensor.data.clone()))
            tensor.data.copy_(_NOISE * torch.randn(tensor.shape, generator=generator))
        yield
    finally:
        for tensor, values in before:
            tensor.data.copy_(values)


def own_logps(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Log-probs of a completion's tokens on the CPU, plainly: the model run on this sequence alone, its own logits."""
    ids = torch.tensor([[*prompt, *completion]], device=causal_lm(model).get_input_embeddings().weight.device)
    first = max(1, len(prompt))  # nothing predicts the first token of all
    logits = model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, ids[0, first:, None].to(logits.device)).squeeze(1).cpu()


def _arithmetic(inner: Any) -> torch.dtype:
    kind = inner.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inner.dtype
