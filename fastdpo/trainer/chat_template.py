"""A chat template taken over from another tokenizer, with the tokens that it writes and embeddings for them."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoTokenizer

from fastdpo.models import vocabulary_size
from fastdpo.types import UserError

_MULTIPLE = 64  # rows of embeddings are rounded up to: matrices of such sizes are quick to multiply


def take_over_template(model: Any, tokenizer: Any, args: Any) -> list[int]:
    """Gives `tokenizer` the template of the one at `args.template_source`, its added tokens and its end-of-text token.

    The model gets embeddings for tokens beyond those that it has. An `args.eos_token` stays the end of text.

    Returns:
        The ids of the tokens that `tokenizer` did not have.

    Raises:
        UserError: no tokenizer can be loaded from there, or it has no template; a model with adapters would need new
            embeddings.
    """
    source = _load(args)
    known = tokenizer.get_vocab()
    wanted = [token for token in source.added_tokens_decoder.values() if token.content not in known]
    if wanted and hasattr(model, "peft_config"):
        raise UserError(
            f"chat_template_path is {args.template_source!r}, whose tokens the model needs embeddings for "
            f"({wanted[0].content!r} and {len(wanted) - 1} more), and it has adapters; add the tokens before these are "
            "put on (tokenizer.add_tokens, model.resize_token_embeddings), or pass peft_config to the trainer."
        )
    tokenizer.chat_template = source.chat_template
    tokenizer.add_tokens(wanted)
    if args.eos_token is None and source.eos_token in tokenizer.get_vocab():
        tokenizer.eos_token = source.eos_token
    if len(tokenizer) > vocabulary_size(model):
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=_MULTIPLE)
    return [tokenizer.convert_tokens_to_ids(token.content) for token in wanted]


def _load(args: Any) -> Any:
    name = args.template_source
    try:
        source = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"chat_template_path is {name!r}, and no tokenizer can be loaded from there; name one, or a file .jinja or "
            ".j2."
        ) from error
    if not source.chat_template:
        raise UserError(f"chat_template_path is {name!r}, whose tokenizer has no chat template; name another.")
    return source


def training_embeddings_of(tokens: list[int], peft_config: Any) -> Any:
    """`peft_config`, or a copy that trains the embeddings of these tokens, where its kind of adapter can."""
    if not tokens or not hasattr(peft_config, "trainable_token_indices"):
        return peft_config
    peft_config = copy.deepcopy(peft_config)
    given = peft_config.trainable_token_indices
    if isinstance(given, dict):
        peft_config.trainable_token_indices = {name: sorted({*ids, *tokens}) for name, ids in given.items()}
    else:
        peft_config.trainable_token_indices = sorted({*(given or ()), *tokens})
    return peft_config
