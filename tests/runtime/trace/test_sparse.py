"""MEFT's simulated step against the emulated device's own books, event by event, and against the trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from make_plan import hand_plan  # noqa: E402
from sessions import CENTROIDS, EXPERTS, STABLE, SWITCH  # noqa: E402
from sparse_setup import decision  # noqa: E402
from trace_setups import config_of  # noqa: E402

from meft.planner.memory.device import predict_device_memory  # noqa: E402
from meft.planner.memory.replayed import peaks_of, replayed_peaks  # noqa: E402
from meft.planner.models.configs import shape_from_config  # noqa: E402
from meft.planner.records.plan import Plan  # noqa: E402
from meft.planner.records.profile_catalogue import load_gpu  # noqa: E402
from meft.planner.simulation.stream import StreamEvent, stream_peaks  # noqa: E402
from meft.planner.sparse.step import simulate_sparse  # noqa: E402
from meft.runtime.data.examples import Batch  # noqa: E402
from meft.runtime.device.books import DeviceBooks  # noqa: E402
from meft.runtime.device.device import EmulatedDevice  # noqa: E402
from meft.runtime.device.event_log import EventLog  # noqa: E402
from meft.runtime.device.lanes import Overlapped  # noqa: E402
from meft.runtime.ranks import sharded_base  # noqa: E402
from meft.runtime.session import session  # noqa: E402
from meft.runtime.session.model_loading import ATTENTION, COMPUTE_DTYPES  # noqa: E402
from meft.runtime.session.session import WindowEnd, open_session  # noqa: E402
from meft.runtime.trace.run import trace_plan  # noqa: E402

NARROW = {"adapter_width": 64, "top_k": 4, "active_rows_cap": 48, "rows_in_backward": "refetched"}
BF16 = {"weights_dtype": "bf16", "adapter_dtype": "bf16"}
MIXED = {"weights_dtype": "bf16", "adapter_dtype": "fp32"}
CHUNKED = {"token_chunks": 4}
UNBALANCED = {"switch": {"balance_loss": 0.0}}
"""The balance loss makes some numbers a layer, which no term counts."""
CASES = [
    ("llama", {}, {}),
    ("llama", {}, {"batch_size": 1}),
    ("llama", {}, BF16),
    ("llama", {"activation_checkpointing": True, "prefetch_depth": 1}, MIXED),
    ("llama", {"rows_in_backward": "retained"}, {"attention": "eager"}),
    ("llama", {"activation_checkpointing": True}, BF16 | {"attention": "eager"}),
    ("llama", EXPERTS | {"prefetch_depth": 1}, MIXED),
    ("llama", EXPERTS | {"activation_checkpointing": True}, {}),
    ("llama", {"cached_rows": 32, "gradients_on_device": True}, BF16 | {"grad_accum": 2}),
    ("llama", EXPERTS | {"hot_rows": 32, "hot_after_steps": 1}, BF16),
    ("llama", {"tokens_see": "own"}, {}),
    ("llama", {"tokens_see": "own", "activation_checkpointing": True}, MIXED),
    ("llama", EXPERTS | {"tokens_see": "own", "prefetch_depth": 1}, BF16),
    ("llama", CHUNKED, {}),
    ("llama", CHUNKED | {"prefetch_depth": 1, "activation_checkpointing": True}, BF16),
    ("llama", CHUNKED | EXPERTS | {"prefetch_depth": 2}, MIXED),
    ("llama", CHUNKED | EXPERTS | {"tokens_see": "own", "activation_checkpointing": True}, BF16 | {"batch_size": 1}),
    ("llama", CENTROIDS | {"prefetch_depth": 1}, BF16),
    ("llama", SWITCH | UNBALANCED, {}),
    ("llama", SWITCH | UNBALANCED | {"prefetch_depth": 1}, BF16),
    ("llama", SWITCH | UNBALANCED | {"activation_checkpointing": True, "tokens_see": "own"}, MIXED),
    ("llama", SWITCH | {"switch": {"jitter": 0.0, "balance_loss": 0.0}}, BF16),
    ("qwen2", {}, {}),
    ("qwen3", {"activation_checkpointing": True}, MIXED),
    ("mistral", {}, {}),
    ("llama", {}, {"packed": True}),
    ("llama", {"activation_checkpointing": True}, {"packed": True, "attention": "eager"}),
    ("llama", EXPERTS | {"prefetch_depth": 1}, MIXED | {"packed": True, "batch_size": 1}),
    ("qwen3", {"activation_checkpointing": True}, BF16 | {"packed": True}),
    ("mistral", {}, {"packed": True}),
]


def plan_of(
    model_type: str, choice: dict[str, Any], asked: dict[str, Any], **changes: int
) -> tuple[Plan, dict[str, Any]]:
    config = config_of(model_type, **({"num_hidden_layers": 3} | changes))
    shape = shape_from_config(config, name=model_type)
    return hand_plan(shape, decision(**(NARROW | choice)), **({"batch_size": 2, "seq_len": 32} | asked)), config


def logged(plan: Plan, config: dict[str, Any], *, windows: int) -> tuple[list[list[StreamEvent]], EmulatedDevice]:
    """What a real run writes into the books: until the first window, and each window; overlapped."""
    options = dict(config)
    made = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    model = transformers.AutoModelForCausalLM.from_config(
        made,
        dtype=COMPUTE_DTYPES[plan.request.weights_dtype],
        attn_implementation=ATTENTION[plan.request.attention],
    )
    log = EventLog()
    device = EmulatedDevice(1 << 40, DeviceBooks(1 << 40, log))
    opened = open_session(plan, model, device, seed=0, compiled=False, schedule=Overlapped())
    try:
        log.moment("0")
        for window in range(windows):
            for left in reversed(range(plan.request.grad_accum)):
                ids = torch.randint(0, 256, (plan.request.batch_size, plan.request.seq_len))
                end = None if left else WindowEnd(1e-3, 1.0)
                batch = Batch(ids, torch.ones_like(ids), ids, two_documents(ids) if plan.request.packed else None)
                opened.step(batch, loss_scale=1.0, window_end=end)
            opened.optimizer_step(learning_rate=1e-3, max_norm=1.0)
            log.moment(str(window + 1))
        opened.drain()
    finally:
        opened.close()
    stream = log.stream()
    ends = [0, *(stream.moments[str(window)] for window in range(windows + 1))]
    return [list(stream.events[first:last]) for first, last in pairwise(ends)], device


def two_documents(ids: torch.Tensor) -> torch.Tensor:
    """Where each sequence's two documents begin."""
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, 0] = starts[:, ids.shape[1] // 3] = True
    return starts


def in_order(events: Sequence[StreamEvent]) -> list[object]:
    """Sizes as they come, and which of them go; the order of those that go together makes no difference."""
    number = {}
    for event in events:
        number.setdefault(event.tensor, len(number))
    found: list[object] = []
    for comes, group in groupby(events, key=lambda event: event.num_bytes > 0):
        some = list(group)
        found += [event.num_bytes for event in some] if comes else [sorted(number[event.tensor] for event in some)]
    return found


@pytest.mark.parametrize(("model_type", "choice", "asked"), CASES)
def test_every_tensor_comes_and_goes_as_on_the_emulated_device(model_type, choice, asked) -> None:
    require_equal(*plan_of(model_type, choice, asked))


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_single_key_head_is_written_out_by_the_products_alone(model_type, batch_size, num_layers) -> None:
    """Eager attention repeats several heads for good; of one it makes a view, which each product copies."""
    asked = BF16 | {"attention": "eager", "batch_size": batch_size}
    require_equal(*plan_of(model_type, {}, asked, num_key_value_heads=1, num_hidden_layers=num_layers))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_beside_a_mask_a_single_key_head_stays_a_view(batch_size) -> None:
    """sdpa beside the mask of packed sequences: several heads would be written out for good."""
    plan, config = plan_of("llama", {}, BF16 | {"packed": True, "batch_size": batch_size}, num_key_value_heads=1)
    require_equal(plan, config)


def test_full_and_sliding_layers_have_a_mask_each() -> None:
    """Of 20,000 bytes each, which takes a block more than 40,000 together."""
    asked = MIXED | {"attention": "eager", "batch_size": 4, "seq_len": 50}
    plan, config = plan_of("gemma2", {"activation_checkpointing": True}, asked)
    _, device = logged(plan, config, windows=2)
    peaks = replayed_peaks(plan.request, plan.decision, load_gpu("emulated"))
    assert peaks.allocated_bytes == device.peaks().allocated_bytes


def test_embeddings_of_tokens_and_positions_last_until_the_decoder_returns() -> None:
    """They have names there; in a model of one layer that decides the peak."""
    config = {"model_type": "gpt2", "n_embd": 256, "n_layer": 1, "n_head": 4, "n_inner": 512, "vocab_size": 256}
    config |= {"n_positions": 64}
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    shape = shape_from_config(config, name="gpt2")
    plan = hand_plan(shape, decision(**NARROW), **({"batch_size": 4, "seq_len": 50} | BF16))
    _, device = logged(plan, config, windows=2)
    peaks = replayed_peaks(plan.request, plan.decision, load_gpu("emulated"))
    assert peaks.allocated_bytes >= device.peaks().allocated_bytes


NUMBERS_BYTES = 64
"""Less than a bool for each token: numbers of a loss that is the routing's, which no term counts."""


@pytest.mark.parametrize(
    ("choice", "asked"),
    [
        ({}, {}),
        ({"prefetch_depth": 1}, BF16),
        ({"activation_checkpointing": True, "tokens_see": "own"}, MIXED),
        ({"hot_rows": 32, "hot_after_steps": 1}, BF16 | {"grad_accum": 2}),
    ],
)
def test_stable_routing_makes_in_its_first_stage_what_is_simulated(choice, asked) -> None:
    """Event by event but for single numbers; they are all that its peak has beside."""
    plan, config = plan_of("llama", STABLE | choice, asked)
    (once, *windows), device = logged(plan, config, windows=3 if plan.decision.hot_rows else 2)
    simulated = simulate_sparse(plan.request, plan.decision, workspace_bytes=0, emulated=True)
    assert in_order(simulated.once[: len(once)]) == in_order(once)
    for mine, its in ((simulated.windows[0], windows[0]), (simulated.windows[-1], windows[-1])):
        assert in_order(_large(mine)) == in_order(_large(its))
    peaks = replayed_peaks(plan.request, plan.decision, load_gpu("emulated"))
    assert 0 <= device.peaks().allocated_bytes - peaks.allocated_bytes <= 4 * 512


def _large(events: Sequence[StreamEvent]) -> list[StreamEvent]:
    return [event for event in events if abs(event.num_bytes) >= NUMBERS_BYTES]


def require_equal(plan: Plan, config: dict[str, Any]) -> None:
    """The simulated step and the emulated device's are the same events, and so are their peaks."""
    (once, *windows), device = logged(plan, config, windows=3 if plan.decision.hot_rows else 2)
    simulated = simulate_sparse(plan.request, plan.decision, workspace_bytes=0, emulated=True)
    attached = len(once)
    assert in_order(simulated.once[:attached]) == in_order(once)
    assert in_order(simulated.windows[0]) == in_order(windows[0])
    assert in_order(simulated.windows[-1]) == in_order(windows[-1])
    peaks = replayed_peaks(plan.request, plan.decision, load_gpu("emulated"))
    assert peaks.allocated_bytes == device.peaks().allocated_bytes
    assert peaks.reserved_bytes == device.peaks().reserved_bytes


SHARDED = [
    ("llama", {}, {}, {}),
    ("llama", {"activation_checkpointing": True, "prefetch_depth": 1}, BF16, {}),
    ("llama", {"rows_in_backward": "retained"}, {"attention": "eager"}, {"intermediate_size": 189}),
    ("llama", EXPERTS | {"activation_checkpointing": True}, MIXED, {"num_hidden_layers": 1}),
    ("qwen2", EXPERTS, MIXED, {"num_hidden_layers": 1}),
    ("qwen3", {"activation_checkpointing": True}, {}, {"intermediate_size": 191}),
    ("mistral", {"cached_rows": 32, "gradients_on_device": True}, BF16, {}),
]
"""And what is changed of the model: an odd number of rows is padded, one layer has none to gather ahead."""


@pytest.fixture
def one_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process, beside one that is not there: what that would send is taken to be what this one has, which is as
    large."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def gathered(output: torch.Tensor, own: torch.Tensor, *, async_op: bool, **_: object) -> str | None:
        output.view(-1, own.numel()).copy_(own.clone())
        return "begun" if async_op else None

    def alone(plan: Plan, model: Any, blocks: Any, device: Any, peers: Any) -> Any:
        return sharded_base.placed(plan, model, blocks, device, SimpleNamespace(here=2, machines=1))

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    monkeypatch.setattr(sharded_base, "_all_gather", gathered)
    monkeypatch.setattr(session, "placed", alone)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("model_type", "choice", "asked", "changes"), SHARDED)
