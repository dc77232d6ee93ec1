"""The rooms: what each package is divided into, in which order, and that imports go one way."""

from __future__ import annotations

import ast
import functools
import shutil
from pathlib import Path

import pytest
from places import ROOT

PLANNER = (
    *("base", "models", "records", "allocator", "traffic", "terms", "simulation", "fusion", "sparse"),
    *("memory", "timing", "predict", "search", "check", "front", "render", "cli"),
)
RUNTIME = (
    *(
        "device",
        "fake",
        "host",
        "ranks",
        "data",
        "exchange",
        "chunks",
        "owners",
        "adapter",
        "session",
        "use",
        "pruning",
        "training",
        "methods",
    ),
    *("profiling", "trace", "cli"),
)
ROOMS = {"planner": PLANNER, "runtime": RUNTIME}
"""Ground floor first: a room may import itself and what stands before it."""
MOST_FILES, MOST_LINES = 15, 500


def modules(package: str, root: Path = ROOT) -> dict[str, Path]:
    """Files by the name under which they are imported."""
    return {
        "meft." + ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / package).rglob("*.py"))
    }


@functools.cache
def imported_names(path: Path) -> frozenset[str]:
    """Whatever a file imports, at its top or later, and what could be modules among the names it takes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def imports(package: str, root: Path = ROOT) -> dict[str, set[str]]:
    """Which modules of the package each of its modules imports."""
    files = modules(package, root)
    return {name: (imported_names(path) & files.keys()) - {name} for name, path in files.items()}


def room_of(module: str) -> str:
    """``meft.planner.base.units`` is in ``base``; the package itself is in no room."""
    return [*module.split("."), ""][2]


def upward(package: str, root: Path = ROOT) -> list[str]:
    """Imports of a room that stands higher."""
    order = {room: place for place, room in enumerate(ROOMS[package])}
    return [
        f"{module} imports {target}"
        for module, targets in imports(package, root).items()
        for target in sorted(targets)
        if room_of(target) and order[room_of(target)] > order.get(room_of(module), -1)
    ]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """What is left when every module that imports only modules already taken has been taken: nothing, or a circle."""
    left = dict(graph)
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


@pytest.mark.parametrize("package", ROOMS)
def test_every_module_is_in_a_room_that_the_order_knows(package) -> None:
    names = modules(package).keys() - {f"meft.{package}"}
    assert {room_of(name) for name in names} == set(ROOMS[package])


@pytest.mark.parametrize("package", ROOMS)
def test_no_room_imports_one_above_it(package) -> None:
    assert upward(package) == []


@pytest.mark.parametrize("package", ROOMS)
def test_files_do_not_import_in_a_circle(package) -> None:
    assert cycle(imports(package)) == []


@pytest.mark.parametrize(("package", "low", "high"), [("planner", "base", "cli"), ("runtime", "device", "training")])
def test_an_import_upward_is_found(package, low, high, tmp_path) -> None:
    shutil.copytree(ROOT / package, tmp_path / package)
    target = next(name for name in modules(package) if room_of(name) == high and name.count(".") == 3)
    (tmp_path / package / low / "curious.py").write_text(f"def later():\n    import {target}\n")
    assert upward(package, tmp_path) == [f"meft.{package}.{low}.curious imports {target}"]


def test_a_circle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_and_files_stay_small(package) -> None:
    files = {room: len(list((ROOT / package / room).glob("*.py"))) for room in ROOMS[package]}
    assert {room: count for room, count in files.items() if count > MOST_FILES} == {}
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules(package).items()}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_says_what_it_is_for_and_what_it_may_import(package) -> None:
    for room in ROOMS[package]:
        said = ast.get_docstring(ast.parse((ROOT / package / room / "__init__.py").read_text(encoding="utf-8")))
        assert said is not None
        sentence, _, rest = said.partition("\n\n")
        assert sentence.endswith(".")
        assert rest.startswith("May import ")


@pytest.mark.parametrize("package", ROOMS)
def test_the_tests_lie_in_the_rooms_that_they_test(package) -> None:
    folders = {path.parent.name for path in (ROOT / "tests" / package).rglob("test_*.py")}
    assert folders <= set(ROOMS[package])
