"""A small Llama that learns to answer questions about ledgers (`sgl_apr.evaluation.tasks.ledger`), and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sgl_apr.evaluation.tasks.ledger import generate_ledgers
from sgl_apr.methods.context_parts import ANSWER, NOTES, READ_PART
from sgl_apr.training.models import locate_model
from sgl_apr.training.models.tiny import CHAT_TEMPLATE, END, END_TURN, TURN

# Of a text; tokens do not cross their borders. Numbers up to 99 are those of the built-in model, which can copy and add them. No token
# between the payer, the payee and the coins of a payment is the same in all lines: a model copies soonest from the token before.
PIECES = r" ?[0-9]{1,2}|( paid| for)? ?[A-Za-z]+|\s|[^A-Za-z0-9\s]"
VOCABULARY = 1200  # at most: the training of the tokenizer ends where it has a token for each piece


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


def ledger_llama(directory: Path, *, seed: int = 0, context: int = 2048) -> Path:
    """Write the checkpoint (float32, tied embeddings) into a directory: the layers of the built-in model, and its tokens where it has them.

    Fresh weights quoted nothing after a million tokens of short texts; the layers of the built-in model copy already.

    Args:
        directory: Where to write it.
        seed: Seed of the embeddings of words.
        context: Tokens of the model's context.

    Returns:
        The directory.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    builtin = locate_model("builtin")
    tokenizer, model = ledger_tokenizer(context), AutoModelForCausalLM.from_pretrained(builtin)
    known, old = (
        AutoTokenizer.from_pretrained(builtin).get_vocab(),
        model.get_input_embeddings().weight.detach(),
    )
    torch.manual_seed(seed)
    new = torch.randn(len(tokenizer), old.shape[1]) * old.std()
    for token, number in tokenizer.get_vocab().items():
        if token in known:
            new[number] = old[known[token]]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(new)
    model.config.max_position_embeddings = context
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _corpus() -> Iterator[str]:
    yield from (READ_PART, ANSWER, NOTES, "user\n", "assistant\n")
    for number in range(100):
        yield f" {number}, {number:02} = Answer: "
    for problem in generate_ledgers(40, 100, seed=-1):
        yield problem.text
