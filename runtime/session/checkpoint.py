"""Adapters and checkpoints on disk: safetensors and JSON, written beside their place and renamed into it.

An adapter folder holds ``meft_adapter.safetensors`` (per layer ``layers.I.rows`` ``[R, 2D]``, key and value of a row
side by side, ``layers.I.router`` ``[N, D]`` (stable: ``[2N, D]``, and a ``routing_stage``), and
``layers.I.active_counts`` int32 ``[R]``: in how many of training's ``micro_batches`` a row was active),
``meft_config.json``, and a README.md that says how to use it. The names are not PEFT's, so that PEFT does not take the
folder for its own; folders of older versions, whose files had PEFT's names or no counts, still load. A checkpoint
folder ``checkpoint-NNNNNNNN`` is an adapter folder with ``optimizer.safetensors``, ``training_state.json`` and
``observed.json``; because the folder appears by a rename, one that is there is complete.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from meft.planner.base.dtypes import AdapterDtype
from meft.planner.base.errors import UsageError
from meft.planner.base.files import replace_folder, write_atomic, writing
from meft.planner.base.schema import Count, File, Index, parse_json, read_text
from meft.planner.models.architecture import ModelShape
from meft.planner.records.plan import Plan, TokensSee
from meft.planner.records.report import Evaluation, Observed
from meft.planner.records.routing import Routing
from meft.runtime.session.model_card import model_card
from meft.runtime.session.session import Session
from meft.runtime.session.stages import ROUTING_STAGE, set_stage, stage_of
from meft.runtime.session.tensor_files import Pieces, load_tensors, save_tensors

ADAPTER_WEIGHTS = "meft_adapter.safetensors"
ADAPTER_CONFIG = "meft_config.json"
MODEL_CARD = "README.md"
OLD_ADAPTER_WEIGHTS = "adapter_model.safetensors"
OLD_ADAPTER_CONFIG = "adapter_config.json"
ACTIVE_COUNTS = "active_counts"
MICRO_BATCHES = "micro_batches"
OPTIMIZER_STATE = "optimizer.safetensors"
TRAINING_STATE = "training_state.json"
RUN_OBSERVED = "observed.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d{8})")
_MOMENTS = ("first_moment", "second_moment", "step_counts")
_HOT_TABLES = ("activations", "places")
_COUNTED_STEPS = "hot.counted_steps"
_ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, MODEL_CARD, OLD_ADAPTER_WEIGHTS, OLD_ADAPTER_CONFIG)
_FLOAT_BYTES = 4
_RNG_STATE_BYTES = 5056
_HEADER_BYTES_PER_LAYER = 2048
_TEXT_BYTES = 32 << 10
"""Of config, model card, state and observation, besides what grows with the steps and layers."""
_OBSERVED_BYTES_PER_LAYER = 512
_TEXT_BYTES_PER_STEP = 80


class AdapterConfig(File):
    """What an adapter folder says of itself."""

    kind: ClassVar[str] = "adapter config"

    meft_version: str
    base_model: ModelShape
    adapter_width: Count
    top_k: Count
    num_experts: Count
    num_probes: Count
    routing: Routing
    adapter_dtype: AdapterDtype
    plan_digest: str
    base_digest: str | None = None
    """See :func:`base_digest`; null in adapters of older versions."""
    tokens_see: TokensSee = "union"
    active_rows_per_layer: tuple[Annotated[float, Field(ge=0.0)], ...] = ()
    """Mean active rows of a micro-batch in training; empty where it is not known, as in adapters of older versions."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of Python, torch and transformers, when it was saved."""


def base_digest(model: nn.Module) -> str:
    """SHA-256 of a model's norm weights and biases in bf16: which model it is, beyond its shape.

    They are a small part of the model, differ between any two trained models, and are left alone by quantization.
    """
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.dim() == 1 and parameter.is_floating_point():
            bits = parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
            digest.update(bits.numpy().tobytes())
    return digest.hexdigest()


