"""Tables: their sums are the ledger's, and piped they are plain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from plan_samples import DECISION, MIB, SHAPE, sample_plan, sample_profiles, sample_report, sample_request

from meft.planner.base.errors import UsageError
from meft.planner.base.units import format_bytes
from meft.planner.check.audit import audit
from meft.planner.predict.prediction import predict
from meft.planner.records.plan import MemoryEntry, ParetoPoint, Plan, host_budget_of
from meft.planner.render.audit import audit_view
from meft.planner.render.details import GROUPS, OTHER, grouped_bytes, limits_used
from meft.planner.render.plan import next_command, plan_view
from meft.planner.render.plot import check_format, labelled_points, plot_plan
from meft.planner.render.tables import count, grid, percent, show
from meft.planner.search.levers import Lever
from meft.planner.terms.ledger import STEP_PHASES


@pytest.fixture(scope="module")
def plan() -> Plan:
    return sample_plan()


def shown(capsys: pytest.CaptureFixture[str], view: object) -> str:
    show(view)  # type: ignore[arg-type]
    return capsys.readouterr().out


def entry(phase: str, category: str, num_bytes: int) -> MemoryEntry:
    fields = {"place": "device", "phase": phase, "category": category, "num_bytes": num_bytes}
    return MemoryEntry.model_validate(fields | {"basis": "counted", "because": "a test"})


# --- groups of the ledger -------------------------------------------------------------------------------------------


def test_resident_counts_in_every_phase_and_the_rest_in_its_own() -> None:
    entries = [entry("resident", "linear_weights", 100), entry("loss", "loss_chain", 7), entry("loss", "new_term", 5)]
    groups = grouped_bytes(entries)
    assert groups["frozen model"] == dict.fromkeys(STEP_PHASES, 100)
    assert groups["logits and loss"] == {"forward": 0, "loss": 7, "backward": 0, "optimizer_step": 0}
    assert groups[OTHER]["loss"] == 5
    assert "router" not in groups  # nothing in it


def test_the_groups_add_up_to_the_peak(plan: Plan) -> None:
    memory = plan.prediction.device_memory
    groups = grouped_bytes(memory.entries)
    totals = [sum(by_phase[phase] for by_phase in groups.values()) for phase in STEP_PHASES]
    assert max(totals) == memory.peak_allocated_bytes
    assert STEP_PHASES[totals.index(max(totals))] == memory.peak_phase


def test_every_category_of_the_ledger_has_a_group(plan: Plan) -> None:
    assert OTHER not in grouped_bytes(plan.prediction.device_memory.entries)
    categories = [category for group in GROUPS.values() for category in group]
    assert len(categories) == len(set(categories))


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"), [(1_610_612_736, "1.61 B"), (2_500_000, "2.50 M"), (4_096, "4.10 k"), (17, "17")]
)
def test_counts(number: int, text: str) -> None:
    assert count(number) == text


def test_percent() -> None:
    assert percent(0.2394) == "23.9 %"


def test_limits_used_puts_the_tightest_first(plan: Plan) -> None:
    prediction, request = plan.prediction, plan.request
    used = dict(limits_used(plan))
    assert used["host memory"] == prediction.host_memory.total_bytes / host_budget_of(plan)
    assert used["slowdown"] == prediction.timing.slowdown / request.max_slowdown
    at_cap = prediction.device_memory.peak_reserved_bytes_at_cap
    assert at_cap is not None
    assert used["device memory"] == at_cap / prediction.device_memory.allocator_budget_bytes
    assert list(used.values()) == sorted(used.values(), reverse=True)


# --- what is printed ------------------------------------------------------------------------------------------------


def test_piped_output_is_plain_and_narrow(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, plan_view(plan, path="plan.json", notes=["a note"], verbose=False))
    assert "\x1b" not in text
    assert all(line == line.rstrip() and len(line) <= 100 for line in text.splitlines())
    assert len(text.splitlines()) <= 24
    assert "a note" in text


LEVER = Lever(
    change="4-bit weights",
    option="--weights-dtype nf4",
    device_bytes=-9 * MIB,
    host_bytes=0,
    tokens_per_second_ratio=0.9,
    trainable_fraction=0.21,
    fits=True,
)


def test_the_verdict_comes_first_and_the_decision_next(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    view = plan_view(plan, path="plan.json", notes=[], verbose=False, levers=[LEVER])
    text = shown(capsys, view)
    prediction = plan.prediction
    memory, timing = prediction.device_memory, prediction.timing
    assert memory.peak_reserved_bytes_at_cap is not None
    spare = memory.allocator_budget_bytes - memory.peak_reserved_bytes_at_cap
    lines = text.splitlines()
    assert lines[0] == f"tiny fits in 4.0 MiB of GPU memory, with {format_bytes(spare)} to spare."
    # 3 layers * 8 numbers * (2 * 16 rows + 4 experts) = 864 weights
    assert lines[1].startswith("Trains 864 weights beside its ")
    assert lines[2].startswith(f"Speed: {timing.tokens_per_second:,.0f} tokens/s; a step of 1 x 4 takes ")
    assert lines[3].startswith("Decision: the widest adapter")
    assert re.search(r"\n  4-bit weights +-9.0 MiB +same +-10.0 % +21.0 % +--weights-dtype nf4\n", text)
    # rows 3 * 16 * 16 numbers * 4 bytes and 3 routers of 4 * 8 numbers: 3,456, and how often each row was active:
    # 3 * 16 * 4 + 8; a checkpoint holds twice the 3,456 again for the moments, 48 counts, 3 router counts and the
    # random state: 3 * 3,456 + 200 + 192 + 12 + 5,056
    assert re.search(r"disk +15.5 KiB +a checkpoint, .*the adapter alone 3.6 KiB", text)


def test_a_data_set_is_told_in_hours(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    timing = plan.prediction.timing.model_copy(update={"tokens_per_second": 1000.0})
    made = plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"timing": timing})})

    def text_of(tokens: int | None) -> str:
        return shown(capsys, plan_view(made, path="p", notes=[], verbose=False, tokens=tokens))

    assert "1,000 tokens/s, 36 M tokens in 10.0 h;" in text_of(36_000_000)
    assert "1,000 tokens/s, 1.5 B tokens in 17.4 days;" in text_of(1_500_000_000)
    assert "1,000 tokens/s, 1,234,567 tokens in 20.6 min;" in text_of(1_234_567)
    assert "tokens in" not in text_of(None)


@pytest.mark.parametrize("word", ["retained", "refetched", "probed", "hot rows", "key-experts", "staging", "Pareto"])
def test_words_of_our_own_wait_for_verbose(plan: Plan, capsys: pytest.CaptureFixture[str], word: str) -> None:
    """``key-experts`` is what the routing is called, and is explained beside it."""
    text = shown(capsys, plan_view(plan, path="p", notes=[], verbose=False, levers=[LEVER]))
    explained = "key-experts  4 groups of rows, a token looks through its best 2"
    assert word not in text.replace(explained, "")


NUMBER = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")


def numbers_in(text: str) -> list[str]:
    return NUMBER.findall(text)


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
def test_no_number_of_a_plan_is_cut(
    plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int, verbose: bool
) -> None:
    view = plan_view(plan, path="plan.json", notes=["a note of 12,345"], verbose=verbose, levers=[LEVER] * 3)
    monkeypatch.setenv("COLUMNS", "500")
    wide = shown(capsys, view)
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, view)
    lines = text.splitlines()
    assert all(len(line) <= columns for line in lines)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    whole, narrow = numbers_in(wide), numbers_in(text)
    assert set(narrow) <= set(whole), set(narrow) - set(whole)  # nothing but whole numbers
    if columns >= 80 and "too narrow for" not in text:
        assert sorted(whole) == sorted(narrow)
    for unit in ("KiB", "MiB", "GiB", "%", "us", "ms"):
        assert not any(line.lstrip().startswith(f"{unit} ") and "*" not in line for line in lines), unit


def test_columns_are_obeyed(plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = shown(capsys, plan_view(plan, path="plan.json", notes=[], verbose=True))
    assert max(map(len, text.splitlines())) <= 60


def test_a_plan_shows_its_decision_and_what_to_type_next(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, plan_view(plan, path="out/my plan.json", notes=[], verbose=False))
    assert re.search(r"adapter width +16 ", text)
    assert re.search(
        r"routing +key-experts  4 groups of rows, a token looks through its best 2 \(50.0 % of rows\)", text
    )
    assert "meft-run 'out/my plan.json' --model DIR --data FILE.jsonl --device emulated" in text
    full = shown(capsys, plan_view(plan, path="plan.json", notes=[], verbose=True))
    assert re.search(r"routing +key-experts  4 experts of 4 rows, 2 probed: 50.0 % of rows scored", full)
    step = plan.prediction.transfer
    assert f"the whole adapter both ways would be {step.whole_adapter_offload_ratio:.2f} times as much" in text


def test_a_bf16_copy_is_shown_to_those_who_may_have_one(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    def text_of(asked: bool | None, *, copied: bool, adapter_dtype: str = "bf16") -> str:
        request = plan.request.model_copy(update={"adapter_dtype": adapter_dtype, "bf16_copy": asked})
        decision = plan.decision.model_copy(update={"bf16_copy": copied})
        made = plan.model_copy(
            update={
                "request": request,
                "decision": decision,
                "prediction": predict(request, decision, sample_profiles()),
            }
        )
        return shown(capsys, plan_view(made, path="plan.json", notes=[], verbose=True))

    assert "bf16 copy" not in text_of(None, copied=False, adapter_dtype="fp32")
    assert re.search(r"bf16 copy +off  rows are gathered from fp32, rounded on the way\n", text_of(None, copied=False))
    # 3 layers * 16 rows * 16 numbers * 2 bytes
    assert re.search(
        r"bf16 copy +on  .*half the time; 1.5 KiB of host memory\s+\(as asked\)", text_of(True, copied=True)
    )


def test_sums_that_leave_once_per_window_count_in_the_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    request = sample_request(model=SHAPE.model_copy(update={"hidden_size": 8192}), grad_accum=4)
    decision = DECISION.model_copy(update={"cached_rows": 16, "gradients_on_device": True})
    prediction = predict(request, decision, sample_profiles())
    made = sample_plan().model_copy(update={"request": request, "decision": decision, "prediction": prediction})
    text = shown(capsys, plan_view(made, path="plan.json", notes=[], verbose=True))
    once = prediction.transfer.d2h_bytes_per_optimizer_step
    assert once >= MIB
    in_all = round(prediction.transfer.window_bytes(4) / 4)
    assert f"and once in 4 steps {format_bytes(once)} of sums: {format_bytes(in_all)} per step in all" in text


def test_the_next_command_names_the_models_folder(plan: Plan) -> None:
    request = plan.request.model_copy(update={"model_path": "models/tiny", "gpu": "rtx-3090"})
    command = next_command(plan.model_copy(update={"request": request}), "p.json")
    assert command == ["meft-run", "p.json", "--model", "models/tiny", "--data", "FILE.jsonl"]


def test_what_was_asked_for_is_said(
    plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    request = plan.request.model_copy(update={"top_k": 2, "adapter_width": 16})
    text = shown(capsys, plan_view(plan.model_copy(update={"request": request}), path="p", notes=[], verbose=False))
    assert re.search(r"adapter width.*\(as asked\)", text)
    assert re.search(r"top K.*\(as asked\)", text)
    assert not re.search(r"routing.*\(as asked\)", text)


def test_verbose_gives_every_number_with_its_source(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    number = plan.inputs.numbers[0]
    brief = shown(capsys, plan_view(plan, path="p", notes=[], verbose=False))
    full = shown(capsys, plan_view(plan, path="p", notes=[], verbose=True))
    assert number.name not in brief
    assert number.name in full
    assert " ".join(number.source.split()[:2]) in full
    assert "row_staging" in full


def test_trade_offs_show_the_plan_first_and_both_ends(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    widths = (1_000, 2_000, 3_000, 4_000, 5_000, 6_000)
    points = tuple(
        ParetoPoint(
            decision=plan.decision.model_copy(update={"adapter_width": width}),
            trainable_parameters=width,
            step_seconds=1.0,
            peak_reserved_bytes=1,
            host_bytes=1,
        )
        for width in widths
    )
    search = plan.search.model_copy(update={"pareto": points})
    text = shown(capsys, plan_view(plan.model_copy(update={"search": search}), path="p", notes=[], verbose=True))
    lines = text[text.index("Trade-offs") : text.index("What this rests on")].splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["16*", "6,000", "4,000", "3,000", "1,000"]


def test_markup_in_names_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert "[bold]x[/bold]" in shown(capsys, grid(("",), [("[bold]x[/bold]",)]))


def test_an_audit_names_what_missed(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    report = sample_report(plan)
    gpu = sample_profiles().gpu
    passed = shown(capsys, audit_view(audit(plan, report, gpu=gpu), verbose=False))
    assert "PASSED: all 7 judged quantities hold" in passed
    assert "Transfer by category" not in passed
    counted = report.observed.transfer.h2d_bytes_total + 8
    failed = shown(
        capsys, audit_view(audit(plan, sample_report(plan, h2d_bytes_total=counted), gpu=gpu), verbose=False)
    )
    assert re.search(r"h2d_bytes_given_rows .* exact: MISSED", failed)
    assert "DO NOT equal" in failed
    assert "FAILED: h2d_bytes_given_rows missed, 6 of 7 hold" in failed
    assert "Transfer by category" in failed  # shown unasked when something differs


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_an_audit_keeps_quantity_figures_and_verdict_at_any_width(
    plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    verdict = audit(plan, sample_report(plan), gpu=sample_profiles().gpu)
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, audit_view(verdict, verbose=True))
    assert max(map(len, text.splitlines())) <= columns
    words = {word.rstrip(",:") for word in text.split()}
    for row in verdict.rows:
        assert row.quantity in words
        if row.rule == "exact":
            assert {f"{row.predicted:,.0f}", f"{row.observed:,.0f}"} <= words
        assert row.ratio is None or f"{row.ratio:.3f}" in words
    assert ("too narrow for: basis" in text) == (columns == 80)


# --- the picture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "start"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml"), ("p.pdf", b"%PDF")])
def test_a_picture_in_each_format(plan: Plan, tmp_path: Path, name: str, start: bytes) -> None:
    path = tmp_path / "new folder" / name
    plot_plan(plan, [], path)
    assert path.read_bytes().startswith(start)


def test_other_formats_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--plot p.txt: the name must end in one of .png, .svg, .pdf"):
        check_format(Path("p.txt"))


def test_trade_offs_are_labelled_once_for_each_choice_and_apart() -> None:
    """Of points with the same width and K the fastest; of points in one place one."""

    def at(width: int, top_k: int, step_seconds: float, parameters: int) -> ParetoPoint:
        return ParetoPoint(
            decision=DECISION.model_copy(update={"adapter_width": width, "top_k": top_k}),
            step_seconds=step_seconds,
            trainable_parameters=parameters,
            peak_reserved_bytes=1,
            host_bytes=1,
        )

    slow, quick, beside, far = at(64, 8, 2.0, 100), at(64, 8, 1.9, 100), at(64, 4, 1.95, 99), at(16, 8, 1.0, 25)
    assert labelled_points([slow, quick, beside, far]) == [quick, far]
    assert labelled_points([]) == []
