"""Samples of forks and joins for `drift`: five built in, or read from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sgl_apr.errors import AprError


@dataclass(frozen=True, slots=True)
class JoinSample:
    """A fork and its join.

    Attributes:
        prefix: The text before the fork.
        branches: The texts of the branches.
        header: The text right after the join.
    """

    prefix: str
    branches: tuple[str, ...]
    header: str


BUILTIN_SAMPLES = (
    JoinSample(
        "Question: What should I know before I get a dog?\n\n",
        (
            "Idea 1: A dog needs time. It wants to be walked two or three times a day, in any weather.\n",
            "Idea 2: A dog costs money. Food, a vet and insurance add up to more than a thousand a year.\n",
            "Idea 3: A dog needs training, and most of all in its first year.\n",
        ),
        "\nIn short, before you get a dog,",
    ),
    JoinSample(
        "Question: Anna has 3 bags with 4 apples each, and Ben has 5 apples. How many apples are there?\n\n",
        ("Part 1: Anna has 3 times 4 apples, which is 12.\n", "Part 2: Ben has 5 apples.\n"),
        "\nTogether they have",
    ),
    JoinSample(
        "Compare whales and eagles.\n\n",
        (
            "Whales: They live in the sea, breathe air, and are the largest animals of all.\n",
            "Eagles: They live on cliffs and in tall trees, and hunt from the air with their sharp eyes.\n",
        ),
        "\nWhat both have in common is that",
    ),
    JoinSample(
        "Question: How can a city have less traffic?\n\n",
        (
            "1. Buses and trains that come often, so that nobody has to wait.\n",
            "2. Safe lanes for bicycles.\n",
            "3. A charge for driving into the centre.\n",
            "4. Homes, shops and offices that are close to one another, so that people can walk.\n",
        ),
        "\nThe most important of these is",
    ),
    JoinSample(
        "The detective had two witnesses.\n\n",
        (
            'The gardener said: "I saw a man in a red coat leave the house at nine."\n',
            'The cook said: "At ten the lady was still alive. I brought her tea."\n',
        ),
        "\nFrom what the two had said the detective concluded that the man in the red",
    ),
)


def read_samples(path: Path) -> list[JoinSample | str]:
    """Read samples from a file.

    Args:
        path: Lines of JSON with "prefix", "branches" and "header", and lines of text, which are questions.

    Returns:
        A sample for each line of JSON, and a string for each question.

    Raises:
        AprError: The file cannot be read, is empty, or a line is wrong. The message names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AprError(f"cannot read {path}: {error}") from None
    samples = [_parse_sample(line, f"{path}, line {k}") for k, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise AprError(f"{path} is empty, expected samples or questions")
    return samples


def _parse_sample(line: str, where: str) -> JoinSample | str:
    if not line.lstrip().startswith("{"):
        return line.strip()
    try:
        data = json.loads(line)
        sample = JoinSample(data["prefix"], tuple(data["branches"]), data["header"])
    except (ValueError, KeyError, TypeError) as error:
        raise AprError(f'{where}: expected "prefix", "branches" and "header" ({error!r})') from None
    if not all(isinstance(t, str) and t for t in (sample.prefix, sample.header, *sample.branches)):
        raise AprError(f"{where}: expected texts that are not empty")
    if isinstance(data["branches"], str) or len(sample.branches) < 2:
        raise AprError(f"{where}: expected a list of at least two branches")
    return sample
