"""Facts of demonstrations against data that other packages install, and computed answers against other computations."""

from __future__ import annotations

import calendar
import random
import re

import pytest

from sgl_apr.training.demonstrations.computed_topics import MONTHS, computed_topics, roman_numeral
from sgl_apr.training.demonstrations.gym_questions import DATASETS, ask_puzzle
from sgl_apr.training.demonstrations.topics import fact_topics

TOPICS = {topic.name: topic for topic in (*fact_topics(), *computed_topics())}


def facts(name: str) -> dict[str, str]:
    rng = random.Random(0)
    return dict(TOPICS[name].draw(rng) for _ in range(2000))


def test_currencies_are_those_of_the_unicode_consortium():
    babel = pytest.importorskip("babel")
    pycountry = pytest.importorskip("pycountry")
    from babel.numbers import get_territory_currencies

    english = babel.Locale("en")
    for country, currency in facts("currency").items():
        code = pycountry.countries.lookup("Türkiye" if country == "Turkey" else country).alpha_2
        (current,) = get_territory_currencies(code)[:1]
        assert currency.lower() in english.currencies[current].lower(), country


def test_countries_exist_and_languages_are_official_or_most_spoken():
    babel = pytest.importorskip("babel")
    pycountry = pytest.importorskip("pycountry")
    from babel.languages import get_official_languages

    names = {"Turkey": "Türkiye", "Iran": "Iran, Islamic Republic of", "Vietnam": "Viet Nam"}
    english = babel.Locale("en")
    for country, language in facts("language").items():
        code = pycountry.countries.lookup(names.get(country, country)).alpha_2
        known = get_official_languages(code, regional=True, de_facto=True)
        assert language in [english.languages.get(tag.split("_")[0]) for tag in known], country
    for topic in ("capital", "continent"):
        for country in facts(topic):
            assert pycountry.countries.lookup(names.get(country, country))


def test_computed_answers():
    assert [roman_numeral(n) for n in (4, 9, 14, 40, 58)] == ["IV", "IX", "XIV", "XL", "LVIII"]
    assert facts("month_days") == {
        MONTHS[k - 1]: str(calendar.monthrange(2023, k)[1]) for k in range(1, 13) if k != 2
    }
    assert facts("next_date")["February 28"] == "March 1"
    assert facts("weekday")["Sunday"] == "Monday"
    assert facts("vowels")["orange"] == "3"
    assert facts("minutes")["3 hours"] == "180"
    assert facts("perimeter")["a 3 by 5 rectangle"] == "16"
    assert facts("area")["a 3 by 5 rectangle"] == "15"
    for topic in computed_topics():
        if topic.is_numeric:
            assert all(answer.isdigit() for answer in facts(topic.name).values()), topic.name


def test_questions_read_well():
    rng = random.Random(0)
    for topic in TOPICS.values():
        for question in topic.ask_several(rng, 4):
            assert question.text[0].isupper() or question.text[0] in '"0123456789'
            assert question.text[-1] in ".?"
            assert question.answer in question.statement
            assert not {" a a", " a e", " a i", " a o"} & {
                question.text[i : i + 4] for i in range(len(question.text))
            }


@pytest.mark.slow  # reasoning-gym takes seconds to import
@pytest.mark.parametrize("split", ["train", "test"])
def test_puzzles_are_judged_right_by_their_library(split: str):
    gym = pytest.importorskip("reasoning_gym")
    rng = random.Random(0)
    for _ in range(20):
        puzzle = ask_puzzle(rng, split)
        dataset = DATASETS[puzzle.topic]
        assert dataset.held_out == (split == "test")
        entries = gym.create_dataset(puzzle.topic, size=400, seed=0, **dataset.options)
        core = re.escape(puzzle.text.removeprefix("Calculate ").rstrip("."))
        texts = (" ".join(entry["question"].split()) for entry in entries)
        index = next(
            k for k, text in enumerate(texts) if re.search(rf"(?<![\d-]){core}", text, re.IGNORECASE)
        )
        entry = entries[index]
        assert entries.score_answer(puzzle.answer, entry) == 1.0
        assert puzzle.statement == f"The answer is {puzzle.answer}."
