"""The flags of the guard: their defaults, their values, and the errors of wrong ones."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from sgl_apr.server.guard.limits import LIMIT_FLAGS, GuardLimits, add_guard_arguments, parse_guard_arguments
from sgl_apr.server.launch.usage import UsageError


def test_every_limit_has_a_flag_with_help():
    parser = argparse.ArgumentParser()
    add_guard_arguments(parser)
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert set(actions) == {field.name for field in fields(GuardLimits)}
    assert all(action.help for action in actions.values())
    parser.format_help()


def test_flags_are_taken_out_of_the_arguments():
    limits, rest = parse_guard_arguments(
        ["--model", "m", "--apr-max-n", "4", "--apr-body-timeout", "2.5", "--apr-allow-stop-regex", "--apr-allow-sessions", "--port", "1",
         "--apr-allow-origin", "https://A.example/", "http://b", "--apr-allow-origin", "*"]
    )  # fmt: skip
    assert rest == ["--model", "m", "--port", "1"]
    assert (limits.n, limits.body_timeout, limits.stop_regex, limits.sessions) == (4, 2.5, True, True)
    assert limits.origins == ("https://a.example", "http://b", "*")
    assert parse_guard_arguments([]) == (GuardLimits(), [])


@pytest.mark.parametrize("flag", LIMIT_FLAGS)
@pytest.mark.parametrize("value", ["-1", "x", "nan", "1e99999", ""])
def test_a_wrong_value_is_an_error_that_names_the_flag(flag: str, value: str):
    with pytest.raises(UsageError, match=f"{flag}.*expected"):
        parse_guard_arguments([flag, value])
