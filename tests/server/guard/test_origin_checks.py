"""Who may send a request: the headers Host, Origin, Sec-Fetch-Site and Content-Type."""

from __future__ import annotations

import pytest

from sgl_apr.server.guard.limits import GuardLimits
from sgl_apr.server.guard.origin_checks import check_content_type, check_host, check_origin, is_loopback
from sgl_apr.server.guard.refusal import RequestRefused


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "LOCALHOST.", "a.localhost"]
)
def test_loopback(host: str):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.example.com", "127.0.0.1.example.com", ""])  # fmt: skip
def test_other_addresses(host: str):
    assert not is_loopback(host)


HOSTS = {
    b"localhost:30000": True, b"127.0.0.1": True, b"[::1]:30000": True, b"LOCALHOST": True,
    b"evil.example": False, b"evil.example:30000": False, b"127.0.0.1.evil.example": False,
    b"localhost@evil.example": False, b"": False, b"[::1": False, b"localhost:x": False, b"10.0.0.1": False,
}  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_the_host_of_a_server_on_loopback(host: bytes):
    def check(limits: GuardLimits, loopback: bool = True) -> None:
        check_host({b"host": host}, "http", limits, loopback=loopback)

    check(GuardLimits(), loopback=False)
    check(GuardLimits(hosts=("*",)))
    if HOSTS[host]:
        check(GuardLimits())
        return
    with pytest.raises(RequestRefused, match="--apr-allow-host") as caught:
        check(GuardLimits())
    assert caught.value.status == 421


def test_the_operator_names_hosts():
    limits = GuardLimits(hosts=("llm.example",))
    check_host({b"host": b"llm.example:443"}, "http", limits, loopback=True)
    with pytest.raises(RequestRefused):
        check_host({b"host": b"other.example"}, "http", limits, loopback=False)
    check_host({}, "http", limits, loopback=True)


OWN = {b"host": b"localhost:30000"}
ALLOWED = [
    {}, {b"origin": b"http://localhost:30000"}, {b"origin": b"HTTP://LOCALHOST:30000"}, {b"sec-fetch-site": b"same-origin"},
    {b"sec-fetch-site": b"none"}, {b"host": b"a.example", b"origin": b"https://a.example"},
]  # fmt: skip
FOREIGN = [
    {b"origin": b"http://evil.example"}, {b"origin": b"null"}, {b"origin": b"http://localhost:3000"}, {b"origin": b""},
    {b"origin": b"http://localhost:30000.evil.example"}, {b"origin": b"http://evil.example/localhost:30000"},
    {b"sec-fetch-site": b"cross-site"}, {b"sec-fetch-site": b"same-site"},
    {b"sec-fetch-site": b"cross-site", b"sec-fetch-mode": b"navigate"},
]  # fmt: skip


@pytest.mark.parametrize("headers", ALLOWED)
def test_requests_of_own_pages_and_of_programs(headers: dict[bytes, bytes]):
    check_origin({**OWN, **headers}, "http", "POST", "/generate", GuardLimits())


@pytest.mark.parametrize("headers", FOREIGN)
def test_requests_of_other_pages(headers: dict[bytes, bytes]):
    with pytest.raises(RequestRefused, match="--apr-allow-origin") as caught:
        check_origin({**OWN, **headers}, "http", "GET", "/flush_cache", GuardLimits())
    assert caught.value.status == 403
    check_origin({**OWN, **headers}, "http", "GET", "/flush_cache", GuardLimits(origins=("*",)))


def test_the_operator_names_origins():
    limits = GuardLimits(origins=("http://evil.example",))
    check_origin({**OWN, **FOREIGN[0]}, "http", "POST", "/generate", limits)
    with pytest.raises(RequestRefused):
        check_origin({**OWN, b"origin": b"http://other.example"}, "http", "POST", "/generate", limits)


def test_a_link_to_the_page_is_followed():
    headers = {**OWN, b"sec-fetch-site": b"cross-site", b"sec-fetch-mode": b"navigate"}
    check_origin(headers, "http", "GET", "/apr/ui", GuardLimits())
    with pytest.raises(RequestRefused):
        check_origin(headers, "http", "POST", "/apr/ui", GuardLimits())


@pytest.mark.parametrize(
    "value", [b"application/json", b"Application/JSON; charset=utf-8", b"application/vnd.api+json"]
)
def test_json(value: bytes):
    check_content_type({b"content-type": value}, "/generate")


@pytest.mark.parametrize("value", [b"text/plain", b"", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=a", b"text/json", b"application/jsonx"])  # fmt: skip
def test_what_a_page_may_send_to_another_site_is_no_json(value: bytes):
    with pytest.raises(RequestRefused, match="application/json") as caught:
        check_content_type({b"content-type": value}, "/generate")
    assert caught.value.status == 415


def test_a_file_is_uploaded_as_a_form():
    check_content_type({b"content-type": b"multipart/form-data; boundary=a"}, "/v1/audio/transcriptions")
