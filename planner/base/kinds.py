"""What a file is, told by what is in it: so that a file given in another's place is called by its name.

Files of this project and of other programs are known by the fields or the first bytes that only they have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meft.planner.base.errors import UsageError

PLAN, REPORT, PROFILE = "plan", "report", "profile file"
ADAPTER, STATE, MODEL = "adapter config", "training state", "model config"
ESTIMATE, DATA, WEIGHTS = "estimate", "data", "weights"

_CALLED = {
    PLAN: "a plan",
    REPORT: "a report of a run",
    PROFILE: "a profile that meft-profile wrote",
    ADAPTER: "the config of a trained adapter",
    STATE: "the state of a training run in a checkpoint",
    MODEL: "the config of a Hugging Face model",
    ESTIMATE: "the JSON output of meft-plan estimate or compare",
    DATA: "training data, JSON by lines",
    WEIGHTS: "a file of model weights",
    "peft adapter": "the config of a PEFT adapter (LoRA and others), which meft does not read",
    "infeasible": "a verdict that nothing fits",
    "tokenizer": "the config of a tokenizer",
    "index": "the index of a model's weight files",
    "generation": "the generation config of a model",
    "trainer state": "the state of a transformers.Trainer",
    "trace": "a Chrome trace",
    "png": "a picture",
    "zip": "a ZIP archive (torch saves weights as such)",
    "gguf": "a model in GGUF form",
    "npz": "a NumPy file",
    "parquet": "a Parquet table",
    "adapter folder": "the folder of a trained adapter",
    "checkpoint": "the folder of a checkpoint",
    "model folder": "the folder of a model",
    "run folder": "the output folder of a run",
    "folder": "a folder",
}

_FIELDS: tuple[tuple[str, frozenset[str]], ...] = (
    (PLAN, frozenset({"request", "decision", "prediction"})),
    (REPORT, frozenset({"plan_digest", "observed", "comparison"})),
    (STATE, frozenset({"plan_digest", "steps_done", "data_digest"})),
    (ADAPTER, frozenset({"base_model", "adapter_width", "plan_digest"})),
    (PROFILE, frozenset({"contains", "machine", "measurements"})),
    (MODEL, frozenset({"model_type"})),
    (MODEL, frozenset({"architectures"})),
    ("peft adapter", frozenset({"peft_type"})),
    ("infeasible", frozenset({"feasible", "binding"})),
    ("tokenizer", frozenset({"tokenizer_class"})),
    ("index", frozenset({"weight_map"})),
    ("trainer state", frozenset({"log_history"})),
    ("trace", frozenset({"traceEvents"})),
    ("generation", frozenset({"eos_token_id", "transformers_version"})),
    (DATA, frozenset({"prompt", "completion"})),
    (DATA, frozenset({"messages"})),
    (DATA, frozenset({"instruction", "output"})),
    (DATA, frozenset({"text"})),
)
"""Fields that tell a kind; the first line that fits wins."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_FIRST_BYTES = (
    (b"\x89PNG", "png"),
    (b"PK\x03\x04", "zip"),
    (b"GGUF", "gguf"),
    (b"\x93NUMPY", "npz"),
    (b"PAR1", "parquet"),
)
_FOLDERS = (
    ("training_state.json", "checkpoint"),
    ("meft_config.json", "adapter folder"),
    ("adapter_config.json", "adapter folder"),
    ("report.json", "run folder"),
    ("config.json", "model folder"),
)

