"""A Qwen2.5-VL with random weights, which is small enough for tests. Its text has M-RoPE positions."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

from sgl_apr.training.models import random_llama

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
MROPE_SECTION = [4, 6, 6]  # frequencies for time, height and width: half of the 32 dimensions of a head


def random_qwen_vl(directory: Path) -> Path:
    """Write the checkpoint (float32) into a directory, and return the directory."""
    random_llama(directory)  # for its tokenizer
    (directory / "model.safetensors").unlink()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(list(VISION_TOKENS), special_tokens=True)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": MROPE_SECTION},
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]}, tie_word_embeddings=False,
        vision_start_token_id=start, vision_end_token_id=end, image_token_id=image, video_token_id=video,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1:
                weights.normal_(0, 0.06 if "lm_head" in name else 0.15)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    Qwen2VLImageProcessor().save_pretrained(directory)
    for file in ("preprocessor_config.json", "tokenizer_config.json"):
        path = directory / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": "Qwen2_5_VLProcessor"}))
    return directory
