"""Modules of ``benchmarks/``, which is no package, for the tests that hold them to what they say."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from places import ROOT

FOLDER = ROOT / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    """The module of that name, loaded once; it may import others of the folder, as it does where it is run."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