def test_a_sharded_base_comes_and_goes_as_on_the_emulated_device(
    one_of_two_ranks, model_type, choice, asked, changes
) -> None:
    among = {"gpus": 2, "shard_base": True, "grad_accum": 2}
    require_equal(*plan_of(model_type, choice, asked | among, **changes))


def test_a_sharded_bases_plan_says_the_peak_of_the_emulated_device(one_of_two_ranks) -> None:
    """By its ledger, within 1 %: without a remainder that the replay has to add where its lines are the larger."""
    for choice in ({}, {"activation_checkpointing": True}):
        plan, config = plan_of("llama", choice, BF16 | {"gpus": 2, "shard_base": True, "grad_accum": 2})
        memory = predict_device_memory(request=plan.request, decision=plan.decision, gpu=load_gpu("emulated"))
        _, device = logged(plan, config, windows=2)
        assert memory.peak_allocated_bytes == pytest.approx(device.peaks().allocated_bytes, rel=0.01)
        assert {entry.phase for entry in memory.entries if entry.category == "gathered_weights"} == {
            "forward",
            "backward",
        }


DROPOUT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
OTHERS = [
    ("gpt2", DROPOUT),
    ("mistral", {"sliding_window": 16}),
    ("llama", {"rope_scaling": LONG | {"original_max_position_embeddings": 16}}),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
]


