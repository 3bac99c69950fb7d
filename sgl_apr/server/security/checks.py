"""Checks a running SGLang server for the faults that `docs/security.md` lists, without harm to it.

A check sends a request that could harm a server only if the server is certain to refuse it before its scheduler: the
request is invalid in a second way, which every SGLang server refuses, or the server has shown that it is ours.
Otherwise the result is "not probed".
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from sgl_apr.errors import EngineError
from sgl_apr.server.guard.origin_checks import is_loopback
from sgl_apr.server.security.http_probe import Answer, HttpProbe

State = Literal["pass", "FAIL", "not probed"]

FOREIGN_SITE = "https://attacker.invalid"
HUGE_BODY_BYTES = 10**12
HUGE_BODY_WAIT_S = 5.0
BODY_WAIT_S = 65.0  # seconds for a half-sent body: `sgl-apr serve` closes it after 60
VICTIM_TOKENS, VICTIM_WAIT_S = 1024, 3.0
REDACTED_VALUES = (None, "", "<redacted>")
SECRET_NAMES = ("api_key", "admin_api_key", "ssl_keyfile_password")
OUR_FLAG = "--apr-"  # refusals of `sgl-apr serve` name the flag that sets the limit
USE_OURS = "serve with sgl-apr serve, or put a proxy in front of it"


@dataclass(frozen=True, slots=True)
class SecurityFinding:
    """The result of one check.

    Attributes:
        name: What was checked.
        state: "pass", "FAIL", or "not probed".
        found: What was found, or why it was not probed.
        hint: How to close the fault.
    """

    name: str
    state: State
    found: str
    hint: str = ""


def is_secure(findings: Sequence[SecurityFinding]) -> bool:
    """Return whether no check failed."""
    return all(finding.state != "FAIL" for finding in findings)


class SecurityCheck:
    """All checks of one server.

    Args:
        url: The server.
        api_key: The key that its clients have.
        body_wait: Seconds to wait for a half-sent body to be refused. 0 leaves that check out.
    """

    def __init__(self, url: str, api_key: str | None = None, body_wait: float = BODY_WAIT_S) -> None:
        self._http = HttpProbe(url, api_key)
        self._api_key, self._body_wait = api_key, body_wait

    def run(self) -> Iterator[SecurityFinding]:
        """Yield the result of each check.

        Raises:
            EngineError: The server cannot be reached.
        """
        self._http.send("/model_info")
        checks: tuple[tuple[str, Callable[[], SecurityFinding]], ...] = (
            ("open without a key", self._open_without_key),
            ("keys in answers", self._keys_in_answers),
            ("foreign pages (CORS)", self._cors),
            ("foreign Host", self._foreign_host),
            ("size of a body", self._body_size),
            ("length of a prompt", self._prompt_length),
            ("n", lambda: self._refused_field("n", {"n": 1_000_000}, "--apr-max-n")),
            ("stop_regex", lambda: self._refused_field("stop_regex", {"stop_regex": "(?:.|.)*!"}, "--apr-allow-stop-regex")),
            ("sessions", self._sessions),
            ("logit_bias", lambda: self._bad_value({"logit_bias": {"-5": 1.0}})),
            ("top_k", lambda: self._bad_value({"top_k": -5})),
            ("token ids", lambda: self._bad_value({}, input_ids=[-1])),
            ("ids of requests", self._prefix_abort),
        )  # fmt: skip
        with ThreadPoolExecutor(1) as executor:
            half_sent = executor.submit(_run, "half-sent bodies", self._half_sent_body)
            for name, check in checks:
                yield _run(name, check)
            yield half_sent.result()

    @cached_property
    def _needs_key(self) -> bool:
        return self._http.send("/v1/models", with_key=False).status in (401, 403)

    @cached_property
    def _server_info(self) -> Any:
        return self._http.send("/server_info").json or {}

    @cached_property
    def _is_ours(self) -> bool:
        return OUR_FLAG in self._refusal({"stop_regex": "x"}).text

    def _refusal(self, sampling: dict[str, Any]) -> Answer:
        # Without a prompt every SGLang server refuses the request, before it makes anything of the parameters.
        return self._http.send("/generate", {"sampling_params": sampling})

    def _open_without_key(self) -> SecurityFinding:
        name = "open without a key"
        if self._needs_key:
            return SecurityFinding(name, "pass", "requests without a key are refused")
        host = str(self._server_info.get("host") or self._http.host)
        if is_loopback(host) and is_loopback(self._http.host):
            return SecurityFinding(name, "pass", f"it has no key, but listens on {host} only")
        found = f"everybody who reaches {self._http.host}:{self._http.port} can use it"
        return SecurityFinding(name, "FAIL", found, "set SGL_APR_API_KEY or --api-key-file FILE")

    def _keys_in_answers(self) -> SecurityFinding:
        name, hint = "keys in answers", f"{USE_OURS} that does not pass /server_info on"
        readable, has_key = False, False
        for path in ("/server_info", "/get_server_info", "/model_info"):
            for with_key in (True, False):
                answer = self._http.send(path, with_key=with_key)
                readable |= answer.status == 200
                leaked, redacted = _find_keys(answer.json, self._api_key)
                has_key |= redacted
                if leaked:
                    return SecurityFinding(name, "FAIL", f"GET {path} has {', '.join(sorted(leaked))}", hint)
        if not readable:
            return SecurityFinding(name, "not probed", "GET /server_info is refused", "pass --api-key")
        if not has_key and not self._needs_key:
            return SecurityFinding(name, "not probed", "the server has no key")
        return SecurityFinding(name, "pass", "GET /server_info has no key")

    def _cors(self) -> SecurityFinding:
        name = "foreign pages (CORS)"
        preflight = {"Origin": FOREIGN_SITE, "Access-Control-Request-Method": "POST"}
        allowed = self._http.send(
            "/generate",
            headers=preflight | {"Access-Control-Request-Headers": "content-type"},
            method="OPTIONS",
        )
        read = self._http.send("/v1/models", headers={"Origin": FOREIGN_SITE})
        for answer in (allowed, read):
            origin = answer.headers.get("access-control-allow-origin")
            credentials = answer.headers.get("access-control-allow-credentials") == "true"
            if origin in ("*", FOREIGN_SITE) and (credentials or not self._needs_key):
                found = f"pages of every site may read answers{', with credentials' if credentials else ''}"
                return SecurityFinding(
                    name, "FAIL", found, f"{USE_OURS}; name the sites with --apr-allow-origin"
                )
        return SecurityFinding(name, "pass", "pages of other sites cannot read answers")

    def _foreign_host(self) -> SecurityFinding:
        name = "foreign Host"
        if not is_loopback(self._http.host):
            return SecurityFinding(name, "not probed", "it matters only for a server on this machine")
        answer = self._http.send("/v1/models", headers={"Host": "attacker.invalid"}, with_key=False)
        if answer.status == 200:
            found = "a page whose name an attacker points to this machine can use the server"
            return SecurityFinding(name, "FAIL", found, "serve with sgl-apr serve, or set a key")
        return SecurityFinding(name, "pass", f"status {answer.status}")

    def _body_size(self) -> SecurityFinding:
        name = "size of a body"
        line, _ = self._http.send_part("/generate", HUGE_BODY_BYTES, b"{", HUGE_BODY_WAIT_S)
        if line == "no answer":
            found = f"a body of {HUGE_BODY_BYTES:.0e} bytes is waited for"
            return SecurityFinding(name, "FAIL", found, "serve with sgl-apr serve: --apr-max-body-bytes")
        return SecurityFinding(name, "pass", line or "the connection is closed")

    def _half_sent_body(self) -> SecurityFinding:
        name = "half-sent bodies"
        if self._body_wait <= 0:
            return SecurityFinding(name, "not probed", "the time to wait is 0", "--body-wait 65")
        line, seconds = self._http.send_part("/generate", 100, b'{"text": ', self._body_wait)
        if line == "no answer":
            found = f"half a body is still waited for after {seconds:.0f} s"
            return SecurityFinding(name, "FAIL", found, "serve with sgl-apr serve: --apr-body-timeout")
        return SecurityFinding(name, "pass", f"{line or 'closed'} after {seconds:.1f} s")

    def _prompt_length(self) -> SecurityFinding:
        name = "length of a prompt"
        if not self._is_ours:
            return SecurityFinding(name, "not probed", "another server would encode all of it", USE_OURS)
        context = int(
            self._server_info.get("context_length") or self._server_info.get("max_req_input_len") or 0
        )
        # Invalid as well: a prompt is either text or ids.
        text = "x" * min(4_000_000, 300 * (context or 8192))
        answer = self._http.send("/generate", {"text": text, "input_ids": [1], "input_embeds": [[0.0]]})
        if answer.status in (400, 413) and OUR_FLAG in answer.text:
            return SecurityFinding(
                name, "pass", f"{len(text)} characters are refused before they are encoded"
            )
        found = f"{len(text)} characters: status {answer.status}"
        return SecurityFinding(name, "not probed", found, "lower --apr-max-prompt-chars")

    def _refused_field(self, name: str, sampling: dict[str, Any], flag: str) -> SecurityFinding:
        answer = self._refusal(sampling)
        if answer.status in (401, 403):
            return SecurityFinding(name, "not probed", "the server wants a key", "pass --api-key")
        value = next(iter(sampling.values()))
        if 400 <= answer.status < 500 and (
            flag in answer.text or re.search(rf"\b{name}\b", _message(answer))
        ):
            return SecurityFinding(name, "pass", f"{name}={value!r} is refused")
        return SecurityFinding(
            name, "FAIL", f"{name}={value!r} is not refused", f"serve with sgl-apr serve: {flag}"
        )

    def _sessions(self) -> SecurityFinding:
        # A session that does not exist, and no prompt: every server refuses the request without harm.
        answer = self._http.send("/generate", {"session_params": {"id": "sgl-apr-doctor"}})
        if answer.status in (401, 403):
            return SecurityFinding("sessions", "not probed", "the server wants a key", "pass --api-key")
        if "--apr-allow-sessions" in answer.text:
            return SecurityFinding("sessions", "pass", "sessions are refused")
        found, hint = (
            "sessions are allowed, and any client can end the server with one",
            "serve with sgl-apr serve, without",
        )
        return SecurityFinding("sessions", "FAIL", found, f"{hint} --apr-allow-sessions")

    def _bad_value(self, sampling: dict[str, Any], **prompt: Any) -> SecurityFinding:
        field = next(iter(sampling or prompt))
        name = "token ids" if prompt else field
        if not self._is_ours:
            return SecurityFinding(
                name, "not probed", "it would end a server that does not check it", USE_OURS
            )
        body = (prompt or {"text": "x"}) | {"sampling_params": sampling | {"max_new_tokens": 1}}
        answer = self._http.send("/generate", body)
        value = (sampling | prompt)[field]
        if 400 <= answer.status < 500:
            return SecurityFinding(name, "pass", f"{field}={value!r} is refused")
        return SecurityFinding(name, "FAIL", f"{field}={value!r}: status {answer.status}", "update sgl-apr")

    def _prefix_abort(self) -> SecurityFinding:
        """Start a request, then one whose id is a prefix of the first one's, and leave the second."""
        name, prefix = "ids of requests", f"sgl-apr-doctor-{secrets.token_hex(8)}-"
        context = int(self._server_info.get("max_req_input_len") or 256)
        sampling = {"max_new_tokens": min(VICTIM_TOKENS, context // 2), "ignore_eos": True}
        body = {"text": "x", "stream": True, "sampling_params": sampling}
        with self._http.stream("/generate", body | {"rid": prefix + "1"}) as victim:
            if victim.status != 200 or not victim.readline():
                return SecurityFinding(name, "not probed", f"POST /generate: status {victim.status}")
            with self._http.stream("/generate", body | {"rid": prefix}) as other:
                other.readline()
            left, last = time.monotonic(), b""
            while (line := victim.readline()) and time.monotonic() - left < VICTIM_WAIT_S:
                last = line if line.startswith(b"data: {") else last
                if b'"abort"' in last:
                    found = "a request ends others, whose ids begin with its own, when its client leaves"
                    return SecurityFinding(name, "FAIL", found, "serve with sgl-apr serve")
            if time.monotonic() - left < 0.5:
                return SecurityFinding(name, "not probed", "the requests ended too soon")
        return SecurityFinding(name, "pass", "a request ends only itself when its client leaves")


def _run(name: str, check: Callable[[], SecurityFinding]) -> SecurityFinding:
    try:
        return check()
    except EngineError as error:
        return SecurityFinding(name, "not probed", str(error), "see the server's log")


def _find_keys(answer: Any, api_key: str | None) -> tuple[set[str], bool]:
    """Return where an answer has a key, and whether it says that there is one."""
    leaked: set[str] = set()
    redacted = False
    if isinstance(answer, dict):
        for name, value in answer.items():
            if name in SECRET_NAMES:
                redacted |= value == "<redacted>"
                if value not in REDACTED_VALUES:
                    leaked.add(name)
            inner, inner_redacted = _find_keys(value, api_key)
            redacted |= inner_redacted
            if name not in leaked:
                leaked |= {f"{name}.{place}" if place else str(name) for place in inner}
    elif isinstance(answer, list):
        for value in answer:
            inner, inner_redacted = _find_keys(value, api_key)
            leaked, redacted = leaked | inner, redacted | inner_redacted
    elif isinstance(answer, str) and api_key and len(api_key) > 3 and api_key in answer:
        leaked.add("")
    return leaked, redacted


def _message(answer: Answer) -> str:
    error = answer.json.get("error", {}) if isinstance(answer.json, dict) else {}
    return str(error.get("message", "")) if isinstance(error, dict) else ""