_INSTEAD = {
    PLAN: {
        REPORT: "give the plan.json that it was run with",
        PROFILE: "plan with it first: meft-plan --gpu FILE",
        ADAPTER: "give the plan.json that it was trained with; meft-run generate --adapter FOLDER uses an adapter",
        "adapter folder": "give the plan.json; meft-run generate --adapter FOLDER uses an adapter",
        "checkpoint": "give the plan.json, and --resume with the run's --output-dir to go on from a checkpoint",
        STATE: "give the plan.json, and --resume with the run's --output-dir to go on from a checkpoint",
        MODEL: "plan for the model first: meft-plan --model FILE",
        "model folder": "plan for the model first: meft-plan --model FOLDER",
        WEIGHTS: "plan for the model first: meft-plan --model FOLDER, the one that the file is in",
        "gguf": "plan for a model folder first: meft-plan --model FOLDER",
        DATA: "give a plan.json first, and this with --data",
        "run folder": "give the plan.json that it was run with",
        "infeasible": "there is no plan in it: the command that it names makes one",
        ESTIMATE: "meft-plan --gpu-mem 24GB writes a plan that can be run",
    },
    REPORT: {
        PLAN: "give the plan first, then the report.json that meft-run wrote in its --output-dir",
        "run folder": "give the report.json in it",
    },
    PROFILE: {
        PLAN: "meft-profile hardware -o FILE writes a profile, meft-plan reads it",
        REPORT: "meft-profile calibrate PLAN REPORT -o FILE makes a profile from it",
    },
    MODEL: {
        PLAN: "give the model's folder or its config.json; the plan itself is run by meft-run",
        REPORT: "give the model's folder or its config.json",
        ADAPTER: "give the folder of its base model",
        "adapter folder": "give the folder of its base model",
        "peft adapter": "give the folder of its base model",
    },
    ADAPTER: {
        "peft adapter": "meft uses the adapters that meft-run trains",
        MODEL: "give the folder that meft-run wrote, such as output/adapter",
    },
}
"""What to give instead, by what was wanted and what was found."""

_WANTED = {
    PLAN: "a plan",
    REPORT: "a report of a run",
    PROFILE: "a profile",
    ADAPTER: "the config of a trained adapter",
    STATE: "the state of a training run",
    MODEL: "the config of a model",
    DATA: "training data",
}
_MAKES = {
    DATA: "give JSON lines, a JSON list, CSV, TSV or Parquet",
    PLAN: "meft-plan --gpu-mem 24GB writes one",
    REPORT: "meft-run writes one in its --output-dir",
    PROFILE: "meft-profile hardware -o FILE writes one",
    ADAPTER: "give the folder that meft-run wrote, such as output/adapter",
    STATE: "give a checkpoint that meft-run wrote",
    MODEL: "give a Hugging Face model folder or its config.json",
}


def refuse_pointer(start: bytes, path: Path | str) -> None:
    """Raise :class:`UsageError` where Git LFS left a pointer in the place of a file that begins with ``start``."""
    if start.startswith(_LFS_POINTER):
        name = Path(path).name
        raise UsageError(f"{path}: a Git LFS pointer, not the file itself; get it: git lfs pull --include {name!r}")


def kind_of(content: Mapping[str, Any]) -> str | None:
    """The kind of a JSON object, None when it is nothing that is known here."""
    return next((kind for kind, fields in _FIELDS if fields <= content.keys()), None)


def kind_of_path(path: Path) -> str | None:
    """The kind of a file that is no JSON object, or of a folder; None when it is nothing that is known here."""
    if path.is_dir():
        return next((kind for name, kind in _FOLDERS if (path / name).is_file()), "folder")
    try:
        with path.open("rb") as file:
            start = file.read(1 << 16)
    except OSError:
        return None
    known = next((kind for magic, kind in _FIRST_BYTES if start.startswith(magic)), None)
    if known is None and start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 27:
        return WEIGHTS  # safetensors: the length of a JSON header, then the header
    return known or _kind_of_lines(start)


def _kind_of_lines(start: bytes) -> str | None:
    """JSON by lines is data."""
    first, newline, rest = start.partition(b"\n")
    try:
        return DATA if newline and rest.lstrip().startswith(b"{") and isinstance(json.loads(first), dict) else None
    except ValueError:
        return None


def other_kind(source: object, *, found: str, wanted: str) -> UsageError:
    """The error for a file that is something else than what was asked for.

    >>> print(other_kind("report.json", found="report", wanted="plan"))
    report.json is a report of a run, not a plan; give the plan.json that it was run with
    """
    instead = _INSTEAD.get(wanted, {}).get(found) or _MAKES.get(wanted, f"give a {wanted}")
    return UsageError(f"{source} is {_CALLED.get(found, f'a {found}')}, not {_WANTED.get(wanted, wanted)}; {instead}")


def refuse_other_kind(content: Mapping[str, Any], *, source: object, wanted: str) -> None:
    """Raise the error of :func:`other_kind` for a JSON object that is known to be something else."""
    found = kind_of(content)
    if found is not None and found != wanted:
        raise other_kind(source, found=found, wanted=wanted)


def refuse_other_path(path: Path, *, wanted: str) -> None:
    """The same for a folder, and for a file that is no JSON object."""
    found = kind_of_path(path)
    if found is not None:
        raise other_kind(path, found=found, wanted=wanted)
