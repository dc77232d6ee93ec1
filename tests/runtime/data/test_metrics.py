"""The scores of outputs: hand-checked cases, and the laws that any such score obeys."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft.runtime.data.metrics import (
    MAIN_SCORE,
    METRICS,
    called_apis,
    exact_match,
    final_number,
    intersection_over_union,
    normalised,
    number_matches,
    scores,
    strict_exact_match,
    token_f1,
)


@pytest.mark.parametrize(
    ("output", "answers", "contains", "strict"),
    [
        ("The capital is Paris.", ["Paris"], 1, 0),
        ("paris", ["Paris"], 1, 1),
        ("the Paris!", ["Paris"], 1, 1),  # articles and punctuation do not count
        ("It is likely.", ["Ely"], 0, 0),  # whole words: a substring is no answer
        ("New  York\nCity", ["New York"], 1, 0),
        ("London", ["Paris", "London"], 1, 1),  # any gold answer will do
        ("", ["Paris"], 0, 0),
        ("an A", ["A"], 1, 0),  # an answer that normalises to nothing is looked for as it stands
        ("Zürich it is", ["ZÜRICH"], 1, 0),
    ],
)
def test_exact_match(output, answers, contains, strict) -> None:
    assert exact_match(output, answers) == contains
    assert strict_exact_match(output, answers) == strict


def test_token_f1_is_squads() -> None:
    # said: in new york city (4), gold: new york (2), common 2: precision 1/2, recall 1, F1 2/3
    assert token_f1("in New York City", ["New York"]) == pytest.approx(2 / 3)
    assert token_f1("in New York City", ["Rome", "new york city"]) == pytest.approx(6 / 7)
    assert token_f1("Rome", ["New York"]) == 0
    assert token_f1("york york", ["york"]) == pytest.approx(2 / 3)  # a word counts as often as it is there


@pytest.mark.parametrize(
    ("output", "names"),
    [
        ("Thought: search\nAction: film_for_movie\nAction Input: {}\nAction: Finish", {"film_for_movie"}),
        ('{"name": "get.weather", "arguments": {}}', {"get.weather"}),
        ("math.area(side=3); country_info.capital('Brazil')", {"math.area", "country_info.capital"}),
        ("search_for_books, get_for_news.", {"search_for_books", "get_for_news"}),
        ("- one\n- two\n", {"one", "two"}),
        ("", set()),
    ],
)
def test_the_called_apis_of_an_output(output, names) -> None:
    assert called_apis(output) == names


def test_intersection_over_union() -> None:
    assert intersection_over_union({"a", "b"}, {"b", "c"}) == pytest.approx(1 / 3)
    assert intersection_over_union({"a"}, {"a"}) == 1
    assert intersection_over_union(set(), {"a"}) == 0
    assert intersection_over_union(set(), set()) == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 3 = 8\n#### 8", "8"),
        ("#### 1,234", "1234"),
        ("The answer is: $1,234.50, not 7", "1234.50"),
        ("so 12 apples and 7 pears", "7"),
        ("it ends with 5.", "5"),
        ("minus -3", "-3"),
        ("the answer is 3/4", "0.75"),
        ("about .5", "0.5"),
        ("The answer is unknown, 9 or 10", "9"),
        ("nothing", None),
        ("1/0", None),
    ],
)
def test_the_final_number(text, number) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_as_numbers() -> None:
    assert number_matches("The answer is 18.00", ["18"]) == 1
    assert number_matches("The answer is 18.01", ["18"]) == 0
    assert number_matches("no idea", ["18"]) == 0


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=40)


@given(TEXTS, st.lists(TEXTS.filter(str.strip), min_size=1, max_size=3), st.sampled_from(METRICS))
def test_scores_are_fractions_and_strict_is_the_stricter(output, answers, metric) -> None:
    found = scores(metric, output, answers)
    assert MAIN_SCORE[metric] in found
    assert all(0 <= value <= 1 for value in found.values())
    if metric == "em" and found["strict_exact_match"]:
        assert found["token_f1"] == 1


@given(TEXTS.filter(str.strip))
def test_a_gold_answer_is_right(answer) -> None:
    assert strict_exact_match(answer, [answer]) == exact_match(answer, [answer]) == 1
    assert normalised(normalised(answer)) == normalised(answer)
