"""Fuzzed requests to all routes of a real server, made from the schemas of its /openapi.json.

None may be answered with status 500, take over two seconds, let the server's memory grow, or change its answers.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from sgl_apr.server.api.compatible.messages_request import MESSAGES_FIELDS
from sgl_apr.server.api.compatible.responses_request import RESPONSES_FIELDS
from sgl_apr.server.api.openai.fields import OPENAI_FIELDS
from sgl_apr.server.launch.launcher import Server
from tests.support.processes import CoreWait, allocated_bytes, until

pytestmark = [pytest.mark.server, pytest.mark.timeout(3000)]
KEY, ADMIN_KEY = "ordinary", "of-the-admin"
QUICK, LONG = 120, 10_000
WARM_UP = 0.3  # share of the requests before memory is measured
STEPS = 7  # how often it is measured afterwards
MAX_SECONDS = 2.0
MAX_GROWTH = 20 * 2**20  # bytes
MODEL_FLAGS = {"context_length": 128, "max_total_tokens": 4096}  # so that no valid request takes long
LIMITS = {"apr_max_n": 4, "apr_max_prompts": 32, "apr_max_seconds": 1.5}
STOPS = "stops, pauses or slows the server for everybody"
CHANGES = "changes weights, adapters, cache or configuration of the server for everybody"
WRITES = "makes the server write files or open connections"
# The routes that need the admin key: they are not run, because the ordinary key must not open them.
ADMIN_ROUTES = {
    "/set_internal_state": CHANGES, "/flush_cache": STOPS, "/add_external_corpus": WRITES,
    "/remove_external_corpus": WRITES, "/list_external_corpora": CHANGES, "/hicache/storage-backend": CHANGES,
    "/hicache/storage-backend/clear": CHANGES, "/start_profile": WRITES, "/stop_profile": WRITES,
    "/set_trace_level": CHANGES, "/freeze_gc": CHANGES, "/start_expert_distribution_record": WRITES,
    "/stop_expert_distribution_record": WRITES, "/dump_expert_distribution_record": WRITES,
    "/update_weights_from_disk": CHANGES, "/init_weights_send_group_for_remote_instance": WRITES,
    "/send_weights_to_remote_instance": WRITES, "/get_remote_instance_transfer_engine_info": WRITES,
    "/remote_instance_transfer_engine_info": WRITES, "/init_weights_update_group": WRITES,
    "/destroy_weights_update_group": CHANGES, "/update_weights_from_tensor": CHANGES, "/begin_weight_update": CHANGES,
    "/end_weight_update": CHANGES, "/update_weights_from_distributed": CHANGES, "/update_weights_from_ipc": CHANGES,
    "/update_weight_version": CHANGES, "/get_weights_by_name": CHANGES, "/release_memory_occupation": STOPS,
    "/resume_memory_occupation": CHANGES, "/weights_checker": CHANGES, "/slow_down": STOPS, "/pd_role_switch": CHANGES,
    "/load_lora_adapter": CHANGES, "/load_lora_adapter_from_tensors": CHANGES, "/unload_lora_adapter": CHANGES,
    "/configure_logging": WRITES, "/abort_request": STOPS, "/pause_generation": STOPS, "/continue_generation": STOPS,
}  # fmt: skip
APR_FIELDS = {
    "/v1/chat/completions": OPENAI_FIELDS, "/v1/completions": OPENAI_FIELDS, "/v1/responses": RESPONSES_FIELDS,
    "/v1/messages": MESSAGES_FIELDS,
}  # fmt: skip
OFTEN = ("/apr/generate", "/v1/chat/completions", "/v1/completions", "/generate")
# Values that JSON schemas do not suggest, as they stand in a body.
NASTY = (
    "NaN", "Infinity", "1e999", "-0.0", "9" * 400, "9" * 5000, "18446744073709551617", "null", "true", "[]", "{}", '""',
    '"\\ud800"', '"\\u0000"', '"\\u202e"', "[" * 900 + "]" * 900, "[" * 50_000 + "]" * 50_000, '{"a":' * 200 + "1" + "}" * 200,
    '"' + "9" * 5000 + '"', '"quorum:' + "9" * 5000 + '"', '"deadline:' + "9" * 5000 + '"', "[[1], [2, 3]]", "[null]", "[[]]",
    '"' + "x" * 100_000 + '"', "[" + "1," * 100_000 + "1]",
)  # fmt: skip
QUERY_VALUES = (
    "",
    "x",
    "-1",
    "0",
    "1.5",
    "nan",
    "inf",
    "1e999",
    "9" * 400,
    "null",
    "core,x",
    ",",
    "\0",
    "\U000ab33c",
    "a" * 5000,
)


@pytest.fixture(scope="module")
def fuzzed(
    forked_server: type[Server], untagged: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("fuzzed") / "log"
    keys = {"api_key": KEY, "admin_api_key": ADMIN_KEY}
    with forked_server(untagged, log_path=log, **MODEL_FLAGS, **LIMITS, **keys) as server:
        yield server


class Fuzzer:
    """Sends fuzzed requests to a server, and records what must not happen."""

    def __init__(self, server: Server) -> None:
        self.url, self.failures = server.url, list[str]()
        self.statuses: Counter[int] = Counter()
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {KEY}"
        openapi = self._session.get(f"{server.url}/openapi.json", timeout=30).json()
        operations = [result.ok() for result in schemathesis.openapi.from_dict(openapi).get_all_operations()]
        self.operations = [operation for operation in operations if operation.path not in ADMIN_ROUTES]
        self.admin_operations = [operation for operation in operations if operation.path in ADMIN_ROUTES]
        self.often = [operation for operation in self.operations if operation.path in OFTEN]
        self._process = psutil.Process(server.pid)

    def draw(self, data: Any, operations: list[Any]) -> tuple[str, dict[str, Any]]:
        """Return a name and the arguments of a request: valid, invalid, or with a nasty value in its body."""
        operation = data.draw(st.sampled_from(operations))
        kind = data.draw(
            st.sampled_from(["valid", "valid", "invalid"])
        )  # most of the valid ones are refused, too
        # Schemathesis takes a minute to negate the schema of a chat completion, so bodies are changed here.
        negated = kind == "invalid" and not operation.body
        mode = GenerationMode.NEGATIVE if negated else GenerationMode.POSITIVE
        case = data.draw(operation.as_strategy(generation_mode=mode))
        arguments = case.as_transport_kwargs(base_url=self.url)
        arguments["headers"] = {**arguments.get("headers", {}), **self._session.headers}
        table, valid = APR_FIELDS.get(operation.path), arguments.get("json")
        # Most fields of SGLang cannot be combined with `apr`, so half of these requests have only those that can.
        if (
            table
            and kind == "valid"
            and isinstance(valid, dict)
            and valid.get("apr")
            and data.draw(st.booleans())
        ):
            arguments["json"] = {name: value for name, value in valid.items() if name in table.honoured}
        if kind == "invalid" and operation.body:
            names = sorted(operation.body[0].definition.get("schema", {}).get("properties", {}))
            for name in ("json", "files", "data"):
                arguments.pop(name, None)
            arguments["data"] = self.spoil(data, case.body, names).encode()
            arguments["headers"]["Content-Type"] = "application/json"
        return f"{operation.method.upper()} {operation.path} ({kind})", arguments

    def spoil(self, data: Any, body: Any, names: list[str]) -> str:
        """Return the JSON of a body with one to three values replaced by nasty ones, anywhere in it."""
        body = json.loads(json.dumps(body)) if isinstance(body, dict | list) else {}
        nasty = data.draw(st.lists(st.sampled_from(NASTY), min_size=1, max_size=3))
        if data.draw(st.integers(0, 19)) == 0:
            return nasty[0]
        for number in range(len(nasty)):
            place: Any = body
            while True:
                keys = (
                    range(len(place))
                    if isinstance(place, list)
                    else sorted({*place, *(names if place is body else ())})
                )
                key = data.draw(st.sampled_from(keys)) if keys else None
                inner = None if key is None or (isinstance(place, dict) and key not in place) else place[key]
                if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
                    place = inner
                    continue
                break
            if key is not None:
                place[key] = f"@{number}@"
        text = json.dumps(body)
        for number, value in enumerate(nasty):
            text = text.replace(f'"@{number}@"', value, 1)
        return text

    def send(self, name: str, arguments: dict[str, Any], *, repeated: bool = False) -> int:
        """Send a request and check its answer.

        One that is slow is sent again. The seconds for which this process and those of the server wait for a core of a
        busy machine then do not count. A valid chat completion decodes to the end of the context, and needs each of
        them for each of its tokens.
        """
        waiting = CoreWait(os.getpid(), *(process.pid for process in self.processes())) if repeated else None
        start = time.monotonic()
        try:
            response = self._session.request(**arguments, timeout=30, allow_redirects=False)
        except UnicodeError:  # no client can send such a header or path
            return 0
        except requests.RequestException as error:
            if isinstance(error, requests.exceptions.InvalidHeader | requests.exceptions.InvalidURL):
                return 0
            if isinstance(error, requests.ConnectionError) and not repeated:
                # The server closes a connection that was idle for some seconds, maybe just when it is used again.
                return self.send(name, arguments, repeated=True)
            self.failures.append(f"{name}: {error!r:.200}, {describe(arguments)}")
            return 0
        seconds = time.monotonic() - start - (waiting.seconds() if waiting else 0)
        self.statuses[response.status_code] += 1
        if response.status_code >= 500 and response.status_code != 503:
            self.failures.append(
                f"{name}: {response.status_code} {response.text[:200]}, {describe(arguments)}"
            )
        elif seconds > MAX_SECONDS and not repeated:
            return self.send(name, arguments, repeated=True)
        elif seconds > MAX_SECONDS:
            self.failures.append(f"{name}: {seconds:.1f} s twice, {describe(arguments)}")
        return response.status_code

    def request(
        self, method: str, path: str, query: dict[str, str], headers: dict[str, str]
    ) -> requests.Response:
        """Send a request with a query and no body."""
        return self._session.request(method, self.url + path, params=query, headers=headers, timeout=30)

    def processes(self) -> list[psutil.Process]:
        """The processes of the server: of the event loop, the scheduler and the detokenizer."""
        return [self._process, *self._process.children(recursive=True)]

    def memory(self) -> int:
        """The bytes that all processes of the server have allocated.

        Memory that is swapped out counts. Pages that a forked server shares with its parent count from the start, and
        not when it first writes to them, as garbage collection does to all objects.
        """
        return sum(allocated_bytes(process.pid) for process in self.processes())

    def greedy_answer(self) -> Any:
        body = {"text": "Once upon", "sampling_params": {"temperature": 0, "max_new_tokens": 24}}
        response = self._session.post(f"{self.url}/generate", json=body, timeout=30)
        response.raise_for_status()
        return response.json()["output_ids"]


def describe(arguments: dict[str, Any]) -> str:
    """Return a request in one short line."""
    body = arguments.get("data", arguments.get("json"))
    query = arguments.get("params")
    return f"{arguments['method']} {arguments['url'][:200]} {query or ''!s:.100} {body!s:.600}"


def fuzz(server: Server, count: int) -> None:
    fuzzer = Fuzzer(server)
    answer, sent, memory = fuzzer.greedy_answer(), 0, list[int]()
    measured = {int(count * (WARM_UP + (1 - WARM_UP) * step / STEPS)) for step in range(STEPS)}

    @seed(int(os.environ.get("SGL_APR_FUZZ_SEED", "1")))
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def run(data: Any) -> None:
        nonlocal sent
        operations = fuzzer.often if data.draw(st.booleans()) else fuzzer.operations
        name, arguments = fuzzer.draw(data, operations)
        fuzzer.send(name, arguments)
        sent += 1
        if sent in measured:
            memory.append(fuzzer.memory())

    run()
    assert not fuzzer.failures, "\n".join([f"{len(fuzzer.failures)} of {sent}:", *fuzzer.failures[:50]])
    assert sent >= count * 0.9, "Hypothesis gave up early"
    assert fuzzer.statuses[200] > count * 0.05, fuzzer.statuses
    assert fuzzer.statuses[400] > count * 0.2, fuzzer.statuses
    headers = {"Authorization": f"Bearer {KEY}"}
    until(lambda: requests.get(f"{server.url}/apr/stats", headers=headers, timeout=30).json()["running"] == 0)
    assert fuzzer.greedy_answer() == answer
    if count >= LONG:
        growth = [later - earlier for earlier, later in pairwise([*memory, fuzzer.memory()])]
        # One step may be a part of the server that a rare request uses for the first time. A leak grows in all steps.
        assert sum(growth) - max(growth) <= MAX_GROWTH, growth


def test_unusual_values_in_every_query(fuzzed: Server):
    """The operator's key opens all routes."""
    fuzzer, sent = Fuzzer(fuzzed), Counter[str]()
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    for operation in [*fuzzer.operations, *fuzzer.admin_operations]:
        for parameter in operation.query:
            for value in QUERY_VALUES:
                key = {} if operation.path not in ADMIN_ROUTES else headers
                response = fuzzer.request(operation.method, operation.path, {parameter.name: value}, key)
                assert response.status_code < 500, (operation.label, parameter.name, value, response.text)
                sent[parameter.name] += 1
    assert {"include", "dp_rank", "format", "timeout"} <= set(sent)


def test_some_fuzzed_requests(fuzzed: Server):
    fuzz(fuzzed, QUICK)


@pytest.mark.slow
def test_many_fuzzed_requests(fuzzed: Server):
    fuzz(fuzzed, LONG)


def test_the_ordinary_key_opens_no_route_of_the_admin(fuzzed: Server):
    fuzzer = Fuzzer(fuzzed)
    assert {operation.path for operation in fuzzer.admin_operations} == set(ADMIN_ROUTES)
    for operation in fuzzer.admin_operations:
        for headers in ({}, {"Authorization": f"Bearer {KEY}"}, {"Authorization": "Bearer wrong"}):
            response = requests.request(
                operation.method, fuzzed.url + operation.path, json={}, headers=headers, timeout=30
            )
            assert response.status_code in (401, 403), operation.label
