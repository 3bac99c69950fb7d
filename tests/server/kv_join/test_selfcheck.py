"""The identities of KV joins: they hold on a sound server, and a server that breaks one does not start."""

from __future__ import annotations

from math import log
from pathlib import Path

import pytest

from sgl_apr.errors import EngineError, LaunchError
from sgl_apr.server.kv_join import selfcheck
from sgl_apr.server.kv_join.probe import ProbePrompt, ProbeReply, commit_branches, make_client, send_prompts
from sgl_apr.server.kv_join.selfcheck import (
    DECODED_TOKENS,
    IdentityCheck,
    _curvature,
    check_identities,
    mean_logprob_difference,
    reply_distance,
)
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import random_llama

JOIN = ProbePrompt((*range(130, 142),), (5, ((3,), (2,)), 2))

# A plugin of SGLang, found by its metadata on PYTHONPATH: it breaks what it is named after.
PLUGIN = """
from dataclasses import replace
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

BROKEN = {
    "positions": (
        "sgl_apr.server.kv_join.cache_keys.resolve", lambda found, *_, **__: replace(found, offset=0), HookType.AFTER
    ),
    "order": ("sgl_apr.server.kv_join.validation.has_layout", lambda *_: False, HookType.REPLACE),
}

def activate():
    HookRegistry.register(*BROKEN["{what}"])
"""


def break_(what: str, directory: Path) -> Path:
    """A directory for PYTHONPATH."""
    metadata = directory / "broken-1.dist-info"
    metadata.mkdir()
    (directory / "broken.py").write_text(PLUGIN.replace("{what}", what))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\nbroken = broken:activate\n")
    return directory


def test_how_far_rows_are_apart():
    assert mean_logprob_difference({1: -1.0, 2: -3.0}, {1: -1.5, 2: -3.0}) == 0.25
    assert mean_logprob_difference({1: -1.0, 2: -3.0}, {2: -3.0, 3: -3.5}) == 2.5 / 4, (
        "1 is no likelier than 3 there"
    )
    assert mean_logprob_difference({1: -1.0}, {2: -1.0}) == 0, "they may be as likely as one another"


def test_replies_are_compared_until_they_part():
    near, far = {7: -0.7, 8: -0.7}, {7: -4.7, 8: -4.7}
    same = ProbeReply((7, 7), (near, near), (), 0)
    assert reply_distance(same, ProbeReply((7, 8), (near, far), (), 0)) == 2, "what led to the parting counts"
    assert reply_distance(same, ProbeReply((8, 7), (near, far), (), 0)) == 0, "what comes behind it does not"


def test_the_bend_of_copies():
    """Attention to one other key: its weight is k / (k + 1), which is no parabola in 1/k, but nearly."""
    straight = [{1: 3.0 + 2.0 / k} for k in (1, 2, 3, 4)]
    assert _curvature(*straight) == pytest.approx(0)
    assert 1e-4 < _curvature(*({1: log(k / (k + 1))} for k in (1, 2, 3, 4))) < 0.03
    assert _curvature(*({1: 3.0 + 2.0 / k + k} for k in (1, 2, 3, 4))) > 0.2, (
        "each copy moves what follows on"
    )


def test_a_check_that_text_passes_says_nothing():
    assert IdentityCheck("order", 0.1, 0.2, 0.1).is_uninformative
    assert not IdentityCheck("order", 0.1, 0.2, 0.3).is_uninformative
    assert not IdentityCheck("reuse", 0, 0).is_uninformative
    assert str(IdentityCheck("order", 0.5, 0.001, 0.25)) == "order: off by 0.5, allowed 0.001 (as text 0.25)"


@pytest.mark.parametrize(
    ("rounds", "starts"),
    [
        ([()], True),
        ([("positions",), ()], True),
        ([("positions",), ("order",)], True),
        ([("positions", "order"), ("order",), ("order", "positions")], False),
    ],
)
def test_what_is_missed_with_some_tokens_only_is_no_fault(
    rounds: list[tuple[str, ...]], starts: bool, monkeypatch: pytest.MonkeyPatch
):
    found = iter(
        [[IdentityCheck(n, 1.0 * (n in bad), 0.1) for n in ("positions", "order")] for bad in rounds]
    )
    monkeypatch.setattr(selfcheck, "check_identities", lambda ask: next(found))
    if starts:
        selfcheck.assert_joins_correct(lambda body: None)
    else:
        with pytest.raises(LaunchError, match=r"model \(order: off by 1, allowed 0.1\)"):
            selfcheck.assert_joins_correct(lambda body: None)
    assert not list(found), "every round was needed"


@pytest.mark.server
@pytest.mark.parametrize("seed", range(3))
def test_every_identity_holds_on_a_sound_server(server, seed: int):
    for found in check_identities(make_client(server.url), seed):
        assert found.ok, str(found)
        assert not found.is_uninformative, str(found)


@pytest.mark.server
def test_a_join_needs_its_branches(server):
    ask = make_client(server.url)
    with pytest.raises(EngineError, match="are cached") as lost:
        send_prompts(ask, [JOIN], DECODED_TOKENS)
    assert lost.value.status == 409
    commit_branches(ask, [JOIN])
    (reply,) = send_prompts(ask, [JOIN], DECODED_TOKENS, tokens=[[5, 6]])
    assert reply.cached == len(JOIN.ids) - 2
    assert len(reply.tokens) == DECODED_TOKENS
    assert all(set(row) == {5, 6} for row in reply.chosen)


def test_no_server_is_an_error():
    with pytest.raises(EngineError, match=r"no answer from http://127\.0\.0\.1:9"):
        check_identities(make_client("http://127.0.0.1:9"))


@pytest.mark.server
@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize("what", ["positions", "order"])
def test_a_server_that_joins_wrongly_does_not_start(what: str, tmp_path: Path, monkeypatch):
    """Tokens behind a join that stand where they would in a line; layouts that are not looked at."""
    monkeypatch.setenv("PYTHONPATH", str(break_(what, tmp_path)))
    server = Server(
        random_llama(tmp_path / "model", seed=3), radix_cache_backend="apr", max_total_tokens=2048
    )
    with pytest.raises(LaunchError, match=rf"{what}: off by .*--radix-cache-backend stock"), server:
        pass
