"""How an output is scored: closed-book questions, tool choice, math word problems.

Every score is in [0, 1] for one output; a task's score is the mean over its items.

- *Exact match* as the MEFT paper counts it: a gold answer appears in the output. Both are normalised as SQuAD's
  evaluation does (lower case, no punctuation, no articles, single spaces), and the answer must appear as whole words:
  ``ely`` is not in ``likely``. *Strict* exact match wants the normalised output to be a gold answer; token F1 is
  SQuAD's. Of several gold answers the best counts.
- Tool choice: intersection over union of the called APIs and the gold ones (the paper's measure for ToolBench).
- Math: the final number of the output equals the gold one.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from decimal import Decimal, InvalidOperation
from typing import Literal, get_args

from meft.planner.records.report import Evaluation

Metric = Literal["em", "iou", "math"]
METRICS: tuple[Metric, ...] = get_args(Metric)
MAIN_SCORE: dict[Metric, str] = {"em": "exact_match", "iou": "iou", "math": "accuracy"}
"""The score of each metric that a table shows first."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ACTION = re.compile(r"^\s*Action:\s*(\S+)\s*$", re.MULTILINE)
_JSON_NAME = re.compile(r"\"(?:name|api_name|function)\"\s*:\s*\"([^\"]+)\"")
_CALL = re.compile(r"(?<![\w.])([A-Za-z_][\w.\-]*)\s*\(")
_LIST_SEPARATORS = re.compile(r"[,;\n]")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+(?![\d.]))?|[-+]?\.\d+")
_FINAL = re.compile(r"####|(?:the\s+)?(?:final\s+)?answer\s+is\s*:?", re.IGNORECASE)
FINISH = "Finish"
"""ToolBench's last action, which calls no API."""


# --- closed-book questions ------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no English articles, single spaces."""
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(output: str, answers: Sequence[str]) -> float:
    """1 when a gold answer appears in the output as whole words."""
    return float(any(_appears(answer, output) for answer in answers))


def strict_exact_match(output: str, answers: Sequence[str]) -> float:
    """1 when the output is a gold answer."""
    return float(any(_comparable(output) == _comparable(answer) for answer in answers))


def token_f1(output: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, against the gold answer that fits best."""
    return max((_f1(_comparable(output).split(), _comparable(answer).split()) for answer in answers), default=0.0)


def _appears(answer: str, output: str) -> bool:
    wanted = normalised(answer)
    if wanted:
        return f" {wanted} " in f" {normalised(output)} "
    return bool(answer.strip()) and answer.strip() in output  # an answer of articles or punctuation only


def _comparable(text: str) -> str:
    """The normalised text, or the text itself when normalisation leaves nothing of it."""
    return normalised(text) or text.strip()


def _f1(said: Sequence[str], gold: Sequence[str]) -> float:
    common = sum((Counter(said) & Counter(gold)).values())
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(gold)
    return 2 * precision * recall / (precision + recall)


# --- tool choice ----------------------------------------------------------------------------------------------------


def called_apis(output: str) -> frozenset[str]:
    """Names of the APIs that an output calls.

    Understands, in this order of preference: ToolBench's ``Action: NAME`` lines, JSON objects with a ``name``,
    calls ``NAME(...)``, and a plain list separated by commas, semicolons or lines.
    """
    for pattern in (_ACTION, _JSON_NAME, _CALL):
        if found := pattern.findall(output):
            return frozenset(found) - {FINISH}
    listed = (part.strip().strip("-*`'\" .") for part in _LIST_SEPARATORS.split(output))
    return frozenset(name for name in listed if name) - {FINISH}


def intersection_over_union(called: Collection[str], gold: Collection[str]) -> float:
    """Size of the intersection over that of the union; 1 when both are empty."""
    union = set(called) | set(gold)
    return len(set(called) & set(gold)) / len(union) if union else 1.0


# --- math -----------------------------------------------------------------------------------------------------------


def final_number(text: str) -> Decimal | None:
    """The number that a solution ends with: after ``####`` or "the answer is" if it says so, else the last one.

    Thousands separators, a leading currency sign and a trailing per cent sign are ignored; ``3/4`` is a fraction.
    """
    markers = list(_FINAL.finditer(text))
    if markers and (after := _NUMBER.search(text, markers[-1].end())):
        return _decimal(after.group())
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def number_matches(output: str, answers: Sequence[str]) -> float:
    """1 when the output's final number equals that of a gold answer."""
    said = final_number(output)
    return float(said is not None and any(said == final_number(answer) for answer in answers))


def _decimal(text: str) -> Decimal | None:
    numerator, _, denominator = text.replace(",", "").partition("/")
    try:
        return Decimal(numerator) / Decimal(denominator or 1)
    except InvalidOperation:  # a division of zero by zero
        return None
    except ZeroDivisionError:
        return None


# --- all together ---------------------------------------------------------------------------------------------------

_SCORES: dict[Metric, dict[str, Callable[[str, Sequence[str]], float]]] = {
    "em": {"exact_match": exact_match, "strict_exact_match": strict_exact_match, "token_f1": token_f1},
    "iou": {"iou": lambda output, answers: intersection_over_union(called_apis(output), answers)},
    "math": {"accuracy": number_matches},
}


def scores(metric: Metric, output: str, answers: Sequence[str]) -> dict[str, float]:
    """Every score of a metric for one output. For ``iou`` the answers are the set of gold API names."""
    return {name: score(output, answers) for name, score in _SCORES[metric].items()}


def evaluation_line(result: Evaluation) -> str:
    """An evaluation in one line, its main score first."""
    main = MAIN_SCORE[result.metric]
    rest = ", ".join(f"{name} {value:.3f}" for name, value in result.scores.items() if name != main)
    after = f" after {result.optimizer_steps:,} optimizer steps" if result.optimizer_steps else ""
    text = f"{result.task}, {result.items:,} items{after}: {main} {result.scores[main]:.3f}"
    return text + (f" ({rest})" if rest else "")
