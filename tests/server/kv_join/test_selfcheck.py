"""The identities of KV joins hold on a correct server, and a server that breaks one does not start."""

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

# A plugin of SGLang, found by its metadata on PYTHONPATH. It breaks the identity that it is named after.
PLUGIN = """
from dataclasses import replace
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

BROKEN = {
    "positions": (
        "sgl_apr.server.kv_join.cache_keys.resolve", lambda resolved, *_, **__: replace(resolved, offset=0), HookType.AFTER
    ),
    "order": ("sgl_apr.server.kv_join.validation.has_layout", lambda *_: False, HookType.REPLACE),
}

def activate():
    HookRegistry.register(*BROKEN["{what}"])
"""


def break_(what: str, directory: Path) -> Path:
    """Write a plugin that breaks an identity, and return its directory for PYTHONPATH."""
    metadata = directory / "broken-1.dist-info"
    metadata.mkdir()
    (directory / "broken.py").write_text(PLUGIN.replace("{what}", what))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\nbroken = broken:activate\n")
    return directory


def test_the_difference_of_rows():
    assert mean_logprob_difference({1: -1.0, 2: -3.0}, {1: -1.5, 2: -3.0}) == 0.25
    assert mean_logprob_difference({1: -1.0, 2: -3.0}, {2: -3.0, 3: -3.5}) == 2.5 / 4, (
        "1 is no likelier than 3 there"
    )
    assert mean_logprob_difference({1: -1.0}, {2: -1.0}) == 0, "both may be equally likely"


def test_replies_are_compared_until_they_differ():
    near, far = {7: -0.7, 8: -0.7}, {7: -4.7, 8: -4.7}
    same = ProbeReply((7, 7), (near, near), (), 0)
    assert reply_distance(same, ProbeReply((7, 8), (near, far), (), 0)) == 2, (
        "the first different step counts"
    )
    assert reply_distance(same, ProbeReply((8, 7), (near, far), (), 0)) == 0, "later steps do not count"


def test_the_curvature_of_copies():
    """Attention to one other key: its weight is k / (k + 1), which is nearly a parabola in 1/k."""
    straight = [{1: 3.0 + 2.0 / k} for k in (1, 2, 3, 4)]
    assert _curvature(*straight) == pytest.approx(0)
    assert 1e-4 < _curvature(*({1: log(k / (k + 1))} for k in (1, 2, 3, 4))) < 0.03
    assert _curvature(*({1: 3.0 + 2.0 / k + k} for k in (1, 2, 3, 4))) > 0.2, (
        "each copy shifts the positions of what follows"
    )


def test_a_check_that_text_passes_is_uninformative():
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
def test_an_identity_that_fails_with_some_tokens_only_is_accepted(
    rounds: list[tuple[str, ...]], starts: bool, monkeypatch: pytest.MonkeyPatch
):
    results = iter(
        [[IdentityCheck(n, 1.0 * (n in bad), 0.1) for n in ("positions", "order")] for bad in rounds]
    )
    monkeypatch.setattr(selfcheck, "check_identities", lambda client: next(results))
    if starts:
        selfcheck.assert_joins_correct(lambda body: None)
    else:
        with pytest.raises(LaunchError, match=r"model \(order: off by 1, allowed 0.1\)"):
            selfcheck.assert_joins_correct(lambda body: None)
    assert not list(results), "every round was needed"


@pytest.mark.server
@pytest.mark.parametrize("seed", range(3))
def test_every_identity_holds_on_a_correct_server(server, seed: int):
    for check in check_identities(make_client(server.url), seed):
        assert check.ok, str(check)
        assert not check.is_uninformative, str(check)


@pytest.mark.server
def test_a_join_needs_its_branches(server):
    client = make_client(server.url)
    with pytest.raises(EngineError, match="are cached") as missing:
        send_prompts(client, [JOIN], DECODED_TOKENS)
    assert missing.value.status == 409
    commit_branches(client, [JOIN])
    (reply,) = send_prompts(client, [JOIN], DECODED_TOKENS, tokens=[[5, 6]])
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
    """Tokens after a join that have the positions of text; layouts that are ignored."""
    monkeypatch.setenv("PYTHONPATH", str(break_(what, tmp_path)))
    server = Server(
        random_llama(tmp_path / "model", seed=3), radix_cache_backend="apr", max_total_tokens=2048
    )
    with pytest.raises(LaunchError, match=rf"{what}: off by .*--radix-cache-backend stock"), server:
        pass
