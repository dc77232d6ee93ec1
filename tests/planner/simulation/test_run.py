"""The simulated step: published measurements, sizes counted by hand, and properties."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_records import tiny_shape

from meft.planner.allocator.cublas import USUAL_BYTES
from meft.planner.base.errors import UsageError
from meft.planner.models.architecture import ModelShape
from meft.planner.models.catalogue import load_model, model_names
from meft.planner.models.kernels import applies, fused_lora_of, resolve_kernels
from meft.planner.models.linears import linear_layers, module_names, resolve_targets
from meft.planner.records.setup import OptimizerName, TrainingSetup
from meft.planner.simulation.losses import LOSS_KINDS, fused_linear_chunk
from meft.planner.simulation.run import simulate
from meft.planner.simulation.stream import Stream, StreamEvent, live_by_category, stream_peaks

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def setup_of(shape: ModelShape | None = None, **changes) -> TrainingSetup:
    return TrainingSetup(**({"model": shape or tiny_shape(), "method": "full", "seq_len": 4} | changes))


def requested_peak(stream: Stream, without: str = "") -> int:
    hidden: set[int] = set()
    total = most = 0
    for event in stream.events:
        if event.num_bytes > 0 and event.category == without:
            hidden.add(event.tensor)
        if event.tensor not in hidden:
            total += event.num_bytes
            most = max(most, total)
    return most


# --- measured by others ---------------------------------------------------------------------------------------------

LONG = {"batch_size": 4, "seq_len": 4096, "attention": "flash", "activation_checkpointing": True}
SHORT = {"seq_len": 128, "weights_dtype": "fp32", "method": "parallel-adapter"}
CHECKPOINTED = {"activation_checkpointing": True, "method": "lora", "target_modules": ATTENTION}
QUANTIZED = {"method": "qlora", "weights_dtype": "nf4", "double_quant": True}
EARLIER = {"loss": "hf-shifted-logits", "outputs_kept": False}  # transformers 4.48 and its Trainer
PUBLISHED = [
    # canifinetune, RTX 4080, torch 2.6, transformers 5.8, peft 0.19: runs 01044, 01197, 01206, 01053, 01062, 01215
    ("qwen2.5-0.5b", CHECKPOINTED | {"rank": 16, "seq_len": 1024, "optimizer": "paged-adamw-8bit"}, 3256014707, 0.002),
    ("qwen2.5-0.5b", CHECKPOINTED | {"rank": 8, "seq_len": 256, "autocast": "bf16"}, 1582910197, 0.002),
    ("qwen2.5-0.5b", CHECKPOINTED | {"rank": 8, "seq_len": 512, "autocast": "bf16"}, 2139430584, 0.002),
    (
        "qwen2.5-0.5b",
        CHECKPOINTED
        | QUANTIZED
        | {"rank": 16, "seq_len": 1024, "optimizer": "paged-adamw-8bit", "kbit_preparation": True},
        3345564775,
        0.002,
    ),
    (
        "qwen2.5-0.5b",
        CHECKPOINTED
        | QUANTIZED
        | {"rank": 16, "seq_len": 2048, "optimizer": "paged-adamw-8bit", "kbit_preparation": True},
        5929202352,
        0.002,
    ),
    (
        "qwen2.5-0.5b",
        CHECKPOINTED | QUANTIZED | {"rank": 8, "seq_len": 256, "autocast": "bf16", "kbit_preparation": True},
        1600626937,
        0.002,
    ),
    # fms-acceleration, A100: runs 01824, 01290, 01392
    ("mistral-7b", LONG | {"method": "full", "outputs_kept": False}, 72432723456, 0.001),
    ("mistral-7b", LONG | CHECKPOINTED | EARLIER | {"rank": 16}, 26704571904, 0.001),
    ("mistral-7b", LONG | CHECKPOINTED | QUANTIZED | EARLIER | {"rank": 16, "autocast": "bf16"}, 16373838336, 0.003),
    # a public re-implementation of MEFT, dense adapters of width 1024 and 4096 beside GPT-2-medium
    ("gpt2-medium", SHORT | {"adapter_width": 1024}, 2494845420, 0.002),
    ("gpt2-medium", SHORT | {"adapter_width": 4096}, 5516222792, 0.002),
]


@pytest.mark.parametrize(("model", "fields", "measured", "tolerance"), PUBLISHED)
def test_max_memory_allocated_of_measured_runs(model: str, fields: dict, measured: int, tolerance: float) -> None:
    setup = TrainingSetup(**({"model": load_model(model)[0], "method": "lora"} | fields))
    assert stream_peaks(simulate(setup)).allocated_bytes == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize(
    ("fields", "measured"),
    [  # canifinetune runs 01198, 01207, 01045
        ({"rank": 8, "seq_len": 256, "autocast": "bf16"}, 1811939328),
        ({"rank": 8, "seq_len": 512, "autocast": "bf16"}, 2550136832),
        ({"rank": 16, "seq_len": 1024, "optimizer": "paged-adamw-8bit"}, 4074742848),
    ],
)
def test_max_memory_reserved_of_measured_runs(fields: dict, measured: int) -> None:
    setup = TrainingSetup(model=load_model("qwen2.5-0.5b")[0], **(CHECKPOINTED | fields))
    assert stream_peaks(simulate(setup)).reserved_bytes == pytest.approx(measured, rel=0.04)


def test_memory_allocated_at_the_stages_of_a_measured_run() -> None:
    # canifinetune runs 01037 to 01043; the figures are rounded to 0.0001 GiB
    setup = TrainingSetup(
        model=load_model("qwen2.5-0.5b")[0], rank=16, seq_len=1024, optimizer="paged-adamw-8bit", **CHECKPOINTED
    )
    at = stream_peaks(simulate(setup)).at_moment
    assert at["loaded"][0] == pytest.approx(996325038, abs=60_000)
    assert at["attached"][0] == pytest.approx(1005022347, abs=60_000)
    assert at["forward_1"][0] == pytest.approx(1995549180, rel=0.002)
    assert at["backward_1"][0] == pytest.approx(1346150125, rel=0.003)
    assert at["optimizer_step_1"][0] == pytest.approx(1342606777, rel=0.003)


# --- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", model_names())
def test_what_is_loaded_is_every_parameter(model: str) -> None:
    shape = load_model(model)[0]
    stream = simulate(setup_of(shape, method="lora", rank=1, target_modules=module_names(shape)[:1]))
    loaded = live_by_category(stream, stream.moments["loaded"])
    assert loaded["linear_weights"] + loaded["other_weights"] == 2 * shape.num_parameters


def test_full_fine_tuning_in_bf16_takes_ten_bytes_per_parameter_at_the_optimizer_step() -> None:
    shape = tiny_shape()
    stream = simulate(setup_of(shape, outputs_kept=False))
    at_update = live_by_category(stream, stream.moments["updated_2"])
    weights = at_update["linear_weights"] + at_update["other_weights"]
    states = weights + at_update["optimizer_moments"] + at_update["gradients"]
    assert states == (2 + 4 + 2) * shape.num_parameters
    ledger = stream_peaks(stream).ledger["optimizer_step"].by_category
    assert ledger["optimizer_temporary"] == 2 * shape.num_parameters


SQUARE = {"num_layers": 1, "hidden_size": 512, "intermediate_size": 512, "num_heads": 1, "num_kv_heads": 1}
OF_MAXIMA = 4 / 256
STATES: dict[str, tuple[float, float, int]] = {  # bytes a number of a matrix, of a vector; for all together
    "adamw": (4, 4, 0),
    "adafactor": (2 * 4 / 512, 4, 0),
    "paged-adamw-32bit": (0, 8, 0),
    "lion-32bit": (4, 4, 0),
    "lion-8bit": (1 + OF_MAXIMA, 4, 1024),
    "paged-lion-8bit": (OF_MAXIMA, 4, 1024),
    "adamw-8bit": (2 + 2 * OF_MAXIMA, 8, 2048),
}


@pytest.mark.parametrize("name", STATES)
def test_optimizer_states_in_bytes_a_number(name: str) -> None:
    """Of a bf16 matrix of 512 x 512 numbers: torch's two moments in the parameter's dtype; Lion's one, in fp32 or a
    byte with an fp32 maximum per 256; paged ones from 100,000 numbers on outside the device, but for those maxima.
    Adafactor keeps a row and a column in fp32, transformers' default having no first moment.
    """
    shape = tiny_shape(**SQUARE, head_dim=512, vocab_size=512)
    stream = simulate(setup_of(shape, optimizer=name, outputs_kept=False))
    moments = live_by_category(stream, stream.moments["updated_2"])["optimizer_moments"]
    matrices, vectors = 4 + 3 + 2, 3  # attention, gated FFN, embedding and head; norms, of 512 numbers each
    of_matrix, of_vector, codes = STATES[name]
    assert moments == matrices * 512**2 * of_matrix + vectors * 512 * of_vector + codes


def test_an_optimizer_in_backward_never_holds_more_than_one_gradient() -> None:
    """Full fine-tuning in bf16 takes 2 + 4 bytes a number (weights, two moments) and, at the optimizer step, 2 for
    gradients and 2 for the multi-tensor temporary; in backward those are of the largest tensor alone."""
    shape = tiny_shape(**SQUARE, head_dim=512, vocab_size=2048)
    peaks = {}
    for early in (False, True):
        stream = simulate(setup_of(shape, optimizer_in_backward=early, outputs_kept=False), workspace_bytes=0)
        after = live_by_category(stream, stream.moments["updated_2"])
        assert after.get("gradients", 0) == (0 if early else 2 * shape.num_parameters)
        peaks[early] = requested_peak(stream)
    largest = 2048 * 512
    saved = peaks[False] - peaks[True]
    assert saved == pytest.approx(4 * (shape.num_parameters - largest), rel=0.02)


def test_master_weights_are_fp32_copies_with_fp32_states() -> None:
    """16-bit weights and gradients (2 + 2), their copies (4), two moments (8); in the step the gradients cast (4) and
    the temporary (4): 24 bytes a number."""
    shape = tiny_shape()
    stream = simulate(setup_of(shape, master_weights=True, outputs_kept=False))
    held = live_by_category(stream, stream.moments["updated_2"])
    assert held["optimizer_moments"] == (4 + 8) * shape.num_parameters
    ledger = stream_peaks(stream).ledger["optimizer_step"].by_category
    assert ledger["optimizer_temporary"] == (4 + 4) * shape.num_parameters


def test_lora_counts_and_keeps_each_cast_input() -> None:
    # rank 2 on q (8 to 8) and down (16 to 8), three layers: 2 * (16 + 24) * 3 = 240 fp32 parameters
    stream = simulate(setup_of(method="lora", rank=2, target_modules=("q_proj", "down_proj")))
    after = live_by_category(stream, stream.moments["updated_1"])
    assert (after["trainable_weights"], after["optimizer_moments"], after["gradients"]) == (960, 1920, 960)
    kept = live_by_category(stream, stream.moments["forward_1"])["adapter"]
    assert kept == 3 * 4 * (8 + 16 + 2 * 2) * 4  # per token and layer: inputs in fp32, [T, 2] twice


def test_nf4_is_stored_as_bitsandbytes_stores_it() -> None:
    # half a byte a weight, a scale per 64 in 8 bits, per 256 of those one in fp32, an offset, 16 and 256 of codes
    shape = tiny_shape(num_layers=1, hidden_size=64, intermediate_size=512, num_heads=1, num_kv_heads=1, head_dim=64)
    quantized = {"method": "qlora", "weights_dtype": "nf4", "rank": 1, "target_modules": ("q_proj",)}
    double = simulate(setup_of(shape, double_quant=True, **quantized))
    single = simulate(setup_of(shape, **quantized))
    sizes = [layer.num_weights for layer in linear_layers(shape)]
    stored = live_by_category(double, double.moments["loaded"])["linear_weights"]
    assert stored == sum(size // 2 + size // 64 + 4 * -(-size // 64 // 256) + 4 + 64 + 1024 for size in sizes)
    assert live_by_category(single, single.moments["loaded"])["linear_weights"] == sum(
        size // 2 + 4 * (size // 64) + 64 for size in sizes
    )


def test_transformers_warms_the_allocator_up_before_a_4_bit_load() -> None:
    """One block comes and goes before the embedding: half a byte a quantized weight, two for each other one. None
    where weights of 16 bits are moved to the device, or where the runtime loads."""
    shape = tiny_shape(num_layers=1, hidden_size=64, intermediate_size=512, num_heads=1, num_kv_heads=1, head_dim=64)
    quantized = {"method": "qlora", "weights_dtype": "nf4", "rank": 1, "target_modules": ("q_proj",)}
    linears = sum(layer.num_weights for layer in linear_layers(shape))
    first, second, third = (event.num_bytes for event in simulate(setup_of(shape, **quantized)).events[:3])
    assert first == linears // 2 + 2 * (shape.num_parameters - linears)
    assert (second, third) == (-first, 2 * shape.embedding_parameters)
    for fields in (quantized | {"weights_dtype": "bf16", "method": "lora"}, quantized | {"emulated": True}):
        assert simulate(setup_of(shape, **fields)).events[0].num_bytes == 2 * shape.embedding_parameters


def test_gradients_are_there_from_the_first_micro_batch_of_a_window_on() -> None:
    for accum, there in ((1, 0), (2, 2 * tiny_shape().num_parameters)):
        stream = simulate(setup_of(grad_accum=accum))
        second_forward = stream.moments["forward_2"]
        assert live_by_category(stream, second_forward).get("gradients", 0) == there


def test_workspaces_one_per_thread_that_multiplies() -> None:
    stream = simulate(setup_of())
    sizes = [event.num_bytes for event in stream.events if event.category == "cublas_workspaces"]
    assert sizes == [USUAL_BYTES] * 2


def test_liger_chunks() -> None:
    # 4096 tokens over a vocabulary of 32000 at width 4096: ceil(32000 / 4096) = 8 chunks of 512
    assert fused_linear_chunk(tokens=4096, vocab_size=32000, hidden_size=4096) == 512
    assert fused_linear_chunk(tokens=100, vocab_size=151936, hidden_size=896) == 1


BY_LOSS = {"method": "lora", "rank": 1, "target_modules": ("q_proj",), "activation_checkpointing": True}


def test_logits_by_loss() -> None:
    # T = 512, V = 32; bf16 logits, and at the peak log-probabilities and two gradients in fp32
    peaks = {}
    for loss in ("hf", "hf-shifted-logits", "fused-ce", "fused-linear-ce"):
        ledger = stream_peaks(simulate(setup_of(loss=loss, seq_len=512, **BY_LOSS))).ledger
        peaks[loss] = ledger["loss"].by_category
    assert peaks["hf"]["logits"] == 512 * 32 * 2
    assert peaks["hf"]["loss_chain"] == 3 * 512 * 32 * 4 + 4  # and the loss
    assert peaks["fused-ce"]["loss_chain"] < 512 * 32
    assert peaks["fused-linear-ce"].get("logits", 0) < 512 * 32


@pytest.mark.parametrize("loss", LOSS_KINDS)
def test_each_loss_costs_so_many_bytes_a_logit(loss: str) -> None:
    """The slope of the largest moment over the vocabulary, per token, counted in bytes by hand:

    hf: log-probabilities, their gradient and the logits', in fp32: 4 + 4 + 4. Shifted logits: bf16 (2), upcast (4), the
    copy (4) and its log-probabilities (4). In place over upcast logits 2 + 4 + 4, or 4 + 4 where the model itself has
    upcast them; over bf16 logits nothing more than those.
    torchtune: all chunks' bf16 logits (2) and log-probabilities (4), and the last chunk's upcast, an eighth of 4.
    """
    long = {"batch_size": 2, "seq_len": 256, "outputs_kept": False, **BY_LOSS}  # shifted, one sequence is a view
    peaks = []
    for vocab_size in (4096, 8192):
        shape = tiny_shape(vocab_size=vocab_size)
        ledger = stream_peaks(simulate(setup_of(shape, loss=loss, **long), workspace_bytes=0)).ledger["loss"]
        loaded = 2 * 2 * vocab_size * shape.hidden_size
        peaks.append(sum(ledger.by_category.values()) - loaded)
    slope = (peaks[1] - peaks[0]) / (512 * 4096)
    assert slope == pytest.approx(LOSS_KINDS[loss].logit_bytes, abs=0.06)


def test_casts_of_trl_leave_a_residual_stream_in_fp32() -> None:
    """After PEFT's preparation all that is not quantized is fp32; TRL casts embeddings and head (2 V D) back to bf16
    and leaves the norms. Those give fp32, which a 4-bit layer gives back as it came: the FFN's product is fp32, and the
    residual stream from the first layer on. With checkpointing the first layer keeps 2 D bytes a token, all others 4 D.
    """
    shape = tiny_shape()
    prepared = {"method": "qlora", "weights_dtype": "nf4", "kbit_preparation": True, "autocast": "bf16"}
    prepared |= {"rank": 1, "target_modules": ("q_proj",), "activation_checkpointing": True, "outputs_kept": False}
    streams = {cast: simulate(setup_of(shape, seq_len=64, trl_casts=cast, **prepared)) for cast in (False, True)}
    norms = 7 * 8
    tables = 2 * 32 * 8
    for cast, of_tables in ((False, 4), (True, 2)):
        attached = live_by_category(streams[cast], streams[cast].moments["attached"])
        assert attached["other_weights"] == 4 * norms + of_tables * tables
    kept = {cast: live_by_category(each, each.moments["forward_1"]) for cast, each in streams.items()}
    assert kept[True]["embeddings"] == 64 * 8 * 2
    assert kept[False]["embeddings"] == 64 * 8 * 4
    assert kept[True]["layer_inputs"] == kept[False]["layer_inputs"] == 3 * 64 * 8 * 4


def test_fused_kernels_keep_so_much_less() -> None:
    """Per token and layer, in bytes, of bf16 and what LoRA beside the query makes need gradients:

    RMSNorm keeps its input in bf16 (2 D, the residual stream itself, which then stays) and a factor (4), where the
    plain one keeps a copy in fp32 (4 D) and a factor (4). The gate's kernel keeps gate and up (2 I each), where the
    plain one keeps those and the activation's output. In-place rotation keeps the tables, as the plain one does.
    """
    tokens, width, inner = 64, 8, 16
    kept = {}
    for kernels in ((), ("rms-norm",), ("swiglu",), ("rope",)):
        stream = simulate(setup_of(kernels=kernels, seq_len=tokens, method="lora", rank=1, target_modules=("q_proj",)))
        kept[kernels] = live_by_category(stream, stream.moments["forward_1"])
    plain = kept[()]
    assert plain["ffn"] - kept["swiglu",]["ffn"] == 3 * tokens * inner * 2
    # two norms a layer but the first, which nothing trained precedes, and the final one
    norms = 2 * 3
    assert plain["norms"] - kept["rms-norm",]["norms"] == norms * tokens * width * 4
    streams = kept["rms-norm",]["layer_inputs"] - plain.get("layer_inputs", 0)
    assert streams == norms * tokens * width * 2
    assert kept["rope",] == plain


@pytest.mark.parametrize("dropout", [True, False])
def test_fused_lora_keeps_its_input_and_what_was_dropped(dropout: bool) -> None:
    """In bytes, bf16 weights under autocast, fp32 LoRA beside all four attention layers (D to D), three layers.

    peft keeps for each of the twelve adapted layers its 16-bit input (2 D a token) and its low product (2 r), the upper
    factor in 16 bits (2 r D); and where a gradient flows to the input, which is so but for the first layer's queries,
    keys and values, the lower factor too (2 r D), and dropout's mask (D a token).
    Fused, a layer keeps the input of queries, keys and values (2 D a token; attention keeps the output projection's
    anyway), and with dropout what that made for each of the four (2 D).
    """
    tokens, width, rank, layers = 64, 8, 2, 3
    shape = tiny_shape(num_kv_heads=2)
    fields = {"method": "lora", "rank": rank, "target_modules": ATTENTION, "autocast": "bf16", "seq_len": tokens}
    kept = {}
    for kernels in ((), ("lora",)):
        stream = simulate(setup_of(shape, kernels=kernels, lora_dropout=dropout, outputs_kept=False, **fields))
        kept[kernels] = sum(live_by_category(stream, stream.moments["forward_1"]).values())
    adapted, with_gradient = 4 * layers, 4 * layers - 3
    factors = (adapted + with_gradient) * 2 * rank * width
    peft = adapted * tokens * (2 * width + 2 * rank) + factors + dropout * with_gradient * tokens * width
    fused = layers * tokens * 2 * width + dropout * adapted * tokens * 2 * width
    assert kept[()] - kept["lora",] == peft - fused


def test_repeated_heads_are_kept_by_flash_attention() -> None:
    """Keys and values of every head beside the grouped ones, which the cache holds: 2 H d numbers of 2 bytes more per
    token and layer."""
    shape = tiny_shape(num_heads=2, num_kv_heads=1)
    fields = {"method": "lora", "rank": 1, "target_modules": ("q_proj", "k_proj", "v_proj"), "attention": "flash"}
    kept = []
    for repeated in (False, True):
        stream = simulate(setup_of(shape, repeated_heads=repeated, seq_len=64, outputs_kept=False, **fields))
        kept.append(live_by_category(stream, stream.moments["forward_1"])["attention"])
    assert kept[1] - kept[0] == 3 * 64 * 2 * shape.query_size * 2


def test_kernels_by_library_are_those_that_apply() -> None:
    llama, gpt2, phi = (load_model(name)[0] for name in ("llama-7b", "gpt2", "phi-3-mini-4k"))
    assert resolve_kernels(llama, ["liger"]) == ("rms-norm", "swiglu", "rope")
    assert resolve_kernels(llama, ["foak"]) == ("rms-norm", "rope")
    assert resolve_kernels(gpt2, ["liger"]) == ()
    assert resolve_kernels(phi, ["swiglu", "rope"]) == ("swiglu", "rope")
    assert resolve_kernels(llama, ["foak", "lora"]) == ("rms-norm", "rope", "lora")
    assert fused_lora_of(["foak"], quantized=True, dropout=True)
    assert not fused_lora_of(["foak"], quantized=False, dropout=False)
    assert [fused_lora_of(["unsloth"], quantized=False, dropout=each) for each in (False, True)] == [True, False]
    with pytest.raises(UsageError, match=r"--kernels rms-norm: .* has no place for it"):
        resolve_kernels(gpt2, ["rms-norm"])
    with pytest.raises(UsageError, match="kernel in --kernels"):
        resolve_kernels(llama, ["triton"])


def test_fp16_and_bf16_are_as_large_and_not_the_same() -> None:
    """fp16 weights under bf16 autocast: an fp16 embedding and a bf16 product add up to fp32, as torch promotes them, so
    the residual stream from the first sum on takes 4 bytes a number where bf16 weights take 2.

    With checkpointing a layer keeps its input: after the embedding (D = 8 numbers a token in the weights' format) those
    of layers 2 and 3; of a stream in fp32 also what the final norm keeps, which otherwise is a cast of its own.
    """
    lora = {"method": "lora", "rank": 1, "target_modules": ("q_proj",), "activation_checkpointing": True}
    kept = {}
    for weights in ("fp16", "bf16"):
        stream = simulate(setup_of(weights_dtype=weights, autocast="bf16", **lora))
        kept[weights] = live_by_category(stream, stream.moments["forward_1"])
    assert kept["fp16"]["layer_inputs"] == 4 * 8 * (2 + 1) * 4
    assert kept["bf16"]["layer_inputs"] == 4 * 8 * 2 * 2
    assert kept["fp16"]["embeddings"] == kept["bf16"]["embeddings"] == 4 * 8 * 2


def test_frozen_weights_of_another_16_bit_format_are_cast_for_every_product() -> None:
    """Autocast's copies are kept by the products whose input needs a gradient.

    With LoRA of rank 1 on the last projection alone that is none in the first layer but its second factor (8 numbers),
    every product of the other two and both their factors (16 and 8), and the head.
    """
    shape = tiny_shape()
    lora = {"method": "lora", "rank": 1, "target_modules": ("down_proj",), "outputs_kept": False}
    stream = simulate(setup_of(shape, weights_dtype="bf16", autocast="fp16", **lora))
    copies = live_by_category(stream, stream.moments["forward_1"])["autocast_weights"]
    trained = 8 + 2 * (16 + 8)
    assert copies == 2 * (2 * shape.linear_parameters_per_layer + shape.embedding_parameters + trained)


WINDOWED = {"method": "lora", "rank": 1, "target_modules": ("q_proj",), "attention": "sdpa", "outputs_kept": False}


@pytest.mark.parametrize(("num_heads", "groups", "written_out"), [(4, 2, 4), (2, 1, 0)])
def test_a_window_shorter_than_the_sequence_costs_masks_and_repeated_heads(
    num_heads: int, groups: int, written_out: int
) -> None:
    """sdpa beside a mask: keys and values of H query heads, d = 4 numbers of 2 bytes each a token, beside those of the
    groups, which the KV cache holds, but of a single group none, for it stays a view; and the mask as numbers to add,
    B * S * S in bf16, kept by every layer that slides. All layers share one mask of bytes, gone when the decoder
    returns.
    """
    batch, length, layers = 2, 64, 3
    kept = {}
    for window in (0, length):
        shape = tiny_shape(window=window, num_heads=num_heads, num_kv_heads=groups)
        stream = simulate(setup_of(shape, batch_size=batch, seq_len=length, **WINDOWED))
        kept[window] = live_by_category(stream, stream.moments["forward_1"])
    repeated = 2 * batch * length * written_out * 4 * 2
    assert kept[length]["attention"] - kept[0]["attention"] == layers * (repeated + batch * length**2 * 2)
    at = {window: sum(kept[window].values()) for window in kept}
    assert at[length] - at[0] == layers * (repeated + batch * length**2 * 2)


def test_only_layers_that_slide_pay_for_the_window() -> None:
    one = tiny_shape(window=8, sliding_layers=(False, True, False))
    every, none = tiny_shape(window=8), tiny_shape()
    held = [
        live_by_category(stream, stream.moments["forward_1"])["attention"]
        for stream in (simulate(setup_of(shape, seq_len=8, **WINDOWED)) for shape in (none, one, every))
    ]
    assert held[2] - held[0] == 3 * (held[1] - held[0]) > 0
    longer = simulate(setup_of(tiny_shape(window=9), seq_len=8, **WINDOWED))
    assert live_by_category(longer, longer.moments["forward_1"])["attention"] == held[0]


def test_meft_is_not_simulated_here() -> None:
    with pytest.raises(ValueError, match="its own ledger"):
        simulate(setup_of(method="meft"))


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "names", "expected"),
    [
        ("llama-7b", ["q_proj", "v"], ("q_proj", "v_proj")),
        ("llama-7b", ["attention"], ATTENTION),
        ("gpt2", ["all-linear"], ("c_attn", "c_proj", "c_fc")),
        ("mistral-7b", ["q_proj", "c_attn"], ("q_proj",)),
        ("phi-3-mini-4k", ["ffn"], ("gate_up_proj", "down_proj")),
    ],
)
def test_targets(model: str, names: list[str], expected: tuple[str, ...]) -> None:
    assert resolve_targets(load_model(model)[0], names) == expected


# --- properties -----------------------------------------------------------------------------------------------------

shapes = st.sampled_from(
    [
        tiny_shape(),
        tiny_shape(num_layers=1),
        tiny_shape(model_type="gpt2", norm="layernorm", gated_mlp=False, activation="gelu_new", num_kv_heads=2),
        tiny_shape(model_type="phi", norm="layernorm", norms_per_layer=1, gated_mlp=False, parallel_blocks=True),
        tiny_shape(model_type="gemma2", norms_per_layer=4, logit_softcap=True),
        tiny_shape(model_type="qwen3", head_norms_per_layer=2),
        tiny_shape(model_type="phi3"),
    ]
)
METHODS = ("full", "lora", "qlora", "parallel-adapter")


@st.composite
def setups(draw: st.DrawFn) -> TrainingSetup:
    shape, method = draw(shapes), draw(st.sampled_from(METHODS))
    lora = method in ("lora", "qlora")
    fused = ("lora",) if lora and applies(shape, "lora") else ()
    return setup_of(
        shape,
        method=method,
        rank=draw(st.integers(1, 4)) if lora else None,
        target_modules=draw(st.sampled_from([module_names(shape)[:1], module_names(shape)])) if lora else (),
        adapter_width=draw(st.integers(1, 64)) if method == "parallel-adapter" else None,
        weights_dtype="nf4" if method == "qlora" else draw(st.sampled_from(["fp32", "bf16"])),
        double_quant=method == "qlora" and draw(st.booleans()),
        kbit_preparation=method == "qlora" and draw(st.booleans()),
        autocast=draw(st.sampled_from(["none", "bf16"])),
        adapter_dtype=draw(st.sampled_from(["fp32", "bf16"])),
        batch_size=draw(st.integers(1, 3)),
        seq_len=draw(st.integers(1, 40)),
        grad_accum=draw(st.integers(1, 3)),
        activation_checkpointing=draw(st.booleans()),
        attention=draw(st.sampled_from(["sdpa", "flash", "eager"])),
        optimizer=draw(st.sampled_from(get_args(OptimizerName))),
        loss=draw(st.sampled_from(sorted(LOSS_KINDS))),
        kernels=draw(st.sampled_from([(), resolve_kernels(shape, ["liger"]), fused])),
        reentrant=draw(st.sampled_from([None, True, False])),
        padded=draw(st.booleans()),
        outputs_kept=draw(st.booleans()),
    )


def peak(setup: TrainingSetup) -> int:
    return requested_peak(simulate(setup))


@settings(max_examples=60)
@given(setups())
def test_peaks_grow_with_batch_sequence_and_size(setup: TrainingSetup) -> None:
    here = peak(setup)
    assert peak(setup.model_copy(update={"batch_size": setup.batch_size + 1})) >= here
    assert peak(setup.model_copy(update={"seq_len": setup.seq_len + 1})) >= here
    for name in ("rank", "adapter_width"):
        value = getattr(setup, name)
        if value is not None:
            assert peak(setup.model_copy(update={name: value + 1})) >= here


@settings(max_examples=60)
@given(setups(), st.data())
def test_no_category_lowers_the_peak_and_reserved_covers_allocated(setup: TrainingSetup, data: st.DataObject) -> None:
    stream = simulate(setup)
    categories = sorted({event.category for event in stream.events if event.num_bytes > 0})
    assert requested_peak(stream, data.draw(st.sampled_from(categories))) <= requested_peak(stream)
    peaks = stream_peaks(stream)
    assert peaks.requested_bytes <= peaks.allocated_bytes <= peaks.reserved_bytes
    assert requested_peak(stream) == peaks.requested_bytes
    assert all(ledger.rounding_bytes >= 0 for ledger in peaks.ledger.values())


@settings(max_examples=30)
@given(setups())
def test_a_setup_survives_json_and_gives_the_same_stream(setup: TrainingSetup) -> None:
    again = TrainingSetup.model_validate_json(setup.model_dump_json())
    assert again == setup
    assert simulate(again) == simulate(setup)


def test_the_last_step_repeats_the_one_before() -> None:
    """What is alive after the second step is what was alive after the first: nothing leaks."""
    stream = simulate(setup_of(method="lora", rank=2, target_modules=("q_proj",)))
    first, second = (live_by_category(stream, stream.moments[f"optimizer_step_{step}"]) for step in (1, 2))
    assert first | {"cublas_workspaces": 0} == second | {"cublas_workspaces": 0}


def test_a_stream_that_makes_no_sense_is_refused() -> None:
    come = StreamEvent(1, 8, "forward", "x")
    with pytest.raises(ValueError, match="comes twice"):
        stream_peaks(Stream((come, come)))
    with pytest.raises(ValueError, match="never came"):
        stream_peaks(Stream((StreamEvent(1, -8, "forward", "x"),)))
