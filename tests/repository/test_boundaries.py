"""The boundaries between packages, and between this repository and the machine it was written on."""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import ROOT

PACKAGES = ("meft", "planner", "runtime", "profiles")

HEAVY = {"torch", "transformers", "numba"}
LIGHT = {"pydantic", "click", "numpy", "psutil", "rich"}
ONLY_IN_FUNCTIONS = {"scipy", "matplotlib", "tokenizers"}

RECORDS_AND_PROFILES = {
    "meft.planner.base.schema",
    "meft.planner.base.dtypes",
    "meft.planner.base.names",
    "meft.planner.base.errors",
    "meft.planner.base.units",
    "meft.planner.base.version",
    "meft.planner.base.files",
    "meft.planner.base.cache",
    "meft.planner.base.kinds",
    "meft.planner.base.options",
    "meft.planner.base.packages",
    "meft.planner.models.architecture",
    "meft.planner.models.configs",
    "meft.planner.models.kernels",
    "meft.planner.models.catalogue",
    "meft.planner.models.measured",
    "meft.planner.models.shapes",
    "meft.planner.models.stored",
    "meft.planner.memory.machine",
    "meft.planner.records.ladder",
    "meft.planner.records.peft_methods",
    "meft.planner.records.plan",
    "meft.planner.records.report",
    "meft.planner.records.routing",
    "meft.planner.records.profiles",
    "meft.planner.records.profile_file",
    "meft.planner.records.profile_catalogue",
    "meft.planner.records.setup",
    "meft.planner.timing.chrome",
    "meft.planner.simulation.stream",
}
ALLOCATOR = {"meft.planner.allocator.caching", "meft.planner.allocator.rounding"}
ALLOCATOR_IS_USED_BY = {"meft.runtime.device.books"}
"""The one model that the runtime imports: what the emulated device is. Its books pass every allocation through it; a
second copy of the allocator's rules would drift away."""

PROFILING_IS_USED_BY = {
    "meft.runtime.profiling.device_rates": {"meft.planner.timing.layer_kernels"},
    "meft.runtime.cli.profile": {
        "meft.planner.check.calibrate",
        "meft.planner.check.rates",
        "meft.planner.predict.prediction",
    },
    "meft.runtime.profiling.sparsity_profile": {"meft.planner.traffic.union_fit"},
}
"""Measuring ends in a fit, calibrating in predictions, and launches are measured as they are counted: the commands of
meft-profile call those models."""

PRICED_ANEW_BY = {"meft.runtime.training.packing": {"meft.planner.predict.prediction"}}
"""Data that is packed has memory that its plan may not have priced: the planner is asked again."""

CONSTANTS_ARE_USED_BY = {
    "meft.runtime.exchange.hot_tables": ("meft.planner.traffic.hot_rows", ("HOT_CHUNK_ROWS",)),
    "meft.runtime.exchange.device_rows": ("meft.planner.base.quantities", ("ALIGNED_ROWS",)),
    "meft.runtime.chunks.fetching": ("meft.planner.base.quantities", ("chunk_tokens",)),
}
"""Numbers, and how one is divided, that the runtime works by and a model prices, stated once: these names, and nothing
else of their module."""

TRACE_IS_USED_WITH = {
    "meft.runtime.trace.losses": {"meft.planner.simulation.losses"},
    "meft.runtime.trace.optimizers": {"meft.planner.simulation.optimizers"},
}
"""What a kind of loss or optimizer is called, and what it is set to, is stated once, beside the simulation of it."""

