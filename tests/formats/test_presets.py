"""Presets of published checkpoints, and the dialect of a tokenizer."""

from __future__ import annotations

import copy
import pickle

import pytest

import sgl_apr as apr


@pytest.mark.parametrize("name", ["threadweaver", "multiverse", "npr", "parallel_r1"])
def test_presets_have_prompts_and_sources(name: str):
    preset = apr.preset(name)
    assert preset.dialect is apr.dialect(name)
    assert preset.sources
    assert preset.prompt_source
    assert preset.format_question("Why?").startswith("Why?")
    assert all(apr.preset(model) is not None and "/" in model for model in preset.models)


def test_a_preset_has_the_published_join():
    assert apr.preset("multiverse").join == "kv"
    assert apr.preset("threadweaver").join == "text"
    apr.reason("answer", "multiverse", join="kv")
    with pytest.raises(apr.KvJoinUnavailable, match="threadweaver joins by text"):
        apr.reason("answer", "threadweaver", join="kv")


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(apr.GrammarError, match="expected one of threadweaver, multiverse, npr, parallel_r1"):
        apr.preset("nobody/nothing")


@pytest.mark.parametrize("name", apr.dialect_names())
def test_a_tokenizer_names_its_dialect(name: str):
    assert apr.dialect_for(apr.ByteTokenizer(apr.dialect(name).tags)) is apr.dialect(name)


def test_a_tokenizer_without_all_tags_has_no_dialect():
    tags = apr.dialect("threadweaver").tags
    assert apr.dialect_for(apr.ByteTokenizer(tags[:4])) is None
    assert apr.dialect_for(apr.ByteTokenizer()) is None
    assert apr.dialect_for(apr.ByteTokenizer([*tags, *apr.dialect("npr").tags])) is None, (
        "it has the tags of two dialects"
    )
    without = [t for t in tags if "Conclusion" not in t]
    assert apr.dialect_for(apr.ByteTokenizer(without)) is apr.dialect("threadweaver")


def test_a_preset_can_be_pickled_copied_and_hashed():
    for name in ("npr", "threadweaver"):
        original = apr.preset(name)
        restored = pickle.loads(pickle.dumps(original))
        assert restored == original
        assert restored.sampling == original.sampling
        assert hash(restored) == hash(original)
        assert copy.deepcopy(original) == original
