"""The trace against real runs on the CPU: same storages in the same order where CUDA and CPU do the same.

A CPU run that is looked on by a dispatch mode differs in one thing: autograd adds gradients out of place. For the
comparison the trace does so too; that it decides as the engine does when left alone has a test of its own.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from storage_tracker import StorageTracker  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from trace_setups import config_of, setup_of  # noqa: E402

from meft.planner.records.setup import TrainingSetup  # noqa: E402
from meft.runtime.fake.books import CudaBooks  # noqa: E402
from meft.runtime.session.documents import unpacked_sequences  # noqa: E402
from meft.runtime.trace.methods import attach_method  # noqa: E402
from meft.runtime.trace.run import trace_training  # noqa: E402

SCALAR_BYTES = 8
"""Losses, seeds of gradients and counts of steps: some of them live on the host in a CUDA run."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def real_model(setup: TrainingSetup, config: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(**config)
    dtype = DTYPES[setup.weights_dtype]
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation=setup.attention)
    if setup.activation_checkpointing:
        model.activation_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attach_method(model, setup).train()


def real_run(setup: TrainingSetup, config: dict[str, Any]) -> list[int]:
    """Bytes that come (above zero) and go (below) in two steps of a stock loop."""
    model = real_model(setup, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    tracker = StorageTracker(resident=[*model.parameters(), *model.buffers()])
    begin = len(tracker.events)
    outputs = batch = None
    with unpacked_sequences(), tracker:
        for _ in range(2):
            shape = (setup.batch_size, setup.seq_len)
            batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels")}
            outputs = model(**batch)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        events = [event.num_bytes for event in tracker.events[begin:] if abs(event.num_bytes) > SCALAR_BYTES]
    del outputs, batch
    return events


def traced_run(setup: TrainingSetup, config: dict[str, Any]) -> list[int]:
    stream = trace_training(setup, config, workspace_bytes=0)
    steps = stream.events[stream.moments["attached"] :]
    return [event.num_bytes for event in steps if abs(event.num_bytes) > SCALAR_BYTES]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"method": "full", "activation_checkpointing": True}),
        ("llama", {"method": "lora", "weights_dtype": "bf16", "activation_checkpointing": True}),
        ("gemma2", {"method": "parallel-adapter", "weights_dtype": "bf16"}),
        ("qwen3", {"method": "lora", "weights_dtype": "fp32"}),
        ("gpt2", {"method": "parallel-adapter", "weights_dtype": "fp32"}),
        ("opt", {"method": "full", "weights_dtype": "fp32"}),
    ],
)
def test_every_storage_comes_and_goes_as_in_a_real_run(model_type, changes, monkeypatch) -> None:
    """Eager attention, whose kernels are the same; LayerNorm in fp32, where its statistics are."""
    monkeypatch.setattr(CudaBooks, "_is_unshared", lambda self, gradient: False)
    config = config_of(model_type)
    setup = setup_of(config, attention="eager", **changes)
    assert traced_run(setup, config) == real_run(setup, config)


# --- gradients that meet ---------------------------------------------------------------------------------------------


def sums_of_the_engine(model: torch.nn.Module, ids: torch.Tensor) -> Counter[tuple[str, tuple[int, ...]]]:
    """Which sums of gradients autograd makes in place (``add_``) and which not, by shape, with nothing looking on."""
    loss = model(input_ids=ids, labels=ids).loss
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        loss.backward()
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for event in recorded.events():
        of_engine = event.cpu_parent is None or event.cpu_parent.name.startswith("autograd::engine")
        if event.name in ("aten::add", "aten::add_") and of_engine and event.input_shapes[0] == event.input_shapes[1]:
            found[event.name, tuple(event.input_shapes[0])] += 1
    return found


def sums_of_the_books(
    model: torch.nn.Module, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> Counter[tuple[str, tuple[int, ...]]]:
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    decide = CudaBooks._is_unshared

    def noted(self: CudaBooks, gradient: torch.Tensor) -> bool:
        in_place = decide(self, gradient)
        found["aten::add_" if in_place else "aten::add", tuple(gradient.shape)] += 1
        return in_place

    monkeypatch.setattr(CudaBooks, "_is_unshared", noted)
    books = CudaBooks(workspace_bytes=0, categorise=lambda: "any")
    for tensor in (*model.parameters(), *model.buffers(), ids):
        books.adopt(tensor)
    with books:
        model(input_ids=ids, labels=ids).loss.backward()
    return found


@pytest.mark.parametrize(
    ("model_type", "changes", "reentrant"),
    [
        ("llama", {"tie_word_embeddings": True}, None),
        ("llama", {}, True),
        ("gpt2", {}, False),
        ("phi", {}, None),
    ],
)
def test_gradients_meet_in_place_where_the_engine_lets_them(model_type, changes, reentrant, monkeypatch) -> None:
    """Tied embeddings meet out of place: the head's gradient is a view, whose base the engine's rule counts."""
    config = config_of(model_type, **changes)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    ids = torch.zeros((2, 16), dtype=torch.int64)
    expected = sums_of_the_engine(model, ids)
    assert expected["aten::add_", (2, 16, 64)] > 0
    for parameter in model.parameters():
        parameter.grad = None
    assert sums_of_the_books(model, ids, monkeypatch) == expected
