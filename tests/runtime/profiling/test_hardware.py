"""``meft-profile hardware``: the timing, the line through copies, warnings, and the file that planning reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from nvml_stub import Stub, build

from meft.planner.base.errors import UsageError
from meft.planner.cli.main import command as plan_command
from meft.planner.records.plan import Plan
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.planner.records.profile_file import ProfileFile
from meft.planner.records.profiles import sourced_numbers
from meft.runtime.cli.profile import command
from meft.runtime.device import card
from meft.runtime.device.card import (
    Card,
    PcieLink,
    card_warnings,
    host_warnings,
    numa_warnings,
    parse_cores,
    slot_warnings,
)
from meft.runtime.profiling import device_rates, host_rates, measure
from meft.runtime.profiling.measure import fit_copies, measurement, sample


@pytest.fixture
def quick(monkeypatch) -> None:
    """Sizes at which everything runs and nothing is worth reading."""
    monkeypatch.setattr(measure, "LEAST_REPETITIONS", 2)
    monkeypatch.setattr(sample, "__kwdefaults__", sample.__kwdefaults__ | {"seconds": 0.0})
    monkeypatch.setattr(host_rates, "TABLES", host_rates.RowTables(2, 64, 16, 20))
    monkeypatch.setattr(host_rates, "COPY_BYTES", (4096, 8192))
    monkeypatch.setattr(host_rates, "PRODUCTS", ((8, 16, 32),))
    monkeypatch.setattr(device_rates, "HOST_PRODUCTS", ((8, 16, 32), (16, 16, 32)))
    monkeypatch.setattr(device_rates, "HOST_LINK_SIZES", (1 << 16, 1 << 20, 1 << 23))


@pytest.fixture
def measured(quick, tmp_path) -> Path:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA: it reads the emulated device's profile")
    path = tmp_path / "hardware.json"
    done = CliRunner().invoke(command, ["hardware", "-o", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "host gather" in done.output
    assert f"plan with: meft-plan --gpu {path}" in done.output
    return path


# --- the file ------------------------------------------------------------------------------------------------------


def test_every_number_of_the_profiles_is_measured_and_says_how(measured) -> None:
    file = ProfileFile.load(measured)
    assert file.sections() == ("host", "gpu", "link")
    numbers = [number for profile in (file.host, file.gpu, file.link) for _, number in sourced_numbers(profile)]
    assert len(numbers) >= 18
    for number in numbers:
        assert number.basis == "measured" or number.source.startswith("none: the emulated device")
        assert number.basis == "counted" or (file.machine.date in number.source and "quartiles" in number.source)
    for each in file.measurements:
        assert each.low_quartile <= each.median <= each.high_quartile


def test_each_loader_takes_its_section(measured) -> None:
    file = ProfileFile.load(measured)
    assert load_gpu(str(measured)) == file.gpu
    assert load_host(str(measured)) == file.host
    assert load_link(str(measured)) == file.link
    with pytest.raises(UsageError, match="it holds host, gpu, link and no sparsity"):
        load_sparsity(str(measured))


def test_a_plan_takes_gpu_host_and_link_from_the_file(measured, tmp_path) -> None:
    path = tmp_path / "plan.json"
    words = ["--model", "smollm2-135m", "--gpu", str(measured), "--gpu-mem", "2GB", "--host-mem", "8GB"]
    words += ["--max-slowdown", "1000", "--adapter-width", "512", "--top-k", "16", "-o", str(path)]
    done = CliRunner().invoke(plan_command, words)
    assert done.exit_code == 0, done.output
    assert f"host and gpu and link: from {measured} too" not in done.output
    plan = Plan.load(path)
    assert (plan.request.gpu, plan.request.host, plan.request.link) == (str(measured),) * 3
    file = ProfileFile.load(measured)
    digests = {used.kind: used.digest for used in plan.inputs.profiles}
    assert digests["host"] == file.host.content_digest()
    assert digests["link"] == file.link.content_digest()


def test_an_edited_file_is_refused(measured) -> None:
    content = json.loads(measured.read_text())
    content["host"]["num_cores"] += 1
    measured.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="its digest does not match"):
        load_host(str(measured))


# --- timing --------------------------------------------------------------------------------------------------------


def test_a_sample_leaves_the_first_repetition_out_and_has_at_least_five() -> None:
    ticks = iter([0.0, 1, 11, *(float(t) for t in range(12, 100))])
    taken = sample(lambda: None, seconds=0.0, clock=lambda: next(ticks))
    assert len(taken.seconds) == 5
    assert taken.seconds == (1.0,) * 5  # the first took 10


def test_preparation_is_off_the_clock() -> None:
    now = [0.0]

    def wait() -> None:
        now[0] += 100.0

    def work() -> None:
        now[0] += 2.0

    assert sample(work, prepare=wait, seconds=0.0, clock=lambda: now[0]).seconds == (2.0,) * 5


def test_quartiles() -> None:
    found = measurement("x", "s", "", [4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found.low_quartile, found.median, found.high_quartile, found.repetitions) == (2.0, 3.0, 4.0, 5)
    assert found.spread_fraction == pytest.approx(2 / 3)


@given(
    latency=st.floats(0, 1e-4),
    rate=st.floats(1e8, 1e11),
    sizes=st.sets(st.integers(1 << 12, 1 << 26), min_size=2, max_size=8),
)
def test_a_line_is_found_again(latency, rate, sizes) -> None:
    sizes = sorted(sizes)
    line = fit_copies(sizes, [latency + size / rate for size in sizes])
    assert line.worst_error_fraction < 1e-6
    for size in sizes:
        assert line.latency_seconds + size / line.bytes_per_second == pytest.approx(latency + size / rate, rel=1e-5)


def test_a_line_has_no_negative_part() -> None:
    line = fit_copies([1000, 2000], [1.0, 3.0])  # through both points the latency would be -1 s
    assert line.latency_seconds == 0
    assert line.worst_error_fraction > 0.1


def test_one_size_gives_no_line() -> None:
    with pytest.raises(ValueError, match="two sizes or more"):
        fit_copies([5, 5], [1.0, 1.0])


def test_copies_on_a_machine_too_busy_to_tell_have_the_bandwidth_of_the_largest() -> None:
    line = fit_copies([1000, 4000], [8.0, 2.0])
    assert (line.latency_seconds, line.bytes_per_second) == (0.0, 2000.0)
    assert line.worst_error_fraction == pytest.approx(1 - 0.5 / 8)


# --- warnings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (PcieLink(4, 4, 16, 16), []),
        (PcieLink(4, 4, 4, 16), ["4 of the 16 PCIe lanes"]),
        (PcieLink(3, 4, 16, 16), ["runs as PCIe 3.0 and could run as 4.0"]),
        (PcieLink(1, 4, 8, 16), ["8 of the 16 PCIe lanes", "runs as PCIe 1.0"]),
    ],
)
def test_a_slow_slot(link, expected) -> None:
    found = list(slot_warnings(link))
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))


def test_throttling_and_other_programs_on_the_card() -> None:
    cool = Card("x", 24 << 30, 2 << 30, None, ())
    assert list(card_warnings(cool, used_by_us_bytes=(2 << 30) - 5)) == []
    hot = Card("x", 24 << 30, 5 << 30, None, ("its power limit", "its temperature (software)"))
    slowed, shared = card_warnings(hot, used_by_us_bytes=1 << 30)
    assert "slowed down by its power limit, its temperature (software)" in slowed
    assert "hold 4.00 GiB" in shared


def test_a_busy_host() -> None:
    assert list(host_warnings(0.1)) == []
    assert "kept 60% of the cores busy" in next(host_warnings(0.6))


@pytest.fixture
def two_sockets(tmp_path) -> dict[str, Path]:
    device, node = tmp_path / "pci" / "0000:65:00.0", tmp_path / "nodes" / "node1"
    for folder in (device, node):
        folder.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    (node / "cpulist").write_text("4-7,12\n")
    return {"pci_devices": tmp_path / "pci", "nodes": tmp_path / "nodes"}


@pytest.mark.parametrize(
    ("cores", "expected"),
    [({4, 5}, None), ({0, 1}, "runs on cores away from the GPU's NUMA node 1"), ({3, 4}, "may run on cores away")],
)
def test_the_wrong_numa_node(two_sockets, cores, expected) -> None:
    found = list(numa_warnings("00000000:65:00.0", allowed_cores=frozenset(cores), **two_sockets))
    assert (expected is None and not found) or (len(found) == 1 and expected in found[0])


def test_nothing_is_said_of_nodes_that_the_system_does_not_tell(tmp_path) -> None:
    assert list(numa_warnings("0000:01:00.0", pci_devices=tmp_path, nodes=tmp_path)) == []
    assert list(numa_warnings(None)) == []


def test_lists_of_cores() -> None:
    assert parse_cores("0-2,5,8-9\n") == {0, 1, 2, 5, 8, 9}
    assert parse_cores("\n") == frozenset()


# --- the card, through the real nvidia-ml-py -----------------------------------------------------------------------

ASK = """
from meft.runtime.device.card import read_card
found = read_card(nvml.DeviceIdentity("1111-2222", None))
pcie = found.pcie and [found.pcie.generation, found.pcie.max_generation, found.pcie.width, found.pcie.max_width]
answer([found.name, found.total_bytes, found.used_bytes, pcie, list(found.slowdowns)])
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    return build(tmp_path_factory.mktemp("driver"))


