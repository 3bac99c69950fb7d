"""A real server: a slow grammar ends its own request with an error."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from transformers import AutoTokenizer

from sgl_apr.training.models import locate_model

pytestmark = pytest.mark.server


def generate(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url + "/generate", json.dumps(body).encode(), headers), timeout=60
        ) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    "ebnf",
    [
        'root ::= a "Z"\na ::= a a a | a a | "1"',
        'root ::= "1" a "Z"\na ::= '
        + " | ".join(f"b{i}" for i in range(150))
        + ' | "1"\n'
        + "\n".join(f"b{i} ::= a a" for i in range(150)),
    ],
)
def test_a_slow_grammar_ends_its_own_request(solver, ebnf: str):
    params = {"max_new_tokens": 900, "ebnf": ebnf, "temperature": 0}
    ids = AutoTokenizer.from_pretrained(str(locate_model("builtin"))).encode("Z", add_special_tokens=False)
    params["logit_bias"] = {str(token): -100 for token in ids}
    status, answer = generate(solver.url, {"text": "1", "sampling_params": params})
    assert status == 400
    assert "the grammar" in answer
    status, _ = generate(solver.url, {"text": "1", "sampling_params": {"max_new_tokens": 2}})
    assert status == 200