WITH_EFFECTS = {
    "meft.planner.base.files",
    "meft.planner.base.cache",
    "meft.planner.base.kinds",
    "meft.planner.base.packages",
    "meft.planner.allocator.recording_files",
    "meft.planner.base.schema",
    "meft.planner.base.names",
    "meft.planner.records.profile_catalogue",
    "meft.planner.models.catalogue",
    "meft.planner.render.plot",
    "meft.planner.render.tables",
    "meft.planner.memory.machine",
    "meft.planner.base.tracers",
    "meft.planner.models.shapes",
}
"""Planner modules that read, write or print. With the front door and the commands they are all: any other is pure."""
EFFECTS = {
    "asyncio",
    "datetime",
    "glob",
    "importlib",
    "io",
    "logging",
    "os",
    "pathlib",
    "platform",
    "psutil",
    "random",
    "secrets",
    "shutil",
    "socket",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "uuid",
}
COUNTS_REFERENCES = {"meft.planner.simulation.autograd": {"sys"}}
"""Whether anything else holds a storage decides, as in torch, if gradients are summed in place."""
MODELS_OF_THE_DESIGN = {
    "meft.planner.traffic.sparsity",
    "meft.planner.traffic.transfer",
    "meft.planner.memory.host",
    "meft.planner.timing.step",
    "meft.planner.timing.lanes",
    "meft.planner.timing.program",
    "meft.planner.timing.chunks",
    "meft.planner.traffic.chunks",
    "meft.planner.memory.device",
    "meft.planner.search.space",
    "meft.planner.search.grid_costs",
    "meft.planner.search.grid_timing",
    "meft.planner.search.chunked",
    "meft.planner.search.weighing",
    "meft.planner.search.search",
    "meft.planner.allocator.caching",
    "meft.planner.allocator.rounding",
    "meft.planner.allocator.blocks",
    "meft.planner.allocator.recording",
    "meft.planner.allocator.history",
    "meft.planner.allocator.replay",
    "meft.planner.simulation.run",
    "meft.planner.simulation.decoder",
    "meft.planner.simulation.operators",
    "meft.planner.simulation.stream",
}


@dataclass(frozen=True)
class Import:
    """One import of ``module``; ``in_function`` if it waits for a call, ``for_types`` if it never runs."""

    module: str
    names: tuple[str, ...]
    place: str
    in_function: bool
    for_types: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def modules(self) -> set[str]:
        """The module, and what could be its submodules: ``from meft import runtime`` imports ``meft.runtime``."""
        return {self.module, *(f"{self.module}.{name}" for name in self.names)}


@functools.cache
def imports_of(path: Path) -> list[Import]:
    """Every import of a file, wherever it stands, and ``import_module`` of a name that is written out."""
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), path, in_function=False, for_types=False))


