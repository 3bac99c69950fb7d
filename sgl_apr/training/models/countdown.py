"""A small untrained Llama for Countdown, in whose vocabulary every number up to 99 and every tag is one token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.training.models.tags import add_to_tokenizer, validate_tags

END = "<|endoftext|>"


def countdown_tokenizer(tags: Sequence[str], context: int = 2048, dialects: Sequence[str] = ()) -> Any:
    """A byte-level BPE whose merges are " 0" to " 99" and "10" to "99"; it can encode any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space, digits = "Ġ", "0123456789"  # byte-level BPE writes a space as "Ġ"
    merges = [(space, d) for d in digits]
    merges += [(space + a, b) for a in digits[1:] for b in digits] + [
        (a, b) for a in digits[1:] for b in digits
    ]
    pieces = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    declared = {"apr_dialects": list(dialects)} if dialects else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=context, **declared
    )
    add_to_tokenizer(tokenizer, validate_tags(tags))
    return tokenizer


def countdown_llama(
    directory: Path,
    tags: Sequence[str],
    *,
    layers: int = 5,
    hidden: int = 128,
    seed: int = 0,
    context: int = 2048,
    init: float = 0.02,
    dialects: Sequence[str] = (),
) -> Path:
    """Write the checkpoint (float32, tied embeddings) into a directory.

    Args:
        directory: Where to write it.
        tags: Tags of the dialects, one special token each.
        layers: Number of layers.
        hidden: Hidden size.
        seed: Seed of the weights.
        context: Tokens of the model's context.
        init: Standard deviation of the weights.
        dialects: The dialects that it will be trained on, the default first, where there are several.

    Returns:
        The directory.

    Raises:
        AprError: If `init` is not above 0.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    if not init > 0:
        raise AprError(f"init = {init}, expected more than 0")
    tokenizer = countdown_tokenizer(tags, context, dialects)
    eos = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
        initializer_range=init,
        dtype=torch.float32,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
