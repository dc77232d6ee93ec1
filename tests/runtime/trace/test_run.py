"""Traces of whole runs: golden facts by hand, every architecture and method, and measured rows."""

from __future__ import annotations

import csv
import gc

import pytest
from places import SHARED

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from trace_setups import CONFIGS, config_of, live_at, made_between, most_of, setup_of, traced  # noqa: E402

from meft.planner.base.errors import UsageError  # noqa: E402
from meft.planner.models.catalogue import load_model  # noqa: E402
from meft.planner.models.configs import shape_from_config  # noqa: E402
from meft.planner.records.setup import TrainingSetup  # noqa: E402
from meft.planner.simulation.run import simulate  # noqa: E402
from meft.planner.simulation.stream import Stream, stream_peaks  # noqa: E402
from meft.runtime.trace.run import peak_holders, trace_training  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")  # PEFT gives no kind of checkpointing

MEASURED = SHARED / "reference" / "measured_gpu_memory.csv"

P = 2 * 256 * 64 + 2 * (2 * 64 * (64 + 32) + 3 * 64 * 192) + 5 * 64
"""Parameters of the tiny llama: embedding, head, two layers of attention (4 heads, 2 for keys) and FFN, five norms."""
T, V, D = 64, 256, 64


def test_the_tiny_llama_has_so_many_parameters() -> None:
    assert shape_from_config(config_of("llama"), name="llama").num_parameters == P == 131_392


# --- golden facts ----------------------------------------------------------------------------------------------------


def test_full_fine_tuning_in_fp32_by_hand() -> None:
    """At the end of a step: weights, two moments; before gradients are cleared those too; and the outputs that the loop
    holds: logits, keys and values of two layers and 2 heads of 16, the loss; ids, labels and nothing else."""
    stream = traced("llama", weights_dtype="fp32")
    outputs = {"logits": 4 * T * V, "attention": 2 * 2 * 4 * T * 2 * 16}
    held = {"linear_weights": 4 * (P - 2 * V * D - 5 * D), "other_weights": 4 * (2 * V * D + 5 * D)}
    held |= {"rotary_frequencies": 2 * 4 * 8, "optimizer_moments": 2 * 4 * P, "inputs": 2 * 8 * T, "loss_chain": 4}
    assert live_at(stream, "optimizer_step_2") == held | outputs
    assert live_at(stream, "updated_2") == held | outputs | {"gradients": 4 * P}
    root = made_between(stream, "backward_2", "updated_2")
    assert sum(event.num_bytes for event in root) == 4 * P  # the multi-tensor step's one temporary
    assert {event.category for event in root} == {"optimizer_temporary"}


def test_the_loss_of_bf16_logits_takes_14_bytes_each() -> None:
    """bf16 logits, which the loop holds; log-probabilities, their gradient and the logits' in fp32.

    With the fused loss the peak is where two steps' logits are there.
    """
    large = config_of("llama", vocab_size=4096)
    for kept, loss, expected in ((True, "hf", (2, 12)), (False, "hf", (0, 12)), (True, "fused-ce", (4, 0))):
        stream = traced("llama", config=large, method="lora", outputs_kept=kept, loss=loss)
        at_peak = stream_peaks(stream).ledger["loss"].by_category
        found = (at_peak.get("logits", 0), at_peak["loss_chain"])
        assert found == pytest.approx([each * T * 4096 for each in expected], rel=0.001, abs=20_000)


def test_shifted_logits_are_copied_in_fp32() -> None:
    large = config_of("llama", vocab_size=4096)
    peaks = {
        loss: stream_peaks(traced("llama", config=large, method="lora", outputs_kept=False, loss=loss)).requested_bytes
        for loss in ("hf", "hf-shifted-logits", "fused-linear-ce")
    }
    assert peaks["fused-linear-ce"] < peaks["hf"] < peaks["hf-shifted-logits"]


def test_outputs_are_held_until_the_next_ones_are_there() -> None:
    kept, dropped = (traced("llama", method="lora", outputs_kept=kept) for kept in (True, False))
    logits, cache = 2 * T * V, 2 * 2 * 2 * T * 2 * 16
    at_end = live_at(kept, "optimizer_step_2")
    assert (at_end["logits"], at_end["attention"]) == (logits, cache)
    assert "logits" not in live_at(dropped, "optimizer_step_2")
    assert most_of(kept, "logits") == 2 * logits  # the second forward begins while the first one's are held
    assert most_of(dropped, "logits") == logits


