"""Scripts of the usual kinds, traced as they are: beside the same run on the CPU in the books of an emulated card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from counted_scripts import counted_script, make_folder
from transformers import LlamaConfig, MixtralConfig

import meft
from meft.planner.allocator.recording_files import load_recording
from meft.planner.allocator.replay import replay
from meft.planner.base.errors import UsageError
from meft.planner.front.script import ScriptMemory, Trace, trace_script
from meft.planner.models.shapes import shape_of
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.run import simulate
from meft.planner.simulation.stream import stream_peaks
from meft.planner.terms.lengths import BatchShape

SCRIPTS = Path(__file__).parent / "scripts"
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    mixture = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return {
        "dense": make_folder(folder / "dense", LlamaConfig(**SIZES)),
        "mixture": make_folder(folder / "mixture", mixture),
    }


def traced(script: Path, *arguments: str) -> Trace:
    seen = meft.trace(gpu="rtx-3090")
    trace_script(["python", str(script), *arguments], seen)
    return seen


@pytest.mark.parametrize(
    ("script", "model", "argument"),
    [
        ("plain_loop", "dense", ""),
        ("hf_trainer", "dense", "OUT"),
        ("sft_qlora", "dense", "OUT"),
        ("accelerated", "dense", "bf16"),
        ("checkpointed_lora", "dense", ""),
        ("mixture", "mixture", ""),
    ],
)
def test_a_script_takes_what_the_same_run_takes(
    script: str, model: str, argument: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Within 1 % of the same run without a fake tensor; both have two cuBLAS workspaces of 8,519,680 bytes, which are
    left out of what is compared."""
    path, arguments = SCRIPTS / f"{script}.py", [str(folders[model]), argument.replace("OUT", str(tmp_path / "out"))]
    memory = traced(path, *arguments).memory
    counted = counted_script(path, *arguments)
    workspaces = 2 * 8_519_680
    found = memory.peak_allocated_bytes - workspaces
    assert found == pytest.approx(counted.allocated_bytes - workspaces, rel=0.01)
    assert memory.peak_reserved_bytes == pytest.approx(counted.reserved_bytes, rel=0.01)
    assert memory.steps == 2


def test_fp16_has_its_scaler(folders: dict[str, Path]) -> None:
    """A step that the scaler skipped would leave no states: two of fp32 for each of the model's parameters.

    Parameters: embedding and head 512 x 128 each; per layer query and output 128 x 128, key and value 64 x 128, the
    FFN 3 x 256 x 128, two norms of 128; a last norm of 128.
    """
    parameters = 2 * 512 * 128 + 3 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128 + 2 * 128) + 128
    memory = traced(SCRIPTS / "accelerated.py", str(folders["dense"]), "fp16").memory
    assert of_phase(memory, "optimizer_step")["optimizer states"] == 2 * 4 * parameters
    assert of_phase(memory, "optimizer_step")["trained weights"] == 4 * parameters


def of_phase(memory: ScriptMemory, name: str) -> dict[str, int]:
    return next(dict(phase.by_module) for phase in memory.phases if phase.phase == name)


def test_lengths_and_masks_are_followed(folders: dict[str, Path], tmp_path: Path) -> None:
    """Code that looks at numbers which come from the host goes on as on a card: a batch cut to its longest row."""
    script = tmp_path / "cut.py"
    script.write_text(
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).cuda()\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)\n"
        "for _ in range(2):\n"
        "    ids = torch.tensor([[1, 2, 3, 0, 0, 0], [1, 0, 0, 0, 0, 0]], device='cuda')\n"
        "    longest = int((ids != 0).sum(dim=1).max())\n"
        "    assert longest == 3 and ids[ids != 0].tolist() == [1, 2, 3, 1]\n"
        "    logits = model(input_ids=ids[:, :longest]).logits\n"
        "    assert logits.shape == (2, 3, 512) and logits.is_cuda and logits.device.type == 'cuda'\n"
        "    if logits.sum().item() > 0: raise SystemExit('no number is above 0')\n"
        "    logits.sum().backward()\n"
        "    optimizer.step()\n"
    )
    memory = traced(script, str(folders["dense"])).memory
    assert memory.not_followed == ("numbers computed on the device are read, and taken as 0: cut.py:11",)


