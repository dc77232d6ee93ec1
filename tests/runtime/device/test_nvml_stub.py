"""The NVML reader through the real nvidia-ml-py, over a stub of the driver's library; no GPU or driver is needed."""

from __future__ import annotations

import pytest
from nvml_stub import PID, Stub, build

from meft.runtime.device.nvml import BYTE_COUNTERS, DEVICE_GROWTH, OWN_PROCESS, SAMPLED_THROUGHPUT

MEMORY = "print_memory = lambda card: answer([card.process_memory().num_bytes, card.process_memory().source])\n"
PCIE = "print_pcie = lambda card: answer([*vars_of(card.pcie_bytes())])\n"
VARS = "vars_of = lambda reading: (reading.rx_bytes, reading.tx_bytes, reading.source)\n"
NOT_AVAILABLE = 2**64 - 1  # what the driver writes where it hides a figure
NOT_SUPPORTED, GPU_IS_LOST, DRIVER_NOT_LOADED = 3, 15, 9


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """The stub as a present driver and as one before R510."""
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    new, old = (tmp_path_factory.mktemp(name) for name in ("driver", "old-driver"))
    return build(new), build(old, "-DDRIVER_V2")


@pytest.fixture
def stub(libraries, tmp_path) -> Stub:
    return Stub(libraries[0], tmp_path / "card.txt")


@pytest.fixture
def old_stub(libraries, tmp_path) -> Stub:
    return Stub(libraries[1], tmp_path / "card.txt")


# --- the library and the card --------------------------------------------------------------------------------------


def test_the_real_package_loads_the_stub(stub) -> None:
    code = "import pynvml\npynvml.nvmlInit()\ncard = pynvml.nvmlDeviceGetHandleByIndex(0)\n"
    name, total = stub.ask(
        code + "answer([pynvml.nvmlDeviceGetName(card), pynvml.nvmlDeviceGetMemoryInfo(card).total])", "memory 7 5 2"
    )
    assert (name, total) == ("NVIDIA Stub 24GB", 7)


@pytest.mark.parametrize(
    ("uuid", "bus"), [("1111-2222", None), ("9", "00000000:65:00.0"), (None, "00000000:65:00.0"), (None, None)]
)
def test_the_card_is_found(stub, uuid, bus) -> None:
    code = f"answer(type(reader(identity=nvml.DeviceIdentity({uuid!r}, {bus!r}))).__name__)"
    assert stub.ask(code) == "NvmlReader"


def test_another_card_is_not_cudas(stub) -> None:
    reason = stub.ask("answer(reader(identity=nvml.DeviceIdentity('9', None)).reason)", "cards 2")
    assert reason.startswith("NVML not read: none of NVML's 2 cards is CUDA's")


def test_a_driver_that_is_not_loaded(stub) -> None:
    assert stub.ask("answer(reader().reason)", f"fail Init {DRIVER_NOT_LOADED}") == "NVML not read: Driver Not Loaded"


def test_no_library_at_all(stub, tmp_path) -> None:
    without = Stub(tmp_path / "empty" / "libnvidia-ml.so.1", stub.control)
    assert without.ask("answer(reader().reason)") == "NVML not read: NVML Shared Library Not Found"


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["stub", "old_stub"])
def test_memory_of_the_own_process_in_both_versions_of_the_list(version, request) -> None:
    lines = ("memory 100 40 60", "process 17 5", f"process {PID} 700", f"process {PID} 30")
    answered = request.getfixturevalue(version).ask(MEMORY + "print_memory(reader())", *lines)
    assert answered == [730, OWN_PROCESS]


@pytest.mark.parametrize(
    ("lines", "because"),
    [
        (("process 17 5",), f"PID {PID} is not in NVML's list"),
        ((), f"PID {PID} is not in NVML's list"),
        ((f"process {PID} {NOT_AVAILABLE}",), "the driver gives no figure per process"),
        ((f"fail GetComputeRunningProcesses {NOT_SUPPORTED}",), "Not Supported"),
    ],
    ids=["a container lists the host's PIDs", "an empty list", "Windows hides the figure", "not supported"],
)
def test_else_the_growth_of_the_card(stub, lines, because) -> None:
    code = f"card = reader()\nstub('memory 9000 3000 6000', *{lines!r})\nprint_memory(card)"
    answered = stub.ask(MEMORY + code, "memory 9000 8000 1000")
    assert answered == [5000, f"{DEVICE_GROWTH} ({because})"]


