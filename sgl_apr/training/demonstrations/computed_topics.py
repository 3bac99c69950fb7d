"""Topics whose answers are computed: arithmetic, words, the calendar, and units."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import date, timedelta
from functools import cache

from sgl_apr.training.demonstrations.topics import Draw, Topic

WORDS = (
    "apple", "basket", "bridge", "candle", "castle", "circle", "cloud", "coffee", "copper", "corner", "cotton", "desert",
    "doctor", "dragon", "engine", "family", "feather", "finger", "flower", "forest", "garden", "guitar", "hammer", "harbor",
    "island", "jacket", "kettle", "kitchen", "ladder", "lemon", "letter", "market", "mirror", "monkey", "mountain",
    "needle", "ocean", "orange", "palace", "paper", "pencil", "pepper", "pillow", "planet", "pocket", "rabbit", "ribbon",
    "river", "rocket", "saddle", "school", "shadow", "silver", "singer", "spider", "spring", "station", "stone", "summer",
    "sugar", "table", "temple", "tiger", "tomato", "tunnel", "turtle", "valley", "velvet", "village", "violin", "wagon",
    "water", "window", "winter", "wizard", "yellow", "zebra",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
ROMAN = ((50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
VOWELS = "aeiou"


def roman_numeral(number: int) -> str:
    """A number up to 89 in Roman numerals.

    Examples:
        >>> roman_numeral(44)
        'XLIV'
    """
    text = ""
    for value, letters in ROMAN:
        while number >= value:
            text, number = text + letters, number - value
    return text


def _word(answer: Callable[[str], object]) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        word = rng.choice(WORDS)
        return word, str(answer(word))

    return draw


def _number(low: int, high: int, answer: Callable[[int], object]) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        number = rng.randint(low, high)
        return str(number), str(answer(number))

    return draw


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 60), rng.randint(2, 39)
    return f"{a} + {b}", str(a + b)


def _difference(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(20, 99), rng.randint(2, 19)
    return f"{a} - {b}", str(a - b)


def _product(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    return f"{a} x {b}", str(a * b)


def _quotient(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 12), rng.randint(2, 9)
    return f"{a * b} / {b}", str(a)


def _rectangle(answer: Callable[[int, int], int]) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return f"a {a} by {b} rectangle", str(answer(a, b))

    return draw


def _next_weekday(rng: random.Random) -> tuple[str, str]:
    k = rng.randrange(7)
    return WEEKDAYS[k], WEEKDAYS[(k + 1) % 7]


def _month_days(rng: random.Random) -> tuple[str, str]:
    k = rng.choice([0, *range(2, 12)])  # not February, whose length depends on the year
    first, following = date(2023, k + 1, 1), date(2023 + (k == 11), (k + 1) % 12 + 1, 1)
    return MONTHS[k], str((following - first).days)


def _minutes(rng: random.Random) -> tuple[str, str]:
    hours = rng.randint(2, 12)
    return f"{hours} hours", str(60 * hours)


def _days_later(rng: random.Random) -> tuple[str, str]:
    start = date(2023, 1, 1) + timedelta(rng.randrange(364))
    following = start + timedelta(1)
    return f"{MONTHS[start.month - 1]} {start.day}", f"{MONTHS[following.month - 1]} {following.day}"


@cache
def computed_topics() -> tuple[Topic, ...]:
    """All of them."""
    value, word = "{x}", '{noun} of "{x}"'
    return (
        Topic("sum", "value", "values", ("What is {x}?", "Calculate {x}.", "How much is {x}?"), "{x} = {y}.", _sum, value, True),
        Topic("difference", "value", "values", ("What is {x}?", "Calculate {x}.", "How much is {x}?"), "{x} = {y}.", _difference, value, True),
        Topic("product", "value", "values", ("What is {x}?", "Work out {x}.", "How much is {x}?"), "{x} = {y}.", _product, value, True),
        Topic("double", "double", "doubles", ("What is the double of {x}?", "What do you get if you double {x}?", "Double the number {x}."), "The double of {x} is {y}.", _number(3, 60, lambda n: 2 * n), is_numeric=True),
        Topic("square", "square", "squares", ("What is the square of {x}?", "What do you get if you multiply {x} by itself?", "Square the number {x}."), "The square of {x} is {y}.", _number(2, 15, lambda n: n * n), is_numeric=True),
        Topic("successor", "next number", "next numbers", ("Which number comes right after {x}?", "What is the next whole number above {x}?", "Count one further than {x}."), "The number after {x} is {y}.", _number(5, 400, lambda n: n + 1), "next number after {x}", True),
        Topic("parity", "parity", "parities", ("Is {x} even or odd?", "Say if {x} is an even number or an odd one.", "What is the parity of {x}?"), "{x} is {y}.", _number(3, 300, lambda n: "odd" if n % 2 else "even")),
        Topic("roman", "Roman numeral", "Roman numerals", ("How is {x} written in Roman numerals?", "Write {x} as a Roman numeral.", "What is the Roman numeral for {x}?"), "In Roman numerals, {x} is {y}.", _number(2, 60, roman_numeral)),
        Topic("length", "number of letters", "numbers of letters", ("How many letters are in \"{x}\"?", "Count the letters of \"{x}\".", "What is the length of the word \"{x}\"?"), "\"{x}\" has {y} letters.", _word(len), word, True),
        Topic("first_letter", "first letter", "first letters", ("What is the first letter of \"{x}\"?", "With which letter does \"{x}\" begin?", "Tell me the first letter of the word \"{x}\"."), "\"{x}\" begins with {y}.", _word(lambda w: w[0].upper()), word),
        Topic("last_letter", "last letter", "last letters", ("What is the last letter of \"{x}\"?", "With which letter does \"{x}\" end?", "Tell me the last letter of the word \"{x}\"."), "\"{x}\" ends with {y}.", _word(lambda w: w[-1].upper()), word),
        Topic("capitals", "spelling in capital letters", "spellings in capital letters", ("Write \"{x}\" in capital letters.", "How does \"{x}\" look in capital letters?", "Convert \"{x}\" to upper case."), "In capital letters, \"{x}\" is {y}.", _word(str.upper), "\"{x}\" in capital letters"),
        Topic("weekday", "next day of the week", "next days of the week", ("Which day comes after {x}?", "If today is {x}, what day is tomorrow?", "What day follows {x}?"), "The day after {x} is {y}.", _next_weekday, "day after {x}"),
        Topic("month_days", "number of days", "numbers of days", ("How many days does {x} have?", "How long is {x}, in days?", "Count the days of {x}."), "{x} has {y} days.", _month_days, is_numeric=True),
        Topic("area", "area", "areas", ("What is the area of {x}?", "How large is the area of {x}?", "Work out the area of {x}."), "The area of {x} is {y}.", _rectangle(lambda a, b: a * b), is_numeric=True),
        Topic("minutes", "number of minutes", "numbers of minutes", ("How many minutes are {x}?", "Convert {x} to minutes.", "{x} are how many minutes?"), "{x} are {y} minutes.", _minutes, "minutes in {x}", True),
        Topic("quotient", "value", "values", ("What is {x}?", "Calculate {x}.", "How much is {x}?"), "{x} = {y}.", _quotient, value, True, held_out=True),
        Topic("half", "half", "halves", ("What is half of {x}?", "Divide {x} by two.", "What do you get if you halve {x}?"), "Half of {x} is {y}.", lambda rng: (str(n := 2 * rng.randint(2, 50)), str(n // 2)), "half of {x}", True, held_out=True),
        Topic("perimeter", "perimeter", "perimeters", ("What is the perimeter of {x}?", "How long is the perimeter of {x}?", "Work out the perimeter of {x}."), "The perimeter of {x} is {y}.", _rectangle(lambda a, b: 2 * (a + b)), is_numeric=True, held_out=True),
        Topic("vowels", "number of vowels", "numbers of vowels", ("How many vowels are in \"{x}\"?", "Count the vowels of \"{x}\".", "What is the number of vowels in \"{x}\"?"), "\"{x}\" has {y} vowels.", _word(lambda w: sum(c in VOWELS for c in w)), word, True, held_out=True),
        Topic("month_number", "position in the year", "positions in the year", ("Which month of the year is {x}, as a number?", "What is the number of the month {x}?", "As a number from 1 to 12, what is {x}?"), "{x} is month {y}.", lambda rng: (MONTHS[k := rng.randrange(12)], str(k + 1)), "month number of {x}", True, held_out=True),
        Topic("next_date", "following date", "following dates", ("Which date follows {x}?", "What is the date on the day after {x}?", "Tell me the date right after {x}."), "The day after {x} is {y}.", _days_later, "day after {x}", held_out=True),
    )  # fmt: skip
