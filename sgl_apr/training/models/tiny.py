"""A random-weight Llama with a few hundred tokens, built in seconds for tests."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.training.models.tags import add_to_tokenizer, validate_tags

END, TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
BPE_MERGES = 160
HEADS, KV_HEADS = 4, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = """\
system user assistant
The model thinks about the problem, and when the problem has parts that do not need each other, it splits.
Each part becomes a branch. The branches run at the same time, each with the same text before it, and none
of them sees the others. When they are done, the text of all the branches is joined, and the model goes on
from there. A problem that has no parts is solved in one line of thought: then nothing is split.
First, let us find the numbers. Then let us find the sum of the numbers. Then we know the answer.
If x is more than y, then y is less than x. So the answer is the number that is left: the answer is x + y.
<Parallel> <Outlines> <Outline> Outline </Outline> </Outlines> <Thread> Thread </Thread> </Parallel>
<Think> <Goal> <Path> Path </Path> </Goal> </Think> <Conclusion> the conclusion of the threads </Conclusion>
1: the first thread 2: the second thread 3: the third thread. 1: the first path 2: the second path.
"""


def random_llama(
    directory: Path,
    *,
    tags: Sequence[str] = (),
    layers: int = 3,
    hidden: int = 128,
    seed: int = 0,
    tag_bias: float = 0.0,
    eos_bias: float = 0.0,
    context: int = 8192,
) -> Path:
    """Write the checkpoint (float32) into a directory; the same arguments give the same weights.

    The tokenizer is a byte-level BPE that can encode any text, in which few tokens are words. The next-token distribution
    depends on the complete context, but is nearly flat (logits with a standard deviation of about 0.5), so that sampling
    reaches everything that a grammar allows.

    Args:
        directory: Where to write it.
        tags: One special token each; without them tags are ordinary text.
        layers: Number of layers.
        hidden: Hidden size.
        seed: Seed of the weights.
        tag_bias: Added to the logits of the tags, within 1%: at temperature 1 a tag is exp(tag_bias) times as likely as
            another token.
        eos_bias: The same for `<|im_end|>`.
        context: Tokens of the model's context.

    Returns:
        The directory.

    Raises:
        AprError: If the hidden size does not fit the heads.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    if hidden % (2 * HEADS) or hidden < 2 * HEADS:
        raise AprError(f"hidden = {hidden}, expected a multiple of {2 * HEADS}: {HEADS} heads of even size")
    tokenizer = _tokenizer(validate_tags(tags), context)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=hidden // HEADS,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype=torch.float32,
    )
    model = LlamaForCausalLM(config)
    biases = dict.fromkeys(tokenizer.convert_tokens_to_ids(list(tags)), tag_bias) | {eos: eos_bias}
    _draw_weights(model, seed, biases)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _tokenizer(tags: Sequence[str], context: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials, alphabet = [END, TURN, END_TURN], pre_tokenizers.ByteLevel.alphabet()
    size = len(specials) + len(alphabet) + BPE_MERGES
    options = {"special_tokens": specials, "initial_alphabet": alphabet, "show_progress": False}
    trainer: Any = trainers.BpeTrainer  # untyped there
    bpe.train_from_iterator(CORPUS.splitlines(keepends=True), trainer(vocab_size=size, **options))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_TURN, pad_token=END, model_max_length=context
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    add_to_tokenizer(tokenizer, tags)
    return tokenizer


def _draw_weights(model: Any, seed: int, biases: dict[int, float]) -> None:
    """Draw the weights so that hidden unit 0 is a constant, which turns column 0 of lm_head into a bias.

    Llama has no bias. Unit 0 gets the same large value from every embedding; no layer reads it (norm weight 0) or writes
    it (output row 0), and it outweighs the other units in every RMS. So the final norm, with weight 1/sqrt(hidden) there,
    gives nearly 1, and the other units pass the norms unscaled.
    """
    import torch

    hidden = model.config.hidden_size
    constant = 16 * sqrt(hidden)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # a norm
                weight.fill_(constant / sqrt(hidden))
                weight[0] = 1 / sqrt(hidden) if name == "model.norm.weight" else 0.0
                continue
            std = 1.0 if "embed_tokens" in name else 1 / sqrt(weight.shape[1])
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                std *= 3  # sharp attention instead of an average, so that the far past counts too
            if writes := name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= sqrt(2 * model.config.num_hidden_layers)  # the sum over the layers keeps its scale
            weight.normal_(std=std, generator=generator)
            if writes:
                weight[0] = 0.0
        model.model.embed_tokens.weight[:, 0] = constant
        head = model.lm_head.weight
        head.mul_(0.4)
        head[:, 0] = 0.0
        for token, bias in biases.items():
            head[token, 0] = bias
