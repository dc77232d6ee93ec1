"""Plan and run memory-efficient fine-tuning of LLMs with a wide, sparse, CPU-resident adapter (MEFT).

    import meft

    plan = meft.plan(gpu_mem="24GB", model="llama-7b")     # what meft-plan finds; plan.save("plan.json")
    meft.estimate("qlora", model="mistral-7b", gpu_mem="24GB").fits
    meft.compare(gpu_mem="24GB")                           # every method side by side
    meft.transfer_volume(adapter_width=6144, top_k=[32, 64, 128])
    meft.audit("plan.json", "out/report.json").passed      # predicted against observed

    with meft.trace(gpu="rtx-3090") as seen: train()       # your own script, without GPU and weights; seen.memory
    model = meft.AdapterModel.from_plan(base, plan)        # these two need torch: pip install 'meft[run]'
    meft.trainer_arguments(model, args)

Calls take the options of the commands with underscores, and return the records that the commands write. Nothing is
imported before it is asked for, torch only by what trains.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meft.planner.base.errors import Infeasible, InfeasibleError, MachineError, MeftError, UsageError
    from meft.planner.front.calls import audit, compare, estimate, load_plan, load_report, plan
    from meft.planner.front.script import trace
    from meft.planner.front.volume import transfer_volume
    from meft.planner.records.plan import Plan
    from meft.planner.records.report import Report
    from meft.runtime.use.adapter_model import AdapterModel
    from meft.runtime.use.hf_trainer import trainer_arguments

    __version__: str

__all__ = [
    "AdapterModel",
    "Infeasible",
    "InfeasibleError",
    "MachineError",
    "MeftError",
    "Plan",
    "Report",
    "UsageError",
    "__version__",
    "audit",
    "compare",
    "estimate",
    "load_plan",
    "load_report",
    "plan",
    "trace",
    "trainer_arguments",
    "transfer_volume",
]

_HOME = {
    "AdapterModel": "meft.runtime.use.adapter_model",
    "Infeasible": "meft.planner.base.errors",
    "InfeasibleError": "meft.planner.base.errors",
    "MachineError": "meft.planner.base.errors",
    "MeftError": "meft.planner.base.errors",
    "Plan": "meft.planner.records.plan",
    "Report": "meft.planner.records.report",
    "UsageError": "meft.planner.base.errors",
    "audit": "meft.planner.front.calls",
    "compare": "meft.planner.front.calls",
    "estimate": "meft.planner.front.calls",
    "load_plan": "meft.planner.front.calls",
    "load_report": "meft.planner.front.calls",
    "plan": "meft.planner.front.calls",
    "trace": "meft.planner.front.script",
    "trainer_arguments": "meft.runtime.use.hf_trainer",
    "transfer_volume": "meft.planner.front.volume",
}

# In a checkout the packages lie beside this folder, not in it. They are found there, so that whoever starts Python in
# one checkout gets that one whole, and never this module with the packages of an installation elsewhere.
_folder = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib would double the time this takes
if not os.path.isdir(os.path.join(_folder, "planner")):  # noqa: PTH112, PTH118
    __path__.append(os.path.dirname(_folder))  # noqa: PTH120


def __getattr__(name: str) -> Any:
    """Import what is asked for, once."""
    if name == "__version__":
        from meft.planner.base.version import VERSION

        value: Any = VERSION
    elif name in _HOME:
        value = getattr(_imported(name), name)
    else:
        raise AttributeError(f"module 'meft' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _imported(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(_HOME[name])
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.partition(".")[0] == "meft":
            raise
        raise ModuleNotFoundError(
            f"meft.{name} needs {missing}, which is not installed: pip install 'meft[run]'", name=missing
        ) from error