def base_differences(config: AdapterConfig, shape: ModelShape, digest: str) -> list[str]:
    """What of the model at hand is not what the adapter was trained beside, field by field."""
    differences = config.base_model.differences(shape).items()
    found = [f"{name} {theirs} in the adapter, {mine} here" for name, (theirs, mine) in differences]
    if not found and config.base_digest not in (None, digest):
        found = [
            f"base_digest {config.base_digest[:12]} in the adapter, {digest[:12]} here (same shape, other weights)"
        ]
    return found


class TrainingState(File):
    """Where a run stood, after a whole optimizer step."""

    kind: ClassVar[str] = "training state"

    plan_digest: str
    seed: int
    steps_done: Index
    total_steps: Count
    loss_per_step: tuple[float, ...]
    learning_rate_per_optimizer_step: tuple[float, ...]
    gradient_norm_per_optimizer_step: tuple[float, ...]
    data_digest: str
    settings: dict[str, float]
    evaluations: tuple[Evaluation, ...] = ()
    data: str = ""
    """As it was named; empty in checkpoints of older versions."""
    num_examples: Index = 0


class RunObserved(File):
    """What a checkpoint's process had measured: with it a run that was killed after its last step gets its report."""

    kind: ClassVar[str] = "observation of a run"

    observed: Observed
    tokens: Index
    gpus: Count = 1  # ranks that observed it
    nodes: Count = 1
    ranks: tuple[Observed, ...] = ()
    """Of each rank, where there were several."""


def adapter_bytes(plan: Plan) -> int:
    """Size of an adapter folder, from the plan's shapes; never less than it will be."""
    decision, shape = plan.decision, plan.request.model
    rows = decision.adapter_width * 2 * shape.hidden_size
    router = decision.needs.router_rows(decision.num_experts) * shape.hidden_size
    numbers = rows + router + decision.adapter_width
    return shape.num_layers * (_FLOAT_BYTES * numbers + _HEADER_BYTES_PER_LAYER) + _TEXT_BYTES


def checkpoint_bytes(plan: Plan, *, steps: int) -> int:
    """Size of a checkpoint folder after so many steps, from the plan's shapes; never less than it will be."""
    decision, shape = plan.decision, plan.request.model
    moments = 2 * decision.adapter_width * 2 * shape.hidden_size
    tables = decision.adapter_width * (1 + (len(_HOT_TABLES) if decision.hot_rows else 0))
    router = 2 * decision.needs.router_rows(decision.num_experts) * shape.hidden_size + decision.needs.gated
    numbers = shape.num_layers * (moments + tables + router)
    text = _TEXT_BYTES_PER_STEP * steps + _TEXT_BYTES
    headers = shape.num_layers * (2 * _HEADER_BYTES_PER_LAYER + _OBSERVED_BYTES_PER_LAYER)
    return adapter_bytes(plan) + _FLOAT_BYTES * numbers + headers + _RNG_STATE_BYTES + text


def save_adapter(session: Session, folder: Path, *, meft_version: str) -> None:
    """Write the adapter folder, replacing an older one whole; other files that are there stay.

    Raises:
        MachineError: the disk is full or refuses; what was there before is there still.
    """
    _save(folder, lambda: _files(session, meft_version))


def copy_adapter(config: AdapterConfig, tensors: dict[str, torch.Tensor], folder: Path, *, card: str | None) -> None:
    """The same for an adapter that was read; ``card`` is the text of its model card."""
    _save(folder, lambda: _AdapterFiles(config, tensors, card))


@dataclass(frozen=True)
class _AdapterFiles:
    """What an adapter's folder holds."""

    config: AdapterConfig
    tensors: Mapping[str, torch.Tensor | Pieces]
    card: str | None


def _files(session: Session, meft_version: str) -> _AdapterFiles:
    card = model_card(session.plan, meft_version=meft_version)
    return _AdapterFiles(adapter_config(session, meft_version), _whole(session, adapter_tensors(session)), card)


def _whole(session: Session, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | Pieces]:
    """The tensors, those of rows that machines own with the other machines'."""
    found: dict[str, torch.Tensor | Pieces] = {**tensors}
    if session.tables is not None:
        for name, tensor in tensors.items():
            shape = session.tables.shape_of(name, tensor)
            if shape is not None:
                found[name] = Pieces(shape, tensor.dtype, partial(session.tables.pieces, name))
    return found