def test_the_card_through_nvml(library, tmp_path) -> None:
    lines = ("memory 24000 20000 4000", "pcie 3 4 8 16", f"reasons {0x4 | 0x1 | 0x40}")
    found = Stub(library, tmp_path / "card.txt").ask(ASK, *lines)
    limits = ["its power limit", "its temperature (hardware)"]  # bit 0 is idleness
    assert found == ["NVIDIA Stub 24GB", 24000, 4000, [3, 4, 8, 16], limits]


@pytest.mark.parametrize("lines", [("fail * 3",), ("fail Init 9",), ("fail GetMaxPcieLinkWidth 3", "memory 1 1 0")])
def test_what_nvml_does_not_tell_is_none(library, tmp_path, lines) -> None:
    name, _, _, pcie, slowdowns = Stub(library, tmp_path / "card.txt").ask(ASK, *lines)
    assert pcie is None
    assert slowdowns == []
    assert (name is None) == (len(lines) == 1)


def test_the_cards_bits_are_nvmls() -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    names = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
    known = {getattr(pynvml, f"nvmlClocksThrottleReason{name}") for name in names}
    assert set(card.SLOWDOWN_REASONS) == known


def test_a_host_s_profile_says_what_launching_takes(measured):
    """Of every task, with its spread; a plan for a real card reckons with it, one for the emulated device does not."""
    host = ProfileFile.load(measured).host
    tasks = ("attention", "router", "ffn", "adapter", "adapter_backward", "backward")
    names = [f"launch_{task}_seconds" for task in tasks]
    numbers = dict(sourced_numbers(host))
    assert all(numbers[name].basis == "measured" and numbers[name].value > 0 for name in names)
    assert all("median of 12" in numbers[name].source for name in names)
    options = [
        "--model",
        "llama-7b",
        "--host",
        str(measured),
        "--gpu",
        "h100-80gb",
        "--gpu-mem",
        "80GB",
        "--max-slowdown",
        1000,
    ]
    path = measured.with_name("plan.json")
    done = CliRunner().invoke(plan_command, [*options, "--host-mem", "256GB", "-o", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    used = {number.name: number.value for number in Plan.load(path).inputs.numbers}
    assert used[f"host.{names[0]}"] == numbers[names[0]].value