def test_a_pid_of_another_namespace_is_not_taken_for_this_process(stub) -> None:
    """In a container the own PID may by chance be another process's on the host."""
    code = f"card = reader()\nstub('memory 9000 3000 6000', 'process {PID} 40')\n"
    code += "reading = card.process_memory(at_least_bytes=4000)\nanswer([reading.num_bytes, reading.source])"
    num_bytes, source = stub.ask(code, "memory 9000 8000 1000")
    assert num_bytes == 5000
    assert f"NVML's PID {PID} holds less than this process has reserved" in source


def test_memory_that_nothing_tells(stub) -> None:
    lines = [f"fail {name} {NOT_SUPPORTED}" for name in ("GetMemoryInfo", "GetComputeRunningProcesses")]
    num_bytes, source = stub.ask(MEMORY + "print_memory(reader())", *lines)
    assert num_bytes is None
    assert source == "NVML gave no memory use: Not Supported; at the start: Not Supported"


# --- PCIe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value_type", "before"), [(1, 2**32 - 100), (3, 2**40)])
def test_pcie_bytes_by_field_value(stub, value_type, before) -> None:
    after = (before + 300) % 2**32 if value_type == 1 else before + 300
    kind = f"counter_type {value_type}"
    code = f"card = reader()\ncard.start_pcie()\nstub('counters 7 {after}', {kind!r})\nprint_pcie(card)"
    assert stub.ask(VARS + PCIE + code, f"counters 5 {before}", kind) == [300, 2, BYTE_COUNTERS]


@pytest.mark.parametrize("refusing", ["FieldValue", "GetFieldValues"])
def test_pcie_bytes_by_sampling_where_there_are_no_counters(stub, refusing) -> None:
    fail = f"fail {refusing} {NOT_SUPPORTED}"
    code = "seconds = [0.0]\ncard = reader(clock=lambda: seconds[0])\ncard.start_pcie()\n"
    code += f"seconds[0] = 2.0\nstub('throughput 3 1000', {fail!r})\nprint_pcie(card)"
    rx, tx, source = stub.ask(VARS + PCIE + code, "throughput 9 9", fail)
    assert (rx, tx) == (2_000_000, 6_000)
    assert source == f"{SAMPLED_THROUGHPUT} (no byte counters: Not Supported)"


def test_a_card_without_either(stub) -> None:
    lines = [f"fail {name} {NOT_SUPPORTED}" for name in ("FieldValue", "GetPcieThroughput")]
    rx, tx, source = stub.ask(VARS + PCIE + "card = reader()\ncard.start_pcie()\nprint_pcie(card)", *lines)
    assert (rx, tx) == (None, None)
    assert source == "NVML gave no PCIe figures: no byte counters: Not Supported; no throughput: Not Supported"


# --- a card that vanishes ------------------------------------------------------------------------------------------


def test_a_card_that_vanishes_while_it_is_measured(stub) -> None:
    code = "card = reader()\ncard.start_pcie()\nstub('counters 50 60')\nbefore = vars_of(card.pcie_bytes())\n"
    code += f"stub('fail * {GPU_IS_LOST}')\npcie, memory = vars_of(card.pcie_bytes()), card.process_memory()\n"
    code += "stub('counters 90 90')\nagain = vars_of(card.pcie_bytes())\ncard.close()\n"
    code += "answer([before, pcie, [memory.num_bytes, memory.source], again])"
    before, pcie, memory, again = stub.ask(VARS + code, "memory 10 5 5", "counters 0 0")
    assert before[:2] == [60, 50]
    assert pcie == [None, None, "NVML stopped giving PCIe figures: GPU is lost"]
    assert memory == [None, "NVML gave no memory use: GPU is lost"]
    assert again == pcie  # a total with a hole in it stays no figure


def test_the_background_thread_ends_when_the_card_vanishes(stub) -> None:
    code = "import threading\nnvml.SAMPLE_SECONDS = 0.001\ncard = reader()\ncard.start_pcie()\n"
    code += f"stub('fail * {GPU_IS_LOST}')\n"
    code += "threads = [each for each in threading.enumerate() if each.name == 'meft-nvml']\n"
    code += "for each in threads: each.join(timeout=30)\nalive = [each.is_alive() for each in threads]\n"
    code += "card.close()\nanswer(alive + [card.pcie_bytes().source])"
    alive, source = stub.ask(code, "counters 0 0")
    assert not alive
    assert source == "the NVML reader is closed"


def test_an_error_code_that_the_package_does_not_know(stub) -> None:
    assert stub.ask("answer(reader().reason)", "fail Init 777") == ("NVML not read: an error that pynvml does not know")