def _save(folder: Path, files: Callable[[], _AdapterFiles]) -> None:
    with writing(folder):
        if _holds_other_files(folder):
            _write_into(files(), folder)
        else:
            replace_folder(folder, lambda new: _write_adapter(files(), new))


def save_checkpoint(
    session: Session,
    output: Path,
    state: TrainingState,
    *,
    meft_version: str,
    observe: Callable[[], RunObserved] | None = None,
) -> Path:
    """Write ``checkpoint-<steps>`` under ``output``, then remove older ones; returns its path.

    ``observe`` is asked once everything is on the host, what saving needed of the link included.

    Raises:
        MachineError: the disk is full or refuses; the checkpoint before this one is whole.
    """

    def write(new: Path) -> None:
        _write_adapter(_files(session, meft_version), new)
        save_tensors(_whole(session, optimizer_tensors(session)) | _random_states(session), new / OPTIMIZER_STATE)
        state.save(new / TRAINING_STATE)
        if observe is not None:
            observe().save(new / RUN_OBSERVED)

    before = list_checkpoints(output)
    folder = output / f"checkpoint-{state.steps_done:08d}"
    with writing(folder, hint=_what_is_where(before)):
        replace_folder(folder, write)
        for older in before:
            if older != folder:
                shutil.rmtree(older)
    return folder


def _what_is_where(before: list[Path]) -> str:
    if not before:
        return "there is no checkpoint yet; make room and start again"
    return f"the last checkpoint, {before[-1]}, is whole: make room and go on with --resume"


def list_checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders under ``output``, oldest first."""
    if not output.is_dir():
        return []
    found = (path for path in output.iterdir() if _CHECKPOINT.fullmatch(path.name))
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def latest_checkpoint(output: Path) -> Path:
    """The newest checkpoint, or a :class:`UsageError` that says there is none."""
    found = list_checkpoints(output)
    if not found:
        raise UsageError(f"--resume: no checkpoint-* folder in {output}; leave --resume out to start anew")
    return found[-1]


def load_checkpoint(session: Session, folder: Path) -> TrainingState:
    """Bring the session to where the checkpoint stood: rows, moments, routers and their optimizer."""
    state = TrainingState.load(folder / TRAINING_STATE)
    if state.plan_digest != session.plan.content_digest():
        raise UsageError(f"{folder}: was made by another plan; resume with the plan that the run began with")
    load_adapter(session, folder)
    tensors = load_tensors(folder / OPTIMIZER_STATE, wanted=lambda name: is_own(session, name))
    restore_optimizer(session, tensors, folder / OPTIMIZER_STATE)
    _restore_random_states(session, tensors, folder / OPTIMIZER_STATE)
    session.wait_for_peers()
    return state


def load_observed(folder: Path) -> RunObserved | None:
    """What a checkpoint's process had measured; None in checkpoints of older versions."""
    path = folder / RUN_OBSERVED
    return RunObserved.load(path) if path.exists() else None


def _random_states(session: Session) -> dict[str, torch.Tensor]:
    """Of torch's generator, and of the GPU's own, which dropout in a model draws from."""
    states = {"rng_state": torch.get_rng_state()}
    if session.device.kind == "cuda":
        states["cuda_rng_state"] = torch.cuda.get_rng_state(session.device.torch_device)
    return states


