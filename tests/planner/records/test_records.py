"""Records as files: exact round trips, digests that notice every change, and errors that name what is wrong."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import DECISION, SHAPE, sample_plan, sample_report, sample_request
from pydantic import ValidationError

from meft.planner.base.dtypes import AdapterDtype, WeightsDtype
from meft.planner.base.errors import EXIT_USAGE, UsageError
from meft.planner.base.schema import SCHEMA_VERSION, Basis, parse_json, validated
from meft.planner.records.plan import (
    LANES,
    Attention,
    Decision,
    HostMemory,
    MemoryEntry,
    NumberUsed,
    Objective,
    ParetoPoint,
    Phase,
    Plan,
    Request,
    RowsInBackward,
    SearchSummary,
    Timing,
    Transfer,
    TransferEntry,
)
from meft.planner.records.report import Comparison, Report
from meft.planner.records.routing import ROUTINGS, Routing, StableOptions, SwitchOptions

PLAN = sample_plan()
REPORT = sample_report(PLAN)
FILES = [pytest.param(PLAN, id="plan"), pytest.param(REPORT, id="report")]


def changed(record: Plan | Report, **fields: Any) -> str:
    """The record's file with top-level fields replaced, its digest as it was."""
    return json.dumps(json.loads(record.to_json()) | fields)


# --- round trips -----------------------------------------------------------------------------------------------------

sizes = st.integers(0, 1 << 60)  # above 2^53, where a float would lose a byte
counts = st.integers(1, 1 << 40)
seconds = st.floats(0, 1e9)
rates = st.floats(0, 1e300, exclude_min=True)
texts = st.text(max_size=12)  # any unicode
bases = st.sampled_from(get_args(Basis))


@st.composite
def decisions(draw: st.DrawFn) -> Decision:
    num_experts, rows_per_expert = draw(st.integers(1, 50)), draw(st.integers(1, 200))
    exact = num_experts == 1
    routing = draw(st.sampled_from([name for name in ROUTINGS if exact or ROUTINGS[name].in_experts]))
    num_probes = 1 if exact or ROUTINGS[routing].one_expert else draw(st.integers(1, num_experts))
    width = num_experts * rows_per_expert
    top_k = draw(st.integers(1, num_probes * rows_per_expert))
    return Decision(
        adapter_width=width,
        top_k=top_k,
        prefetch_depth=draw(st.integers(0, 100)),
        active_rows_cap=draw(st.integers(top_k, width)),
        num_experts=num_experts,
        num_probes=num_probes,
        routing=routing,
        switch=SwitchOptions(jitter=draw(st.sampled_from((0.0, 0.5)))) if routing == "switch" else None,
        stable=StableOptions(first_stage=draw(st.sampled_from((0.1, 1.0)))) if routing == "stable" else None,
        rows_in_backward=draw(st.sampled_from(get_args(RowsInBackward))),
        activation_checkpointing=draw(st.booleans()),
    )


@st.composite
def requests(draw: st.DrawFn) -> Request:
    return sample_request(
        model=SHAPE.model_copy(update={"name": draw(texts)}),
        model_path=draw(st.none() | texts),
        gpu=draw(texts),
        gpu_mem_bytes=draw(counts),
        host_mem_bytes=draw(counts),
        host_mem_basis=draw(st.sampled_from(["given", "this machine"])),
        batch_size=draw(counts),
        weights_dtype=draw(st.sampled_from(get_args(WeightsDtype))),
        adapter_dtype=draw(st.sampled_from(get_args(AdapterDtype))),
        double_quant=draw(st.booleans()),
        attention=draw(st.sampled_from(get_args(Attention))),
        activation_checkpointing=draw(st.none() | st.booleans()),
        objective=draw(st.sampled_from(get_args(Objective))),
        max_slowdown=draw(st.floats(1, 1e6)),
        min_trainable_fraction=draw(st.floats(0, 1)),
        top_k=draw(st.none() | counts),
        routing=draw(st.none() | st.sampled_from(get_args(Routing))),
    )