def test_lengths_that_vary_are_simulated_as_they_are_traced(folders: dict[str, Path], tmp_path: Path) -> None:
    """The closed form of batches of ever other lengths, beside transformers' own code on them."""
    lengths = (40, 250, 97, 301, 64, 300, 180, 299)
    script = tmp_path / "varying.py"
    script.write_text(
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).cuda().train()\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        f"for length in {lengths}:\n"
        "    batch = {name: torch.zeros(4, length, dtype=torch.int64).cuda() for name in ('input_ids', 'labels')}\n"
        "    outputs = model(**batch)\n"
        "    outputs.loss.backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
    )
    seen = meft.trace(gpu="rtx-3090", steps=len(lengths))
    trace_script([str(script), str(folders["dense"])], seen)
    shape = shape_of(LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).to_dict(), name="dense")
    setup = TrainingSetup(model=shape, method="full", weights_dtype="bf16", batch_size=4, seq_len=max(lengths))
    simulated = stream_peaks(simulate(setup, shapes=[BatchShape(4, length) for length in lengths]))
    assert simulated.allocated_bytes == pytest.approx(seen.memory.peak_allocated_bytes, rel=0.01)
    one_segment = 2 << 20  # of small tensors, which are placed in another order
    assert simulated.reserved_bytes == pytest.approx(seen.memory.peak_reserved_bytes, abs=one_segment)


def test_the_books_answer_what_a_script_asks_of_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    with meft.trace(gpu="rtx-3090") as seen:
        import torch

        held = torch.empty(3 << 20, dtype=torch.uint8, device="cuda")
        print(torch.cuda.get_device_capability(), torch.cuda.memory_allocated(), torch.cuda.max_memory_reserved())
        del held
        print(torch.cuda.memory_allocated())
    assert capsys.readouterr().out == f"(8, 6) {3 << 20} {20 << 20}\n0\n"
    assert seen.memory.steps == 0
    assert not torch.cuda.is_available()
    assert torch.empty(1).device.type == "cpu"


def test_a_snapshot_replays_as_it_was_and_a_chrome_trace_counts_the_same(tmp_path: Path) -> None:
    with meft.trace(gpu="rtx-3090") as seen:
        import torch

        kept = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in (100, 2 << 20, 30 << 20)]
        del kept[1]
        kept.append(torch.empty(1 << 20, dtype=torch.uint8, device="cuda"))
    seen.save(tmp_path / "seen.pickle")
    result = replay(load_recording(tmp_path / "seen.pickle", None))
    assert result.exact_events == result.events == 8  # 4 allocations, 1 free, 3 segments
    assert result.peak_reserved_bytes == seen.memory.peak_reserved_bytes == (2 + 20 + 30) << 20
    seen.save(tmp_path / "seen.json")
    counters = [each for each in json.loads((tmp_path / "seen.json").read_text())["traceEvents"] if each["ph"] == "C"]
    assert max(sum(each["args"].values()) for each in counters) == seen.memory.peak_reserved_bytes
    with pytest.raises(UsageError, match=r"seen\.txt: name it \.pickle"):
        seen.save(tmp_path / "seen.txt")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "which script"),
        (("python", "absent.py"), "absent.py: no such script"),
        (("python", "-m"), "which script"),
    ],
)
def test_a_command_that_is_none_is_refused(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        trace_script(words, meft.trace(gpu="rtx-3090"))


def test_a_script_that_fails_says_where(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import torch\n\ntorch.ones(2, 3, device='cuda') @ torch.ones(2, 3, device='cuda')\n")
    with pytest.raises(UsageError, match=r"fails\.py:3: RuntimeError: "):
        traced(script)
    script.write_text("print(1)")
    seen = traced(script)
    with pytest.raises(UsageError, match="put nothing on cuda"):
        _ = seen.memory


def test_cards_that_no_script_finds_are_refused() -> None:
    with pytest.raises(UsageError, match="which GPU memory"):
        meft.trace()
    with pytest.raises(UsageError, match="a script is traced for a CUDA card"):
        meft.trace(gpu="emulated", gpu_mem="2GB")
    with pytest.raises(UsageError, match="--steps 0: give 1 to 100"):
        meft.trace(gpu="rtx-3090", steps=0)
