"""The security checks of a server: what they need, what they print, and the errors of their requests."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from sgl_apr.cli.main import main
from sgl_apr.errors import EngineError
from sgl_apr.server.launch.preflight import free_port
from sgl_apr.server.security.checks import SecurityFinding, _find_keys, is_secure
from sgl_apr.server.security.http_probe import HttpProbe


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port", "http://[::1"])
def test_a_wrong_url_is_an_error(url: str):
    with pytest.raises(EngineError, match="URL"):
        HttpProbe(url)


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--security", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sgl-apr: error: /model_info: no answer (")
    assert len(captured.err.splitlines()) == 1


def test_it_needs_a_url(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--security"]) == 1
    assert "--security checks the running server that --url names" in capsys.readouterr().err


def test_half_a_body_is_answered_closed_or_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        probe = HttpProbe(f"http://127.0.0.1:{listener.getsockname()[1]}")
        line, seconds = probe.send_part("/generate", 100, b"{", 0.2)
    assert line == "no answer"
    assert 0.2 <= seconds < 5


def test_keys_are_found_wherever_they_are():
    stock = {
        "api_key": "K1",
        "port": 1,
        "internal_states": [{"admin_api_key": "K2"}],
        "launch_command": "--api-key KEY-3",
    }
    assert _find_keys(stock, "KEY-3") == (
        {"api_key", "internal_states.admin_api_key", "launch_command"},
        False,
    )
    ours = {
        "api_key": "<redacted>",
        "internal_states": [{"admin_api_key": None}],
        "launch_command": "--api-key=<redacted>",
    }
    assert _find_keys(ours, "KEY-3") == (set(), True)


def test_only_a_failed_check_makes_a_server_insecure():
    good, unknown = SecurityFinding("a", "pass", ""), SecurityFinding("b", "not probed", "")
    assert is_secure([good, unknown])
    assert not is_secure([good, unknown, SecurityFinding("c", "FAIL", "")])


def test_the_checks_do_not_import_sglang():
    program = "import sys, sgl_apr.cli.main, sgl_apr.server.security.checks; print('sglang' in sys.modules, 'torch' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["False", "False"]


@pytest.mark.parametrize("wait", ["-1", "nan", "inf", "soon"])
def test_a_wrong_wait_is_wrong_usage(wait: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--security", "--url", "http://127.0.0.1:1", f"--body-wait={wait}"])
    assert ended.value.code == 2
    assert "expected seconds of at least 0" in capsys.readouterr().err