def _walk(node: ast.AST, path: Path, *, in_function: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        place = f"{path.relative_to(ROOT)}:{getattr(child, 'lineno', 0)}"
        for module, names in _imported(child):
            yield Import(module, names, place, in_function, for_types)
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typed = for_types or (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"))
        yield from _walk(child, path, in_function=inside, for_types=typed)


def _imported(node: ast.AST) -> list[tuple[str, tuple[str, ...]]]:
    if isinstance(node, ast.Import):
        return [(alias.name, ()) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [("." * node.level + (node.module or ""), tuple(alias.name for alias in node.names))]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        return [(str(name.value), ()) for name in node.args[:1] if isinstance(name, ast.Constant)]
    return []


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def all_imports(package: str) -> list[Import]:
    return [each for path in sources(package) for each in imports_of(path)]


# --- rule 1: the planner is light ------------------------------------------------------------------------------------


def test_the_planner_imports_nothing_heavy_even_lazily() -> None:
    assert [each for each in all_imports("planner") if each.top in HEAVY] == []
    assert [each for each in all_imports("planner") if any(_is_runtime(module) for module in each.modules)] == []


def _is_runtime(module: str) -> bool:
    return module == "meft.runtime" or module.startswith("meft.runtime.")


def test_the_planner_imports_light_libraries_and_the_rest_only_in_functions() -> None:
    others = [
        each
        for each in all_imports("planner")
        if each.top not in {*sys.stdlib_module_names, *LIGHT, "meft"} and not each.for_types
    ]
    assert {each.top for each in others} <= ONLY_IN_FUNCTIONS
    assert [each for each in others if not each.in_function] == []


def test_the_scan_sees_imports_wherever_they_hide(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "planner").mkdir()
    path = tmp_path / "planner" / "module.py"
    path.write_text(
        "import torch.nn\n"
        "def late():\n    from torch import nn\n    importlib.import_module('torch')\n"
        "from ..runtime import books\nfrom meft import runtime\n"
        "if TYPE_CHECKING:\n    import scipy\n"
    )
    first, late, named, relative, from_parent, typed = imports_of(path)
    assert (first.top, late.top, named.top) == ("torch",) * 3
    assert (first.in_function, late.in_function) == (False, True)
    assert "meft.runtime" in from_parent.modules
    assert relative.module == "..runtime"  # which no module may have: see the next test
    assert typed.for_types


def test_no_module_uses_relative_imports() -> None:
    """Absolute names only, which is what the other tests read."""
    for package in PACKAGES:
        for path in sources(package):
            assert [each for each in imports_of(path) if each.module.startswith(".")] == []


# --- rule 2: the runtime knows records and profiles, no models -------------------------------------------------------


def module_name(path: Path) -> str:
    """``planner/room/module.py`` as it is imported."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name == "meft" else f"meft.{name}"


def modules_of(package: str) -> dict[str, Path]:
    """Every module that is no package, by name."""
    return {module_name(path): path for path in sources(package) if path.name != "__init__.py"}


def planner_modules(each: Import) -> set[str]:
    """Modules of the planner that an import reaches."""
    return each.modules & modules_of("planner").keys()


def test_the_runtime_imports_only_records_and_profiles_from_the_planner() -> None:
    for name, path in modules_of("runtime").items():
        allowed = RECORDS_AND_PROFILES | (ALLOCATOR if name in ALLOCATOR_IS_USED_BY else set())
        allowed |= PROFILING_IS_USED_BY.get(name, set()) | TRACE_IS_USED_WITH.get(name, set())
        allowed |= PRICED_ANEW_BY.get(name, set())
        for each in imports_of(path):
            is_constant = (each.module, each.names) == CONSTANTS_ARE_USED_BY.get(name)
            assert is_constant or planner_modules(each) <= allowed, each.place


def test_the_exceptions_are_still_needed() -> None:
    modules = modules_of("runtime")
    users = {name for name, path in modules.items() for each in imports_of(path) if ALLOCATOR & planner_modules(each)}
    assert users == ALLOCATOR_IS_USED_BY
    for name, constants in CONSTANTS_ARE_USED_BY.items():
        assert constants in [(each.module, each.names) for each in imports_of(modules[name])]


def test_the_modules_named_above_are_there() -> None:
    named = RECORDS_AND_PROFILES | WITH_EFFECTS | COUNTS_REFERENCES.keys() | ALLOCATOR
    assert named <= modules_of("planner").keys()


def test_profiles_are_data() -> None:
    assert all_imports("profiles") == []


def test_the_front_door_imports_nothing_before_it_is_asked() -> None:
    """But ``python -m meft.run``, which is asked for as it begins."""
    at_once = [each for each in all_imports("meft") if not each.in_function and not each.for_types]
    at_once = [each for each in at_once if each.module != "meft.runtime.cli.start"]
    assert {each.top for each in at_once} == {"__future__", "os", "typing"}


# --- rule 3: the models are pure -------------------------------------------------------------------------------------


def pure_modules() -> dict[str, Path]:
    return {
        name: path
        for name, path in modules_of("planner").items()
        if name not in WITH_EFFECTS and not name.startswith(("meft.planner.cli.", "meft.planner.front."))
    }


def test_the_models_of_the_design_are_among_the_pure_modules() -> None:
    assert pure_modules().keys() >= MODELS_OF_THE_DESIGN


@pytest.mark.parametrize("name", pure_modules())
def test_a_pure_module_has_no_clock_files_or_randomness(name) -> None:
    path = pure_modules()[name]
    effects = EFFECTS - COUNTS_REFERENCES.get(name, set())
    assert [each for each in imports_of(path) if each.top in effects] == []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert called.isdisjoint({"open", "print", "input", "exec", "eval"})
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert attributes.isdisjoint({"np.random", "numpy.random"})


# --- rule 4: a fast start --------------------------------------------------------------------------------------------

ASK_WHAT_WAS_LOADED = """
import importlib, os, sys
module, *sys.argv = sys.argv[1:]
code, os._exit = 0, sys.exit  # so that it comes to the question
try:
    importlib.import_module(module).main()
except SystemExit as end:
    code = end.code or 0
print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}))
sys.exit(code)
"""


def loaded_by(module: str, *arguments: str, folder: Path) -> set[str]:
    """Top-level modules in memory when the command has ended, which must have been with success."""
    command = [sys.executable, "-c", ASK_WHAT_WAS_LOADED, module, *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    last = ended.stdout.splitlines()[-1]
    assert last.startswith("loaded: ")
    return set(last.split()[1:])


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        pytest.param("meft.planner.cli.main", ("meft-plan", "--help"), id="meft-plan --help"),
        pytest.param("meft.planner.cli.main", ("meft-plan", "--gpu-mem", "24GB", "--host-mem", "64GB"), id="meft-plan"),
        pytest.param("meft.runtime.cli.run", ("meft-run", "--help"), id="meft-run --help"),
        pytest.param("meft.runtime.cli.profile", ("meft-profile", "--help"), id="meft-profile --help"),
    ],
)
def test_a_command_starts_without_torch(module, arguments, tmp_path) -> None:
    loaded = loaded_by(module, *arguments, folder=tmp_path)
    assert module.partition(".")[0] in loaded
    assert loaded.isdisjoint(HEAVY | ONLY_IN_FUNCTIONS)


# --- layout ----------------------------------------------------------------------------------------------------------


def package_name(folder: str) -> str:
    """As what a top-level folder is imported: ``meft`` is the package itself, the others lie in it."""
    return "meft" if folder == "meft" else f"meft.{folder}"


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_folder_lies_at_the_top_and_maps_to_its_package() -> None:
    setuptools = pyproject()["tool"]["setuptools"]
    assert setuptools["package-dir"] == {package_name(name): name for name in PACKAGES}
    with_init = {module_name(path) for path in tracked_files() if path.name == "__init__.py"}
    assert sorted(setuptools["packages"]) == sorted(with_init)  # one that is not listed would not be installed


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_imported_from_its_folder(name) -> None:
    module = importlib.import_module(package_name(name))
    assert Path(module.__file__).resolve().parent == ROOT / name


def test_every_data_file_of_a_package_is_installed() -> None:
    patterns = pyproject()["tool"]["setuptools"]["package-data"]
    for path in tracked_files():
        package, _, name = path.relative_to(ROOT).as_posix().partition("/")
        if package in PACKAGES and path.suffix != ".py":
            assert any(_matches(name, pattern) for pattern in patterns[package_name(package)]), path


def _matches(name: str, pattern: str) -> bool:
    """As setuptools globs: a star does not cross folders."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


# --- the repository and the machine ----------------------------------------------------------------------------------


def tracked_files() -> list[Path]:
    """Files that git has, less those that are deleted in the working tree."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("git is not installed, so there is no list of the repository's files")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"not a git checkout: {error.stderr.strip()}")
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file()]


def this_machines_paths() -> list[str]:
    """Home and the folder of the checkout. One that is the root of the file system says nothing."""
    return sorted({str(path) for path in (Path.home(), ROOT.parent, ROOT) if path != Path(path.anchor)})


def test_no_file_holds_a_path_of_this_machine() -> None:
    pattern = re.compile("|".join(rf"(?<![\w.-]){re.escape(path)}(?![\w-])" for path in this_machines_paths()).encode())
    holding = {path.relative_to(ROOT).as_posix(): pattern.search(path.read_bytes()) for path in tracked_files()}
    assert len(holding) > 50
    assert {name: found[0] for name, found in holding.items() if found} == {}