memory_entries = st.builds(
    MemoryEntry,
    place=st.sampled_from(["device", "host"]),
    phase=st.sampled_from(get_args(Phase)),
    category=texts,
    num_bytes=sizes,
    basis=bases,
    because=texts,
)
transfer_entries = st.builds(
    TransferEntry,
    direction=st.sampled_from(["h2d", "d2h"]),
    category=texts,
    per=st.sampled_from(["step", "optimizer_step"]),
    num_bytes=sizes,
    because=texts,
)
transfers = st.builds(
    Transfer,
    entries=st.lists(transfer_entries, max_size=2).map(tuple),
    h2d_bytes_per_step=sizes,
    d2h_bytes_per_step=sizes,
    h2d_bytes_per_optimizer_step=sizes,
    d2h_bytes_per_optimizer_step=sizes,
    whole_adapter_offload_ratio=rates,
)
timings = st.builds(
    Timing,
    step_seconds=seconds,
    baseline_step_seconds=seconds,
    slowdown=rates,
    busy_seconds=st.dictionaries(st.sampled_from(LANES), seconds),
    tokens_per_second=rates,
)
pareto_points = st.builds(
    ParetoPoint,
    decision=decisions(),
    trainable_parameters=counts,
    step_seconds=seconds,
    peak_reserved_bytes=sizes,
    host_bytes=sizes,
)
numbers = st.builds(
    NumberUsed, name=texts, value=st.floats(allow_nan=False, allow_infinity=False), basis=bases, source=texts
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of valid parts that need not make sense together."""
    entries = tuple(draw(st.lists(memory_entries, max_size=2)))
    device = PLAN.prediction.device_memory.model_copy(
        update={"entries": entries, "peak_allocated_bytes_at_cap": draw(st.none() | sizes)}
    )
    prediction = PLAN.prediction.model_copy(
        update={
            "device_memory": device,
            "host_memory": HostMemory(entries=entries, total_bytes=draw(sizes)),
            "transfer": draw(transfers),
            "timing": draw(timings),
        }
    )
    pareto = tuple(draw(st.lists(pareto_points, max_size=2)))
    search = SearchSummary(candidates=draw(sizes), feasible=draw(sizes), pareto=pareto)
    inputs = PLAN.inputs.model_copy(update={"numbers": tuple(draw(st.lists(numbers, max_size=2)))})
    parts = {"request": draw(requests()), "decision": draw(decisions()), "prediction": prediction}
    return PLAN.model_copy(update={"meft_version": draw(texts), "inputs": inputs, "search": search, **parts})


@given(plans())
def test_a_plan_goes_through_json_unchanged(plan: Plan) -> None:
    text = plan.to_json()
    back = Plan.from_json(text, source="plan.json")
    assert back == plan
    assert back.to_json() == text
    assert back.content_digest() == plan.content_digest() == json.loads(text)["digest"]


@given(
    losses=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4),
    comparison=st.builds(
        Comparison,
        quantity=texts,
        predicted=st.floats(-1e300, 1e300),
        observed=st.floats(-1e300, 1e300),
        ratio=st.none() | st.floats(-1e300, 1e300),
    ),
    recall=st.none() | st.floats(0, 1),
)
def test_a_report_goes_through_json_unchanged(
    losses: list[float], comparison: Comparison, recall: float | None
) -> None:
    training = REPORT.training.model_copy(update={"loss_per_step": tuple(losses)})
    observed = REPORT.observed.model_copy(update={"prefetch_recall": recall})
    report = REPORT.model_copy(update={"training": training, "observed": observed, "comparison": (comparison,)})
    back = Report.from_json(report.to_json(), source="report.json")
    assert back == report
    assert back.to_json() == report.to_json()


@pytest.mark.parametrize("record", FILES)
def test_a_file_goes_through_the_disk_unchanged(record: Plan | Report, tmp_path) -> None:
    path = tmp_path / "new" / "record.json"
    record.save(path)
    assert type(record).load(path) == record
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]  # no temporary file is left


def test_awkward_floats_survive() -> None:
    for value in (0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 123456789.123456789, 1e22):
        timing = PLAN.prediction.timing.model_copy(update={"step_seconds": value})
        plan = PLAN.model_copy(update={"prediction": PLAN.prediction.model_copy(update={"timing": timing})})
        assert Plan.from_json(plan.to_json(), source="x").prediction.timing.step_seconds == value


def test_the_digest_is_of_the_content_not_of_its_layout() -> None:
    content = json.loads(PLAN.to_json())
    reordered = json.dumps(dict(reversed(content.items())), indent=None)
    assert Plan.from_json(reordered, source="plan.json") == PLAN
    timing, busy = PLAN.prediction.timing, {"gpu": 1.0, "cpu": 2.0}
    one, two = (
        timing.model_copy(update={"busy_seconds": dict(items)}) for items in (busy.items(), reversed(busy.items()))
    )
    assert one.content_digest() == two.content_digest()
    slower = PLAN.prediction.timing.model_copy(update={"step_seconds": math.nextafter(1.0, 2.0)})
    other = PLAN.model_copy(update={"prediction": PLAN.prediction.model_copy(update={"timing": slower})})
    assert other.content_digest() != PLAN.content_digest()
    assert len(PLAN.content_digest()) == 64


def test_a_field_that_an_older_version_did_not_write_leaves_its_digest_alone() -> None:
    """Fields at their defaults left out at every level, as by a version that had none of them."""
    content = PLAN.model_dump(mode="json", exclude_defaults=True)
    assert "bf16_copy" not in content["decision"]
    older = json.dumps(content | {"schema_version": 1, "digest": PLAN.content_digest()})
    assert Plan.from_json(older, source="plan.json") == PLAN
    content["decision"]["bf16_copy"] = True
    edited = json.dumps(content | {"schema_version": 1, "digest": PLAN.content_digest()})
    with pytest.raises(UsageError, match="its digest does not match"):
        Plan.from_json(edited, source="plan.json")


def test_records_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PLAN.decision.top_k = 3  # type: ignore[misc]


# --- damage ----------------------------------------------------------------------------------------------------------


def leaves(content: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value that is no list and no object."""
    if isinstance(content, dict):
        return [leaf for key, value in content.items() for leaf in leaves(value, (*place, key))]
    if isinstance(content, list):
        return [leaf for index, value in enumerate(content) for leaf in leaves(value, (*place, index))]
    return [place]


def tampered(value: Any) -> Any:
    """Another value, of the same type as far as there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}x" if isinstance(value, str) else 1


@pytest.mark.parametrize("record", FILES)
def test_a_change_to_any_value_is_noticed(record: Plan | Report) -> None:
    places = leaves(json.loads(record.to_json()))
    assert len(places) > 60
    for place in places:
        content = json.loads(record.to_json())
        holder = content
        for step in place[:-1]:
            holder = holder[step]
        holder[place[-1]] = tampered(holder[place[-1]])
        with pytest.raises(UsageError, match=rf"^{record.kind} edited\.json: "):
            type(record).from_json(json.dumps(content), source="edited.json")


def test_an_edited_plan_is_told_to_be_made_again() -> None:
    decision = json.loads(PLAN.to_json())["decision"] | {"top_k": 1}
    message = r"^plan p\.json: its digest does not match its content, so it was edited or damaged; make it again"
    with pytest.raises(UsageError, match=message) as caught:
        Plan.from_json(changed(PLAN, decision=decision), source="p.json")
    assert caught.value.exit_code == EXIT_USAGE
    with pytest.raises(UsageError, match="its digest does not match"):
        Plan.from_json(changed(PLAN, digest=None), source="p.json")


@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_plan_is_no_json(share: float) -> None:
    text = PLAN.to_json().rstrip()
    with pytest.raises(
        UsageError, match=r"^plan p\.json: not valid JSON at line \d+, column \d+ \(.*\); is it truncated\?$"
    ):
        Plan.from_json(text[: int(share * len(text))], source="p.json")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (SCHEMA_VERSION + 1, rf"schema_version {SCHEMA_VERSION + 1} is newer than {SCHEMA_VERSION}.*upgrade meft"),
        (0, "schema_version 0 is below 1"),
        ("1", "schema_version is missing or no integer; is this a plan"),
        (True, "schema_version is missing or no integer"),
        (None, "schema_version is missing or no integer"),
    ],
)
def test_another_schema_version_is_refused_before_anything_else(version: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Plan.from_json(changed(PLAN, schema_version=version, a_field_of_the_future=1), source="p.json")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_none_are_refused_by_name(constant: str) -> None:
    text = PLAN.to_json().replace('"step_seconds": ', f'"step_seconds": {constant}, "was": ', 1)
    with pytest.raises(UsageError, match=rf"^plan p\.json: {constant} is not a finite number"):
        Plan.from_json(text, source="p.json")


def test_an_overflowing_number_is_refused_by_its_place() -> None:
    timing = json.dumps(json.loads(PLAN.to_json())["prediction"]["timing"])
    text = json.dumps(json.loads(PLAN.to_json()))
    overflowing = text.replace(timing, timing.replace('"slowdown": ', '"slowdown": 1e999, "x": ', 1))
    with pytest.raises(UsageError, match=r"prediction\.timing\.slowdown: Input should be a finite number \(got inf\)"):
        Plan.from_json(overflowing, source="p.json")


def test_a_record_made_in_memory_refuses_nan_too() -> None:
    timing = PLAN.prediction.timing.model_dump()
    with pytest.raises(ValidationError, match="finite"):
        Timing(**(timing | {"step_seconds": math.nan}))
    poisoned = PLAN.prediction.timing.model_copy(update={"step_seconds": math.nan})  # a copy is not validated
    with pytest.raises(ValueError, match="not JSON compliant"):
        PLAN.model_copy(update={"prediction": PLAN.prediction.model_copy(update={"timing": poisoned})}).to_json()


def test_unknown_missing_and_repeated_fields_are_named() -> None:
    with pytest.raises(UsageError, match=r"^plan p\.json: colour: unknown field$"):
        Plan.from_json(changed(PLAN, colour="red"), source="p.json")
    content = json.loads(PLAN.to_json())
    del content["decision"]["top_k"]
    content["decision"]["topk"] = 2
    with pytest.raises(UsageError, match=r"decision\.top_k: missing; decision\.topk: unknown field"):
        Plan.from_json(json.dumps(content), source="p.json")
    twice = PLAN.to_json().replace('"meft_version"', '"meft_version": "1",\n  "meft_version"', 1)
    with pytest.raises(UsageError, match="key 'meft_version' appears twice"):
        Plan.from_json(twice, source="p.json")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("batch_size",), 0, r"request\.batch_size: .*greater than or equal to 1 \(got 0\)"),
        (("batch_size",), 2.0, r"request\.batch_size: .*valid integer \(got 2\.0\)"),
        (("gpu_mem_bytes",), -1, r"request\.gpu_mem_bytes: .* \(got -1\)"),
        (("max_slowdown",), 0.5, r"request\.max_slowdown: .*greater than or equal to 1 \(got 0\.5\)"),
        (("min_trainable_fraction",), 1.5, r"request\.min_trainable_fraction: .*less than or equal to 1"),
        (("weights_dtype",), "bf8", r"request\.weights_dtype: .*'fp32', 'bf16', 'fp16', 'int8' or 'nf4' \(got 'bf8'\)"),
        (("model",), "x" * 99, r"request\.model: .*\(got 'x{56}\.\.\.\)"),
    ],
)
def test_a_value_out_of_range_is_told_with_its_place_and_what_was_given(place, value, message) -> None:
    request = json.loads(PLAN.to_json())["request"] | {place[0]: value}
    with pytest.raises(UsageError, match=message):
        Plan.from_json(changed(PLAN, request=request), source="p.json")


@pytest.mark.parametrize(("text", "kind"), [("[1]", "list"), ("3", "int"), ("null", "NoneType"), ('"plan"', "str")])
def test_json_that_is_no_object_is_refused(text: str, kind: str) -> None:
    with pytest.raises(UsageError, match=rf"^plan p\.json: expected a JSON object, found {kind}$"):
        Plan.from_json(text, source="p.json")


def test_a_report_is_not_a_plan() -> None:
    with pytest.raises(UsageError, match=r"is a report of a run, not a plan"):
        Plan.from_json(REPORT.to_json(), source="report.json")


def test_json_nested_beyond_reason_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^x: nested too deeply"):
        parse_json("[" * 100_000, source="x")


def test_files_that_cannot_be_read_are_named(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"^plan .*none\.json: no such file$"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(UsageError, match=r"is a folder, not a plan; "):
        Plan.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"is not UTF-8 text$"):
        Plan.load(tmp_path / "binary.json")


# --- decisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 17, "active_rows_cap": 16}, "top_k 17 is above adapter_width 16"),
        ({"gather_chunks": 4, "prefetch_depth": 1}, "gather_chunks 4 is for prefetch_depth 0"),
        ({"active_rows_cap": 1}, "active_rows_cap 1 is not between top_k 2 and adapter_width 16"),
        ({"active_rows_cap": 17}, "active_rows_cap 17 is not between top_k 2 and adapter_width 16"),
        ({"num_experts": 5}, "num_experts 5 does not divide adapter_width 16"),
        ({"num_probes": 5}, "num_probes 5 is above num_experts 4"),
        ({"routing": "exact"}, "exact routing scores every row: num_experts and num_probes must be 1"),
        ({"routing": "exact", "num_probes": 1}, "num_experts and num_probes must be 1"),
        ({"top_k": 9}, "the 2 probed experts hold fewer rows than top_k 9"),
    ],
)
def test_a_decision_that_contradicts_itself_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=f"^here: .*: {message}"):
        validated(Decision, DECISION.model_dump() | changes, source="here")


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 8},  # just what two experts of four rows hold
        {"active_rows_cap": 2},
        {"active_rows_cap": 16},
        {"num_experts": 16, "num_probes": 16},
        {"routing": "exact", "num_experts": 1, "num_probes": 1, "top_k": 12},
        {"prefetch_depth": 0},
    ],
)
def test_decisions_at_the_limits_are_taken(changes: dict[str, object]) -> None:
    content = DECISION.model_dump() | changes
    assert Decision.model_validate(content).model_dump() == content


@pytest.mark.parametrize("count", [2**63, 2**60 + 1])
def test_a_count_that_no_machine_has_is_refused_by_its_place(count) -> None:
    """Sums of a few of what is read are 64-bit integers."""
    content = json.loads(sample_report(PLAN).to_json())
    content["observed"]["device_memory"]["peak_allocated_bytes"] = count
    said = r"observed\.device_memory\.peak_allocated_bytes: Input should be less than or equal to 1152921504606846976"
    with pytest.raises(UsageError, match=said):
        Report.from_json(json.dumps(content), source="r.json")