def _restore_random_states(session: Session, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """A checkpoint that was made without a GPU, or by an older version, has no state of the GPU's generator."""
    if "rng_state" not in tensors:
        raise UsageError(f"{path}: rng_state is missing")
    try:
        torch.set_rng_state(tensors["rng_state"])
        if session.device.kind == "cuda" and "cuda_rng_state" in tensors:
            torch.cuda.set_rng_state(tensors["cuda_rng_state"], session.device.torch_device)
    except (TypeError, RuntimeError):
        raise UsageError(f"{path}: rng_state is no state of torch's random generator") from None


def load_adapter(session: Session, folder: Path) -> None:
    """Read an adapter folder into the session; a :class:`UsageError` names what does not fit."""
    config = load_config(folder)
    expected = adapter_config(session, config.meft_version)
    require_base(config, expected.base_model, str(expected.base_digest), folder=folder)
    for name in ("adapter_width", "num_experts", "routing"):
        given, wanted = getattr(config, name), getattr(expected, name)
        if given != wanted:
            raise UsageError(f"{folder}: {name} does not fit this plan: {given} instead of {wanted}")
    path = weights_path(folder)
    restore_adapter(session, load_tensors(path, wanted=lambda name: is_own(session, name)), path)
    session.wait_for_peers()


def holds_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter's config, of this version or an older one."""
    return any((folder / name).exists() for name in (ADAPTER_CONFIG, OLD_ADAPTER_CONFIG))


def load_config(folder: Path) -> AdapterConfig:
    """What an adapter folder says of itself, of this version or an older one; or a :class:`UsageError`."""
    path, old = folder / ADAPTER_CONFIG, folder / OLD_ADAPTER_CONFIG
    if path.exists():
        return AdapterConfig.load(path)
    if not old.exists():
        raise UsageError(f"{folder}: holds no adapter (no {ADAPTER_CONFIG}); meft-run writes one to OUTPUT_DIR/adapter")
    content = parse_json(read_text(old, kind=AdapterConfig.kind), source=f"{AdapterConfig.kind} {old}")
    if isinstance(content, dict) and "peft_type" in content:
        raise UsageError(f"{folder}: holds an adapter of PEFT ({content['peft_type']}), which PEFT loads, not meft")
    return AdapterConfig.load(old)


def weights_path(folder: Path) -> Path:
    """Where the rows of an adapter folder are, of this version or an older one."""
    new, old = folder / ADAPTER_WEIGHTS, folder / OLD_ADAPTER_WEIGHTS
    return old if old.exists() and not new.exists() else new


def restore_adapter(session: Session, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """The inverse of :func:`adapter_tensors`, in place; ``path`` names their origin in errors."""
    targets = {name: target for name, target in adapter_tensors(session).items() if is_own(session, name)}
    if MICRO_BATCHES not in tensors:  # an adapter of an older version
        uses = _row_use(session)
        for use in uses.values():
            use.zero_()
        targets = {name: target for name, target in targets.items() if name not in uses}
    tensors = tensors if session.tables is None else session.tables.own_parts(tensors)
    with torch.no_grad():
        for name, target in targets.items():
            _restore(target, tensors, name, path)
    if ROUTING_STAGE in targets:
        set_stage(session, int(targets[ROUTING_STAGE]))
    session.rows_were_written()


def require_base(config: AdapterConfig, shape: ModelShape, digest: str, *, folder: Path) -> None:
    """Raise :class:`UsageError`, listing what differs, unless the adapter was trained beside this very model."""
    differences = base_differences(config, shape, digest)
    if differences:
        listed = ", ".join(differences)
        raise UsageError(f"{folder}: the adapter belongs to {config.base_model.name}, which this is not: {listed}")


def adapter_tensors(session: Session) -> dict[str, torch.Tensor]:
    """What an adapter folder holds, by name: views of the rows and how often each was active, and the routers where
    they are.

    Waits for updates under way.
    """
    session.bring_home()
    tensors = {f"layers.{layer}.rows": tables.weights for layer, tables in enumerate(session.store.layers)}
    tensors |= {f"layers.{layer}.router": weight.detach() for layer, weight in enumerate(session.router_weights)}
    if (stage := stage_of(session)) is not None:
        tensors[ROUTING_STAGE] = torch.tensor([stage])
    return tensors | _row_use(session)


def _row_use(session: Session) -> dict[str, torch.Tensor]:
    use = session.store.use
    counts = {f"layers.{layer}.{ACTIVE_COUNTS}": count for layer, count in enumerate(use.counts)}
    return counts | {MICRO_BATCHES: use.micro_batches}


def _write_adapter(files: _AdapterFiles, folder: Path) -> None:
    save_tensors(files.tensors, folder / ADAPTER_WEIGHTS)
    if files.card is not None:
        write_atomic(folder / MODEL_CARD, files.card)
    files.config.save(folder / ADAPTER_CONFIG)


def _write_into(files: _AdapterFiles, folder: Path) -> None:
    """The adapter's files among others, each whole at any time; the weights come last but one, the card first."""
    if files.card is not None and not (folder / MODEL_CARD).exists():
        write_atomic(folder / MODEL_CARD, files.card)
    new = folder / f".{ADAPTER_WEIGHTS}.new"
    try:
        save_tensors(files.tensors, new)
        new.replace(folder / ADAPTER_WEIGHTS)
    finally:
        new.unlink(missing_ok=True)
    files.config.save(folder / ADAPTER_CONFIG)


def _holds_other_files(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    return any(path.name not in _ADAPTER_FILES for path in folder.iterdir())


def adapter_config(session: Session, meft_version: str) -> AdapterConfig:
    """What a session's adapter folder says of itself."""
    decision = session.plan.decision
    return AdapterConfig(
        meft_version=meft_version,
        base_model=session.plan.request.model,
        adapter_width=decision.adapter_width,
        top_k=decision.top_k,
        num_experts=decision.num_experts,
        num_probes=decision.num_probes,
        routing=decision.routing,
        adapter_dtype=session.plan.request.adapter_dtype,
        plan_digest=session.plan.content_digest(),
        base_digest=base_digest(session.model),
        tokens_see=decision.tokens_see,
        active_rows_per_layer=session.store.use.active_rows(),
        versions={"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
    )


def optimizer_tensors(session: Session) -> dict[str, torch.Tensor]:
    """Moments and step counts of the rows and of the routers, by name, and which rows are hot: views, no copies.

    Waits for updates under way. The number of steps that activations were counted in is a copy.
    """
    session.bring_home()
    tensors = {
        f"layers.{layer}.{name}": getattr(tables, name)
        for layer, tables in enumerate(session.store.layers)
        for name in _MOMENTS
    }
    for layer, index in enumerate(session.store.hot):
        tensors |= {f"layers.{layer}.{name}": getattr(index, name) for name in _HOT_TABLES}
    if session.exchange.hot is not None:
        tensors[_COUNTED_STEPS] = torch.tensor([session.exchange.hot.counted_steps])
    if session.router_optimizer is not None:
        for layer, weight in enumerate(session.router_optimizer.param_groups[0]["params"]):
            for name, value in session.router_optimizer.state[weight].items():
                tensors[f"layers.{layer}.router.{name}"] = value.detach()
    return tensors


def restore_optimizer(session: Session, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """The inverse of :func:`optimizer_tensors`, in place."""
    hot = session.exchange.hot
    if hot is not None:
        hot.require_no_gradients()
    targets = {name: target for name, target in optimizer_tensors(session).items() if is_own(session, name)}
    tensors = tensors if session.tables is None else session.tables.own_parts(tensors)
    for name, target in targets.items():
        _restore(target, tensors, name, path)
    if hot is not None:
        hot.counted_steps = int(targets[_COUNTED_STEPS])
    session.optimizer_state_was_written()


def is_own(session: Session, name: str) -> bool:
    """Whether this process reads a tensor: of a machine's ranks the first reads the tables that all share."""
    peers = session.peers
    if peers is None or ".router" in name or name.endswith("rng_state") or name == ROUTING_STAGE:
        return True
    counted = name == MICRO_BATCHES or name.endswith(ACTIVE_COUNTS)  # added up over all ranks when they are saved
    return peers.rank == 0 if counted else peers.local == 0


def _restore(target: torch.Tensor, tensors: Mapping[str, torch.Tensor], name: str, path: Path) -> None:
    source = tensors.get(name)
    if source is None or source.shape != target.shape or source.dtype != target.dtype:
        found = "nothing" if source is None else f"{tuple(source.shape)} {source.dtype}"
        raise UsageError(f"{path}: {name} should be {tuple(target.shape)} {target.dtype}, found {found}")
    target.copy_(source)
