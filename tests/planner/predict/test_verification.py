"""``--verify``: how the trace is found, what is recorded, and what is refused."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint, EntryPoints

import pytest
from click.testing import CliRunner
from plan_samples import sample_plan

from meft.planner.base import tracers
from meft.planner.base.errors import EXIT_INFEASIBLE, EXIT_MACHINE, InfeasibleError, MachineError
from meft.planner.cli.main import command
from meft.planner.predict import verification
from meft.planner.records.plan import Plan, Verification
from meft.planner.render.plan import plan_view
from meft.planner.simulation.stream import Stream, StreamEvent

MIB = 1 << 20


def stream_of(*sizes_mib: int) -> Stream:
    """Tensors that come one after the other and stay."""
    events = [StreamEvent(number, size * MIB, "forward", "ffn") for number, size in enumerate(sizes_mib)]
    return Stream(events, {"optimizer_step_1": len(events)})


def with_tracer(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """An entry point of the group that leads to ``target``."""
    points = [EntryPoint(name, target, tracers.GROUP) for name in ("plan", "setup")]
    monkeypatch.setattr(tracers, "entry_points", lambda group: EntryPoints(points))


def test_the_tracer_is_an_entry_point_of_the_installed_package() -> None:
    pytest.importorskip("torch")
    found = {each.name: each.value for each in tracers.entry_points(group=tracers.GROUP)}
    assert found == {
        "plan": "meft.runtime.trace.verify:verify_plan",
        "setup": "meft.runtime.trace.verify:verify_setup",
        "emulated": "meft.runtime.trace.verify:verify_emulated",
        "shape": "meft.runtime.session.measure:measured_shape",
        "script": "meft.runtime.trace.script:ScriptTracer",
        "probe": "meft.runtime.trace.probe:probe_setup",
    }


def test_without_torch_the_error_says_what_to_install(monkeypatch) -> None:
    with_tracer(monkeypatch, "a_module_that_is_not_there:trace")
    with pytest.raises(MachineError, match=r"needs torch: pip install 'meft\[run\]'") as error:
        verification.traced_plan(sample_plan(), {}, workspace_bytes=0)
    assert error.value.exit_code == EXIT_MACHINE


def test_without_an_entry_point_the_error_says_so(monkeypatch) -> None:
    monkeypatch.setattr(tracers, "entry_points", lambda group: EntryPoints())
    with pytest.raises(MachineError, match="no tracer is installed"):
        verification.traced_plan(sample_plan(), {}, workspace_bytes=0)


class Tracer:
    """Stands for the trace: notes the rows it is asked for, and needs a MiB for each."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, plan: Plan, config: object, *, workspace_bytes: int) -> Stream:
        rows = plan.prediction.sparsity.active_rows_per_layer
        self.asked.append(rows)
        return stream_of(*rows)


def test_a_plan_is_traced_with_its_rows_and_with_all_at_the_cap(monkeypatch) -> None:
    tracer = Tracer()
    monkeypatch.setattr(verification, "_tracer", lambda name: tracer)
    plan = sample_plan(gpu_mem_bytes=1024 * MIB)
    cap = (plan.decision.active_rows_cap,) * plan.request.model.num_layers
    found = verification.verified(plan, {}, workspace_bytes=7)
    assert tracer.asked == [plan.prediction.sparsity.active_rows_per_layer, cap]
    assert found.verification is not None
    assert found.verification.peak_allocated_bytes == sum(plan.prediction.sparsity.active_rows_per_layer) * MIB
    assert found.verification.peak_allocated_bytes_at_cap == sum(cap) * MIB
    assert found.verification.cache_flushes_at_cap == 0
    assert Plan.from_json(found.to_json(), source="test") == found
    assert found.model_copy(update={"verification": None}) == plan


def test_a_trace_above_the_budget_is_infeasible(monkeypatch) -> None:
    plan = sample_plan()
    budget = plan.prediction.device_memory.allocator_budget_bytes
    monkeypatch.setattr(verification, "_tracer", lambda name: lambda *_, **__: stream_of(budget // MIB + 1))
    with pytest.raises(
        InfeasibleError, match=r"reserves .* with its rows at the cap, more than the allocator's budget"
    ) as caught:
        verification.verified(plan, {}, workspace_bytes=0)
    verdict = caught.value.verdict
    assert verdict is not None
    assert (verdict.binding, verdict.limit) == ("device memory", budget)
    assert verdict.needed > budget


def test_what_fits_only_by_giving_back_the_cache_is_counted(monkeypatch) -> None:
    """Half the budget comes and goes in one size, then a little more in another: the cache of the first must go."""
    plan = sample_plan(gpu_mem_bytes=1024 * MIB)
    half = plan.prediction.device_memory.allocator_budget_bytes // MIB // 2 + 20
    first, second = (StreamEvent(number, (half + number) * MIB, "forward", "ffn") for number in range(2))
    stream = Stream([first, first._replace(num_bytes=-first.num_bytes), second], {"optimizer_step_1": 3})
    monkeypatch.setattr(verification, "_tracer", lambda name: lambda *_, **__: stream)
    found = verification.verified(plan, {}, workspace_bytes=0)
    assert found.verification is not None
    assert found.verification.cache_flushes_at_cap == 1


def test_the_view_compares_predicted_and_traced(capsys) -> None:
    from meft.planner.render.tables import show

    traced = Verification(
        peak_allocated_bytes=2 * MIB,
        peak_reserved_bytes=4 * MIB,
        peak_allocated_bytes_at_cap=3 * MIB,
        peak_reserved_bytes_at_cap=5 * MIB,
        cache_flushes_at_cap=2,
    )
    plan = sample_plan().model_copy(update={"verification": traced})
    show(plan_view(plan, path="plan.json", notes=(), verbose=False))
    text = capsys.readouterr().out
    assert "Verified" in text
    assert "giving back its cache 2 times" in " ".join(text.split())


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_verifies_a_plan_for_a_real_model(glass_folder, tmp_path) -> None:
    """The tiny model's plan, its ledger within a few percent of the trace."""
    pytest.importorskip("peft")
    output = tmp_path / "plan.json"
    words = ["--gpu-mem", "2GB", "--host-mem", "4GB", "--model", str(glass_folder), "--seq-len", "64"]
    words += ["--batch-size", "2", "--adapter-width", "128", "--top-k", "8", "--verify", "-o", str(output)]
    ended = CliRunner().invoke(command, words, catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    plan = Plan.load(output)
    assert plan.verification is not None
    predicted = plan.prediction.device_memory.peak_allocated_bytes
    assert plan.verification.peak_allocated_bytes == pytest.approx(predicted, rel=0.05)
    assert "Verified" in ended.output


def test_the_command_ends_with_3_when_the_trace_does_not_fit(glass_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(verification, "_tracer", lambda name: lambda *_, **__: stream_of(4096))
    output = tmp_path / "plan.json"
    words = ["--gpu-mem", "2GB", "--host-mem", "4GB", "--model", str(glass_folder), "--seq-len", "64", "--verify"]
    ended = CliRunner().invoke(command, [*words, "-o", str(output)])
    assert ended.exit_code == EXIT_INFEASIBLE
    assert not output.exists()
    assert len(json.dumps(ended.output)) > 2