def test_a_checkpointed_run_keeps_no_cache_and_little_else() -> None:
    plain, checkpointed = (traced("llama", method="lora", activation_checkpointing=on) for on in (False, True))
    assert "attention" not in live_at(checkpointed, "optimizer_step_2")
    assert live_at(checkpointed, "forward_2").total() < live_at(plain, "forward_2").total()


def test_nf4_with_kbit_preparation_by_hand() -> None:
    """Linear layers in 4 bits with doubly quantized maxima; embedding, head and norms in fp32."""
    stream = traced("llama", method="qlora", double_quant=True, kbit_preparation=True)
    linears = 2 * [64 * 64, 32 * 64, 32 * 64, 64 * 64, 192 * 64, 192 * 64, 64 * 192]
    quantized = sum(n // 2 + n // 64 + -(-n // 64 // 256) * 4 + 64 + 1024 + 4 for n in linears)
    assert live_at(stream, "loaded")["linear_weights"] == quantized
    assert live_at(stream, "loaded")["other_weights"] == 4 * (2 * V * D + 5 * D)
    written_out = [event for event in stream.events if event.category == "dequantized_weight" and event.num_bytes > 0]
    assert 2 * 192 * 64 in {event.num_bytes for event in written_out}
    warm_up = sum(linears) // 2 + 2 * (2 * V * D + 5 * D)  # before all weights, and gone before them
    assert [event.num_bytes for event in stream.events[:2]] == [warm_up, -warm_up]


def test_preparation_casts_tied_embeddings_once() -> None:
    config = config_of("llama", tie_word_embeddings=True)
    stream = traced("llama", config=config, method="qlora", kbit_preparation=True)
    assert live_at(stream, "loaded")["other_weights"] == 4 * (V * D + 5 * D)


def test_autocast_copies_weights_for_as_long_as_forward_lasts() -> None:
    stream = traced("llama", method="full", weights_dtype="fp32", autocast="bf16")
    assert most_of(stream, "autocast_weights") == 2 * (P - V * D - 5 * D)  # all but embedding and norms
    assert "autocast_weights" not in live_at(stream, "optimizer_step_2")


def test_gradients_of_an_accumulation_window_are_added_to_those_that_are_there() -> None:
    once, twice = (stream_peaks(traced("llama", grad_accum=number)) for number in (1, 8))
    assert twice.ledger["forward"].by_category["gradients"] == 2 * P
    assert "gradients" not in once.ledger["forward"].by_category


def test_a_padded_batch_has_a_mask() -> None:
    for attention, item in (("sdpa", 1), ("eager", 2)):
        stream = traced("llama", method="lora", attention=attention, padded=True)
        masks = [event for event in stream.events if event.category == "attention_mask" and event.num_bytes > 0]
        assert {event.num_bytes for event in masks} == {2 * 32 * 32 * item}


def test_lora_dropout_keeps_a_mask_for_every_target() -> None:
    peaks = [
        stream_peaks(traced("llama", method="lora", lora_dropout=on, loss="fused-linear-ce")).requested_bytes
        for on in (False, True)
    ]
    assert peaks[1] > peaks[0]


# --- every architecture and method -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_is_traced(model_type) -> None:
    """Parameters are all there, phases follow one another, and the second step leaves what the first one left."""
    config = config_of(model_type)
    stream = traced(model_type, config=config, method="parallel-adapter")
    shape = shape_from_config(config, name=model_type)
    loaded = live_at(stream, "loaded")
    extra = loaded["other_weights"] + loaded["linear_weights"] - 2 * shape.num_parameters
    assert 0 <= extra <= 4  # Gemma's scale of the embeddings is a buffer
    assert live_at(stream, "attached")["trainable_weights"] == 4 * 2 * 2 * 32 * 64
    assert live_at(stream, "optimizer_step_1") == live_at(stream, "optimizer_step_2")
    phases = [event.phase for event in stream.events[stream.moments["optimizer_step_1"] :]]
    order = ["forward", "loss", "backward", "optimizer_step"]
    assert [phase for index, phase in enumerate(phases) if index == 0 or phases[index - 1] != phase] == order
    assert stream_peaks(stream).requested_bytes > 0  # nothing comes twice or goes without having come


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora", "attention": "flash", "padded": True, "activation_checkpointing": True},
        {"method": "full", "attention": "flash", "optimizer": "sgd", "loss": "fused-linear-ce"},
        {"method": "qlora", "kbit_preparation": True, "activation_checkpointing": True, "autocast": "bf16"},
        {"method": "qlora", "adapter_dtype": "bf16", "optimizer": "paged-adamw-8bit"},
        {"method": "lora", "weights_dtype": "fp16", "attention": "eager", "optimizer": "adamw-8bit"},
        {"method": "parallel-adapter", "adapter_dtype": "bf16", "optimizer": "adamw-fused"},
        {"method": "meft", "activation_checkpointing": True},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_a_step_returns_to_where_it_began(changes) -> None:
    stream = traced("llama", workspace_bytes=512, **changes)
    first, second = live_at(stream, "optimizer_step_1"), live_at(stream, "optimizer_step_2")
    assert first == second
    assert first["cublas_workspaces"] == 2 * 512
    assert sum(name.startswith("optimizer_step_") for name in stream.moments) == 2
    assert stream_peaks(stream).reserved_bytes >= stream_peaks(stream).allocated_bytes


def test_the_same_setup_gives_the_same_stream() -> None:
    """Whatever the garbage collector does before or after."""
    first = traced("qwen2", method="lora", activation_checkpointing=True)
    gc.collect()
    assert traced("qwen2", method="lora", activation_checkpointing=True) == first


def test_meft_holds_rows_gradients_and_a_weight_per_layer_by_hand() -> None:
    """16 rows of 2 x 64 numbers in fp32: one slot, since rows are fetched again, and one buffer of gradients."""
    stream = traced("llama", method="meft")
    attached = live_at(stream, "attached")
    assert (attached["row_staging"], attached["row_gradients"]) == (4 * 16 * 128, 4 * 16 * 128)
    assert "optimizer_moments" not in live_at(stream, "optimizer_step_2")


def test_holders_of_the_peak_add_up_to_it() -> None:
    stream = traced("llama", method="lora")
    holders = peak_holders(stream, n=10_000)
    assert sum(size for size, *_ in holders) == stream_peaks(stream).requested_bytes
    assert holders == sorted(holders, key=lambda row: -row[0])


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(**changes: object) -> str:
    with pytest.raises(UsageError) as error:
        traced("llama", **changes)
    return str(error.value)


def test_what_cannot_be_run_is_refused_by_name() -> None:
    assert "target_modules nothing" in refused(method="lora", target_modules=("nothing",))
    assert "rank and target_modules" in refused(method="lora", rank=None)
    assert "adapter_width" in refused(method="parallel-adapter", adapter_width=None)
    assert "active_rows" in refused(method="meft", active_rows=None)
    assert "weights_dtype int8" in refused(method="lora", weights_dtype="int8")
    assert "cannot train quantized weights" in refused(method="full", weights_dtype="nf4")
    assert "attention flash" in refused(method="lora", attention="flash", weights_dtype="fp32")
    assert "--kernels lora is simulated only" in refused(method="lora", kernels=("lora",))
    assert "--repeated-heads is simulated only" in refused(method="lora", repeated_heads=True)
    config = config_of("gemma2")
    with pytest.raises(UsageError, match="attention sdpa: not for gemma2"):
        trace_training(setup_of(config, attention="sdpa"), config)


# --- measured on real cards ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not MEASURED.exists(), reason="the measured rows are not here")
def test_peaks_measured_on_an_rtx_4080() -> None:
    """Qwen2.5-0.5B, QLoRA, 1 x 256 tokens: ``max_memory_allocated`` after the first backward, and of the run."""
    rows = {each["row_id"]: float(each["value_bytes"]) for each in csv.DictReader(MEASURED.open())}
    shape, config, _ = load_model("qwen2.5-0.5b")
    setup = TrainingSetup(
        model=shape,
        method="qlora",
        rank=8,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
        seq_len=256,
        weights_dtype="nf4",
        double_quant=True,
        kbit_preparation=True,
        autocast="bf16",
        activation_checkpointing=True,
    )
    peaks = stream_peaks(trace_training(setup, config))
    assert peaks.at_moment["backward_1"][1] == pytest.approx(rows["canifinetune-01213"], rel=0.001)
    assert peaks.allocated_bytes == pytest.approx(rows["canifinetune-01215"], rel=0.001)


def stream_without(stream: Stream, category: str) -> Stream:
    return Stream(tuple(event for event in stream.events if event.category != category))


def test_taking_a_category_away_never_raises_the_peak() -> None:
    stream = traced("gpt2", method="lora")
    peak = stream_peaks(stream).requested_bytes
    for category in {event.category for event in stream.events}:
        assert stream_peaks(stream_without(stream, category)).requested_bytes <= peak


# --- optimizers and losses --------------------------------------------------------------------------------------------

OTHERS = [
    {"optimizer": "adafactor"},
    {"loss": "fused-ce-upcast", "seq_len": 128, "batch_size": 1, "method": "lora"},
    {"optimizer": "muon"},
    {"optimizer": "galore"},
    {"optimizer": "apollo"},
    {"optimizer": "apollo-mini"},
    {"optimizer": "paged-adamw-32bit"},
    {"optimizer": "lion-8bit"},
    {"master_weights": True},
    {"optimizer_in_backward": True},
    *({"loss": loss, "seq_len": 128} for loss in ("fused-ce-shifted", "fused-ce-upcast", "trl-chunked")),
    {"loss": "torchtune-chunked", "seq_len": 128},
    {"method": "qlora", "kbit_preparation": True, "trl_casts": True, "autocast": "bf16"},
    {"method": "qlora", "kbit_preparation": True, "double_quant": True, "batch_size": 1, "seq_len": 128},
    {"method": "qlora", "kbit_preparation": True, "activation_checkpointing": True, "batch_size": 1, "seq_len": 128},
    {"method": "lora", "activation_checkpointing": True, "reentrant": True},
    *({"packed": True, "method": "lora", "attention": kind} for kind in ("sdpa", "eager")),
    *({"kernels": (kernel,), "method": "lora"} for kernel in ("rms-norm", "swiglu", "rope")),
]


@pytest.mark.parametrize("changes", OTHERS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_the_simulated_step_has_the_same_optimizers_and_losses(changes) -> None:
    """transformers' Adafactor and torch's Muon and AdamW are the libraries' own here; the others stand for theirs."""
    config = config_of("llama", hidden_size=256, vocab_size=2048)
    setup = setup_of(config, **changes)
    traced_peaks = stream_peaks(trace_training(setup, config, workspace_bytes=0))
    simulated = stream_peaks(simulate(setup, workspace_bytes=0))
    assert simulated.allocated_bytes == pytest.approx(traced_peaks.allocated_bytes, rel=0.01)
    if "optimizer_step" in traced_peaks.ledger:  # nothing comes there where parameters are updated in backward
        updating = traced_peaks.ledger["optimizer_step"].allocated_bytes
        assert simulated.ledger["optimizer_step"].allocated_bytes == pytest.approx(updating, rel=0.01)
    for moment in ("updated_2", "optimizer_step_2"):
        allocated = traced_peaks.at_moment[moment][0]
        assert simulated.at_moment[moment][0] == pytest.approx(allocated, rel=0.01)


def test_beside_a_mask_a_single_key_head_stays_a_view() -> None:
    """Of 16 query heads and one key head sdpa keeps what there is; written out, keys and values are 16 times that."""
    config = config_of("llama", hidden_size=256, num_attention_heads=16, num_key_value_heads=1)
    setup = setup_of(config, method="lora", packed=True, seq_len=128)
    traced_peaks = stream_peaks(trace_training(setup, config, workspace_bytes=0))
    simulated = stream_peaks(simulate(setup, workspace_bytes=0))
    assert simulated.allocated_bytes == pytest.approx(traced_peaks.allocated_bytes, rel=0.01)


# --- rotary positions that are computed at a step ---------------------------------------------------------------------

ROPES = {
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_made_at_a_step_are_traced(kind: str) -> None:
    """Long frequencies are a third buffer of half a head, 8 numbers of 4 bytes, made while the model is loaded; dynamic
    ones stay as they are for every sequence within the config's positions."""
    config = config_of("llama", rope_scaling=ROPES[kind] | {"original_max_position_embeddings": 32}, rope_theta=1e4)
    stream = trace_training(setup_of(config, method="lora"), config)
    assert live_at(stream, "optimizer_step_2")["rotary_frequencies"] == (3 if kind == "longrope" else 2) * 4 * 8