@pytest.mark.parametrize(("model_type", "changes"), OTHERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_windows_and_rotary_kinds_on_the_emulated_device(model_type, changes, checkpointing) -> None:
    """Not event by event: the masks' making is not followed; the allocated peak, counted by the books, within 0.1 %."""
    config = config_of(model_type, **changes)
    shape = shape_from_config(config, name=model_type)
    chosen = decision(**(NARROW | {"activation_checkpointing": checkpointing}))
    plan = hand_plan(shape, chosen, batch_size=2, seq_len=64)
    device = logged(plan, config, windows=1)[1]
    peaks = replayed_peaks(plan.request, plan.decision, load_gpu("emulated"))
    assert peaks.allocated_bytes == pytest.approx(device.peaks().allocated_bytes, rel=0.001)


WIDE = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8192}


@pytest.mark.parametrize(
    ("choice", "asked"),
    [
        ({}, BF16),
        ({}, {}),
        ({"activation_checkpointing": True}, MIXED),
        (EXPERTS | {"prefetch_depth": 1}, BF16),
        ({}, BF16 | {"attention": "eager"}),
        ({"hot_rows": 128, "cached_rows": 64, "gradients_on_device": True}, BF16),
        ({"tokens_see": "own"}, {}),
        (EXPERTS | {"tokens_see": "own"}, BF16),
        (SWITCH, BF16),
        (STABLE, BF16),
        ({}, BF16 | {"packed": True}),
        ({"activation_checkpointing": True}, MIXED | {"packed": True}),
        ({}, BF16 | {"packed": True, "attention": "eager"}),
    ],
)
def test_on_cuda_it_reserves_what_the_trace_does(choice, asked) -> None:
    config = config_of("llama", num_hidden_layers=3, **WIDE)
    shape = shape_from_config(config, name="llama")
    chosen = decision(**(NARROW | {"adapter_width": 512, "active_rows_cap": 256} | choice))
    plan = hand_plan(shape, chosen, **({"batch_size": 4, "seq_len": 64} | asked))
    traced = stream_peaks(trace_plan(plan, config))
    simulated = peaks_of(simulate_sparse(plan.request, chosen, workspace_bytes=8_519_680, emulated=False))
    assert simulated.reserved_bytes == traced.reserved_bytes
    assert simulated.allocated_bytes == pytest.approx(traced.allocated_bytes, rel=1e-4)  # position ids, and the like
