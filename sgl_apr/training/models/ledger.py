"""A small untrained Llama for questions about ledgers (`sgl_apr.evaluation.tasks.ledger`): words and numbers up to 99 are tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sgl_apr.evaluation.tasks.ledger import generate_ledgers
from sgl_apr.methods.context_parts import ANSWER, NOTES, READ_PART
from sgl_apr.training.models.countdown import write_llama
from sgl_apr.training.models.tiny import CHAT_TEMPLATE, END, END_TURN, TURN

# Of a text; tokens do not cross their borders. A number is the same tokens wherever it stands, so that a model can match two of
# them: digits come in pairs from the right, and a space before them is a token of its own.
PIECES = r"[0-9]{1,2}(?=([0-9]{2})*(?![0-9]))| ?[A-Za-z]+|\s|[^A-Za-z0-9\s]"
VOCABULARY = 800


def ledger_tokenizer(context: int = 2048) -> Any:
    """A byte-level BPE, trained on the prompts, with ChatML; it can encode any text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer  # untyped there
    options = {
        "special_tokens": [END, TURN, END_TURN],
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,
    }
    bpe.train_from_iterator(_corpus(), trainer(vocab_size=VOCABULARY, **options))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_TURN, pad_token=END, model_max_length=context
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def ledger_llama(
    directory: Path, *, layers: int = 4, hidden: int = 128, seed: int = 0, context: int = 2048
) -> Path:
    """Write the checkpoint (float32, tied embeddings) into a directory.

    Args:
        directory: Where to write it.
        layers: Number of layers.
        hidden: Hidden size.
        seed: Seed of the weights.
        context: Tokens of the model's context.

    Returns:
        The directory.
    """
    return write_llama(
        directory, ledger_tokenizer(context), layers=layers, hidden=hidden, seed=seed, context=context
    )


def _corpus() -> Iterator[str]:
    yield from (READ_PART, ANSWER, NOTES, "user\n", "assistant\n")
    for number in range(100):
        yield f" {number}, {number:02}"
    for problem in generate_ledgers(40, 100, seed=-1):
        yield problem.text
