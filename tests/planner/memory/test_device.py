"""MEFT's device-memory ledger: sizes counted by hand, and properties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_records import GIB, decision_of, gpu_profile, llama_7b, request_of, side_by_side, sourced, tiny_shape

from meft.planner.memory.device import (
    counted_bytes,
    device_ledger,
    peak_allocated_bytes,
    predict_device_memory,
    weights_rounding_bytes,
)
from meft.planner.memory.replayed import replayed_peaks
from meft.planner.models.catalogue import load_model, model_names
from meft.planner.records.candidates import Candidates
from meft.planner.records.profiles import SourcedRange
from meft.planner.simulation import run
from meft.planner.simulation.run import loaded_rounding_bytes
from meft.planner.terms import activations as act
from meft.planner.terms import adapter as ada
from meft.planner.terms import weights as wts
from meft.planner.terms.ledger import STEP_PHASES, Row, peak_bytes, phase_bytes
from meft.planner.terms.methods import SparseAdapter, Workload


def sparse(**changes) -> SparseAdapter:
    """Three layers with five active rows each, fetched again in backward, exact routing, bf16."""
    chosen = Candidates(
        adapter_width=100,
        top_k=1,
        active_rows_cap=6,
        prefetch_depth=0,
        retained=False,
        key_experts=False,
        num_experts=1,
        num_probes=1,
        activation_checkpointing=False,
    )
    return changed(SparseAdapter(np.array([5, 5, 5], dtype=np.int64), chosen, adapter_bytes=2), **changes)


def changed(method: SparseAdapter, **changes) -> SparseAdapter:
    """The method with other fields of its own, or of what is chosen."""
    own = {name: changes.pop(name) for name in ("active_rows", "adapter_bytes") if name in changes}
    return replace(method, candidates=replace(method.candidates, **changes), **own)


def tiny_workload(**changes) -> Workload:
    return Workload(**({"batch_size": 1, "seq_len": 4} | changes))


def sizes(ledger: tuple[Row, ...], phase: str) -> dict[str, int]:
    return {row.category: row.num_bytes for row in ledger if row.phase == phase and row.num_bytes}


# --- by hand --------------------------------------------------------------------------------------------------------
# tiny_shape: L=3, D=8, I=16, H=2, G=1, d=4, V=32, untied, gated; here B=1, S=4, so T=4; bf16, q=e=2.


def test_resident_rows_of_a_tiny_model() -> None:
    rows = sizes(device_ledger(shape=tiny_shape(), workload=tiny_workload(), method=sparse()), "resident")
    assert rows == {
        # per layer q 8x8, k 8x4, v 8x4, o 8x8, gate, up, down 8x16: 64+32+32+64+3*128 = 576; 3 layers, 2 bytes
        "linear_weights": 3 * 576 * 2,
        # embedding and head 32*8 each, two norms per layer and the final one: 512 + 7*8 = 568
        "other_weights": 568 * 2,
        "rotary_frequencies": 2 * 2 * 4,
        # up to blocks of 512: per layer q, o 384 each, k, v 448 each, gate, up, down 256 each, two norms 496 each;
        # the final norm 496, two buffers of frequencies 504 each
        "block_rounding": 3 * (2 * 384 + 2 * 448 + 3 * 256 + 2 * 496) + 496 + 2 * 504,
        "inputs": 2 * 8 * 4,
        "row_staging": 1 * 6 * 2 * 8 * 2,
        "row_gradients": 1 * 6 * 2 * 8 * 2,
    }


def test_what_a_tiny_model_keeps_for_backward() -> None:
    rows = sizes(device_ledger(shape=tiny_shape(), workload=tiny_workload(), method=sparse()), "loss")
    assert rows == {
        # layers 1 and 2 (layer 0's input needs no gradient): two norms of fp32 [4, 8] and a factor per token
        "norms": 2 * 2 * 4 * (8 * 4 + 4),
        # q and output of 2 heads, k and v of 1: 6 * 4 numbers of 2 bytes per token, log-sum-exp 2 * 4
        "attention": 2 * 4 * (6 * 4 * 2 + 2 * 4),
        # gate, SiLU(gate), up
        "ffn": 2 * 4 * 3 * 16 * 2,
        # all three layers: the input [4, 8] and the activations [4, 5]
        "adapter": 3 * 4 * (8 + 5) * 2,
        "rotary_tables": 2 * 4 * 4 * 2,
        "final_norm": 4 * (8 * 4 + 4),
        "loss_chain": 12 * 4 * 32,
    }


def test_backward_of_a_tiny_model_at_its_worst_moment() -> None:
    rows = sizes(device_ledger(shape=tiny_shape(), workload=tiny_workload(), method=sparse()), "backward")
    # with [4, 8] in bf16 = 64 bytes, [4, 16] = 128, [4, 5] = 40, an fp32 [4, 8] = 128:
    # final norm: its input 4*36 = 144 and 5 * 128 = 784; adapter: 64 + 2*40 + 64 = 208;
    # FFN: 2*64 + 3*128 less the last adapter's 64+40 = 408; attention: 64 + 4*64 less 104, 3*128 and 144 < 0
    assert rows["backward_temporaries"] == 784


def test_backward_of_a_tiny_checkpointed_model() -> None:
    workload = tiny_workload(activation_checkpointing=True)
    rows = sizes(device_ledger(shape=tiny_shape(), workload=workload, method=sparse()), "backward")
    # one recomputed layer: norms 288, attention 224, ffn 384, adapter 104, together 1000, beside three inputs of 64;
    # the final norm's moment is before that: 784 - 1000 < 0, so the FFN's is the worst: 2*64 + 384 - 104 = 408
    assert rows == {
        "norms": 288,
        "attention": 224,
        "ffn": 384,
        "adapter": 104,
        "layer_inputs": 3 * 64,
        "rotary_tables": 64,
        "backward_temporaries": 408,
    }


def test_the_peak_is_resident_and_the_largest_phase() -> None:
    ledger = device_ledger(shape=tiny_shape(), workload=tiny_workload(), method=sparse())
    # loss: norms 576 + attention 448 + ffn 768 + adapter 312 + rotary 64 + final norm 144 + chain 1536 = 3848
    # backward: 576 + 448 + 768 + 312 + 64 + 784 = 2952
    totals = phase_bytes(ledger)
    assert (totals["loss"], totals["backward"]) == (3848, 2952)
    # resident: 3456 + 1136 + 16 + 11776 + 64 + 192 + 192 = 16832
    assert peak_bytes(ledger) == 16832 + 3848


def test_fp32_keeps_the_norms_input_itself_so_a_recomputed_layer_shares_it() -> None:
    workload = tiny_workload(weights_dtype="fp32", activation_checkpointing=True)
    rows = sizes(device_ledger(shape=tiny_shape(), workload=workload, method=sparse(adapter_bytes=4)), "backward")
    assert rows["layer_inputs"] == 2 * 4 * 8 * 4  # the third is the recomputed layer's first norm's input


def test_eager_attention_keeps_probabilities_twice_below_fp32() -> None:
    workload = tiny_workload(attention="eager")
    rows = sizes(device_ledger(shape=tiny_shape(), workload=workload, method=sparse()), "loss")
    # q, k, v of 2 heads, and per head 4 probabilities in fp32 and bf16
    assert rows["attention"] == 2 * 4 * (2 * 3 * 4 * 2 + 2 * 4 * (4 + 2))
    fp32 = device_ledger(
        shape=tiny_shape(), workload=replace(workload, weights_dtype="fp32"), method=sparse(adapter_bytes=4)
    )
    assert sizes(fp32, "loss")["attention"] == 2 * 4 * (2 * 3 * 4 * 4 + 2 * 4 * 4)


def test_cached_rows_and_the_sums_of_their_gradients() -> None:
    method = sparse(cached_rows=9, gradients_on_device=True)
    resident = sizes(device_ledger(shape=tiny_shape(), workload=tiny_workload(), method=method), "resident")
    assert resident["kept_rows"] == 3 * 9 * 2 * 8 * 2
    assert resident["gradient_sums"] == (3 * 9 + 256) * 2 * 8 * 4  # fp32, and 256 rows to cast bf16 gradients in
    assert resident["row_indices"] == 3 * 6 * 4
    fp32 = device_ledger(shape=tiny_shape(), workload=tiny_workload(), method=sparse(cached_rows=9, adapter_bytes=4))
    assert "gradient_sums" not in sizes(fp32, "resident")


def test_key_experts_adds_routers_gates_and_routing() -> None:
    method = sparse(key_experts=True, num_experts=3, num_probes=2)
    ledger = device_ledger(shape=tiny_shape(), workload=tiny_workload(), method=method)
    resident, loss = sizes(ledger, "resident"), sizes(ledger, "loss")
    assert (resident["router_weights"], resident["router_moments"]) == (3 * 3 * 8 * 4, 2 * 3 * 3 * 8 * 4)
    assert loss["adapter"] == 3 * 4 * (8 + 5 + 3) * 2  # gate scores [4, 3] beside input and activations
    assert loss["routing"] == 3 * (4 * 2 * 4)  # int32 probes [4, 2] per layer
    assert resident["row_indices"] == 3 * 6 * 4  # int32 expert of up to 6 rows per layer


@pytest.mark.parametrize(
    ("depth", "retained", "staging", "gradients"),
    [(0, False, 1, 1), (1, False, 2, 2), (5, False, 3, 2), (0, True, 3, 1), (2, True, 3, 2)],
)
def test_ring_buffers(depth: int, retained: bool, staging: int, gradients: int) -> None:
    method = sparse(prefetch_depth=depth, retained=retained)
    rows = sizes(device_ledger(shape=tiny_shape(), workload=tiny_workload(), method=method), "resident")
    buffer = 6 * 2 * 8 * 2
    assert (rows["row_staging"], rows["row_gradients"]) == (staging * buffer, gradients * buffer)


def test_a_model_of_one_layer_has_one_gradient_buffer_and_keeps_only_its_adapter() -> None:
    method = sparse(active_rows=np.array([5], dtype=np.int64), prefetch_depth=3)
    ledger = device_ledger(shape=tiny_shape(num_layers=1), workload=tiny_workload(), method=method)
    assert sizes(ledger, "resident")["row_gradients"] == 192
    kept = {"norms", "attention", "ffn", "adapter"} & set(sizes(ledger, "loss"))
    assert kept == {"adapter"}


def test_layers_with_different_active_rows_are_summed_and_the_most_is_what_one_needs() -> None:
    uneven = sparse(active_rows=np.array([1, 6, 2], dtype=np.int64))
    workload = tiny_workload(activation_checkpointing=True)
    ledger = device_ledger(shape=tiny_shape(), workload=tiny_workload(), method=uneven)
    assert sizes(ledger, "loss")["adapter"] == (3 * 4 * 8 + 4 * (1 + 6 + 2)) * 2
    recomputed = device_ledger(shape=tiny_shape(), workload=workload, method=uneven)
    assert sizes(recomputed, "backward")["adapter"] == 4 * (8 + 6) * 2


def test_an_adapter_in_a_dtype_of_its_own_casts_the_gradient_both_ways() -> None:
    sizes_of = {"tokens": 4, "hidden_size": 8, "active_rows": 5, "num_experts": 1, "num_probes": 1}
    # two [4, 5] and a [4, 8] in fp32; with bf16 hidden states an fp32 and a bf16 [4, 8] more
    same = ada.adapter_backward_bytes(**sizes_of, key_experts=False, e=4, q=4)
    assert same == (2 * 20 + 32) * 4
    assert ada.adapter_backward_bytes(**sizes_of, key_experts=False, e=4, q=2) == same + 32 * (4 + 2)


# --- weights --------------------------------------------------------------------------------------------------------


def test_llama_7b_in_bf16() -> None:
    # 6,738,415,616 parameters, the public count of LLaMA-7B
    ledger = device_ledger(
        shape=llama_7b(),
        workload=Workload(batch_size=2, seq_len=256),
        method=sparse(active_rows=np.full(32, 5, dtype=np.int64)),
    )
    rows = sizes(ledger, "resident")
    assert rows["linear_weights"] + rows["other_weights"] == 6_738_415_616 * 2 == 13_476_831_232


def test_nf4_scales() -> None:
    # 32768 weights: half a byte each, 512 blocks; an fp32 scale each, or 8 bits each and an fp32 scale per 256
    assert wts.nf4_bytes(num_weights=32768, double_quant=False) == 16384 + 512 * 4
    assert wts.nf4_bytes(num_weights=32768, double_quant=True) == 16384 + 512 + 2 * 4


def test_quantization_touches_the_linear_layers_only() -> None:
    shape = tiny_shape()
    assert wts.linear_weights_bytes(shape, dtype="int8", double_quant=False) == 3 * 576 + 3 * 4 * (8 + 4 + 4 + 8 + 40)
    assert wts.other_weights_bytes(shape, dtype="nf4") == 568 * 2
    assert wts.dequantized_bytes(shape, dtype="nf4") == 8 * 16 * 2
    assert wts.dequantized_bytes(shape, dtype="bf16") == 0


# --- architectures --------------------------------------------------------------------------------------------------


def test_what_other_architectures_keep() -> None:
    one_norm = act.norm_saved_bytes(tokens=4, width=8, layernorm=True, compute_bytes=2)
    assert one_norm == 4 * (8 * 2 + 2 * 4)
    gpt = tiny_shape(norm="layernorm", gated_mlp=False, activation="gelu_new", model_type="gpt2", num_kv_heads=2)
    ledger = device_ledger(shape=gpt, workload=tiny_workload(), method=sparse())
    # gelu_new is written out: its input, half of it, tanh, 1 + tanh
    assert sizes(ledger, "loss")["ffn"] == 2 * 4 * 4 * 16 * 2
    gemma = tiny_shape(model_type="gemma2", norms_per_layer=4, logit_softcap=True)
    rows = sizes(device_ledger(shape=gemma, workload=tiny_workload(), method=sparse()), "loss")
    # three norms before the FFN in two layers, one behind it in all three; the logits' tanh
    assert rows["norms"] == (2 * 3 + 3) * 4 * 36
    assert rows["logit_softcap"] == 4 * 32 * 2


# --- the record -----------------------------------------------------------------------------------------------------


def test_the_record_of_a_plan() -> None:
    context = SourcedRange(low_bytes=300, high_bytes=2 * GIB, basis="measured", source="a test")
    card = gpu_profile(context=context, workspace_bytes=sourced(1000))
    memory = predict_device_memory(request=request_of(), decision=decision_of(), gpu=card)
    by_phase = {phase: sum(e.num_bytes for e in memory.entries if e.phase == phase) for phase in STEP_PHASES}
    resident = sum(entry.num_bytes for entry in memory.entries if entry.phase == "resident")
    assert memory.peak_phase == max(by_phase, key=by_phase.__getitem__) == "loss"
    assert memory.peak_allocated_bytes == resident + by_phase["loss"]
    assert {entry.place for entry in memory.entries} == {"device"}
    assert [e.num_bytes for e in memory.entries if e.category == "cublas_workspaces"] == [2000]
    (small,) = [e.num_bytes for e in memory.entries if e.category == "block_remainders"]
    assert 0 < small < 100_000
    # replayed: 32 layers of rows at the cap, 13.5 GB of weights, and what the blocks between them leave over
    replayed = replayed_peaks(request_of(), decision_of(), card)
    assert memory.peak_allocated_bytes == replayed.allocated_bytes
    assert memory.peak_reserved_bytes == replayed.reserved_bytes
    assert memory.reserved_basis == "counted"
    assert memory.peak_reserved_bytes % (2 << 20) == 0  # whole segments
    assert memory.allocator_budget_bytes == 22 * GIB
    assert memory.process_bytes.high_bytes == memory.peak_reserved_bytes + 2 * GIB


def test_what_is_as_large_as_the_active_rows_lies_in_memory_for_the_cap() -> None:
    # 64 rows of cap more: [512, 64] in 32 layers, and buffers [64, 8192], 32 of rows and one of gradients; bf16
    counted = [
        counted_bytes(request=request_of(), decision=decision_of(active_rows_cap=cap), gpu=gpu_profile())
        for cap in (2048, 2112)
    ]
    assert counted[1] - counted[0] == 32 * 512 * 64 * 2 + 33 * 64 * 8192 * 2


def test_a_buffer_keeps_the_remainder_of_its_segment() -> None:
    # rows [2112, 8192] in bf16 are 33 MiB: a segment of 34, whose last MiB is not split off and counts as allocated
    request, decision = request_of(), decision_of(active_rows_cap=2112)
    memory = predict_device_memory(request=request, decision=decision, gpu=gpu_profile())
    (remainders,) = [entry.num_bytes for entry in memory.entries if entry.category == "block_remainders"]
    assert 33 << 20 <= remainders < 34 << 20


def test_while_weighing_reserved_is_no_more_than_allocated() -> None:
    weighed = predict_device_memory(request=request_of(), decision=decision_of(), gpu=gpu_profile(), replayed=False)
    counted = counted_bytes(request=request_of(), decision=decision_of(), gpu=gpu_profile())
    assert weighed.peak_reserved_bytes == weighed.peak_allocated_bytes == counted


# --- properties -----------------------------------------------------------------------------------------------------

workloads = st.builds(
    Workload,
    batch_size=st.integers(1, 8),
    seq_len=st.integers(1, 64),
    weights_dtype=st.sampled_from(["fp32", "bf16", "nf4"]),
    attention=st.sampled_from(["sdpa", "flash", "eager"]),
    activation_checkpointing=st.booleans(),
)
adapters = st.builds(
    sparse,
    active_rows=st.lists(st.integers(0, 50), min_size=3, max_size=3).map(lambda rows: np.array(rows, dtype=np.int64)),
    active_rows_cap=st.integers(50, 100),
    prefetch_depth=st.integers(0, 4),
    retained=st.booleans(),
    key_experts=st.booleans(),
    num_experts=st.integers(1, 16),
    num_probes=st.integers(1, 4),
    adapter_bytes=st.sampled_from([2, 4]),
)
shapes = st.sampled_from(
    [
        tiny_shape(),
        tiny_shape(num_layers=1),
        tiny_shape(vocab_size=2),
        tiny_shape(model_type="gpt2", norm="layernorm", gated_mlp=False, activation="gelu_new", num_kv_heads=2),
        tiny_shape(model_type="phi", norm="layernorm", norms_per_layer=1, gated_mlp=False, parallel_blocks=True),
        tiny_shape(model_type="gemma2", norms_per_layer=4, logit_softcap=True),
        tiny_shape(model_type="qwen3", head_norms_per_layer=2),
    ]
)


def fitted(shape, method):
    """The method with as many layers as the shape."""
    return replace(method, active_rows=method.active_rows[: shape.num_layers])


def peak(shape, workload, method) -> int:
    return int(peak_bytes(device_ledger(shape=shape, workload=workload, method=fitted(shape, method))))


@given(shapes, workloads, adapters)
def test_more_tokens_never_need_less(shape, workload, method) -> None:
    here = peak(shape, workload, method)
    assert peak(shape, replace(workload, batch_size=workload.batch_size + 1), method) > here
    assert peak(shape, replace(workload, seq_len=workload.seq_len + 1), method) > here


@given(shapes, workloads, adapters)
def test_more_of_an_adapter_never_needs_less(shape, workload, method) -> None:
    here, chosen = peak(shape, workload, method), method.candidates
    assert peak(shape, workload, changed(method, active_rows_cap=chosen.active_rows_cap + 1)) > here
    assert peak(shape, workload, changed(method, prefetch_depth=chosen.prefetch_depth + 1)) >= here
    assert peak(shape, workload, replace(method, active_rows=method.active_rows + 1)) >= here
    assert peak(shape, workload, changed(method, num_experts=chosen.num_experts + 1)) >= here
    assert peak(shape, workload, changed(method, key_experts=True)) >= peak(
        shape, workload, changed(method, key_experts=False)
    )


@given(shapes, workloads, adapters, st.data())
def test_a_ledger_has_no_negative_line_and_no_line_that_lowers_the_peak(shape, workload, method, data) -> None:
    ledger = device_ledger(shape=shape, workload=workload, method=fitted(shape, method))
    assert all(row.num_bytes >= 0 for row in ledger)
    assert all(isinstance(row.num_bytes, int) for row in ledger)
    left_out = data.draw(st.integers(0, len(ledger) - 1))
    assert peak_bytes(ledger[:left_out] + ledger[left_out + 1 :]) <= peak_bytes(ledger)


@given(workloads, st.lists(adapters, min_size=1, max_size=5), st.lists(st.booleans(), min_size=5, max_size=5))
def test_arrays_of_candidates_give_what_each_gives_alone(workload, methods, checkpointing) -> None:
    request = request_of(
        model=tiny_shape(),
        batch_size=workload.batch_size,
        seq_len=workload.seq_len,
        attention=workload.attention,
        weights_dtype=workload.weights_dtype,
    )
    methods = [
        changed(method, activation_checkpointing=flag) for method, flag in zip(methods, checkpointing, strict=False)
    ]

    def peak_of(active_rows, candidates):
        return peak_allocated_bytes(request=request, gpu=gpu_profile(), active_rows=active_rows, candidates=candidates)

    together = peak_of(
        np.stack([method.active_rows for method in methods], axis=1),
        side_by_side([method.candidates for method in methods]),
    )
    alone = [peak_of(method.active_rows, method.candidates) for method in methods]
    assert np.broadcast_to(together, len(methods)).tolist() == alone


# --- blocks of the frozen weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "nf4"])
def test_what_blocks_hold_above_the_weights_is_as_loading_is_simulated(dtype) -> None:
    for name in model_names():
        shape, _, _ = load_model(name)
        assert weights_rounding_bytes(shape, dtype, False) == loaded_rounding_bytes(shape, dtype, False), name


@settings(max_examples=300)
@given(
    num_layers=st.sampled_from([3, 6]),
    hidden=st.sampled_from([8, 320, 1000, 2560, 4096]),
    inner=st.sampled_from([16, 500, 1408, 6144]),
    vocab=st.sampled_from([32, 50257, 65536]),
    norm=st.sampled_from(["rmsnorm", "layernorm"]),
    tied=st.booleans(),
    bias=st.booleans(),
)
def test_what_blocks_hold_above_weights_of_any_shape(num_layers, hidden, inner, vocab, norm, tied, bias) -> None:
    sizes_of = {
        "num_layers": num_layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "head_dim": hidden // 2,
    }
    chosen = {"norm": norm, "tied_embeddings": tied, "qkv_bias": bias, "mlp_bias": bias, "head_bias": bias}
    shape = tiny_shape().model_copy(update=sizes_of | chosen)
    assert weights_rounding_bytes(shape, "bf16", False) == loaded_rounding_bytes(shape, "bf16", False)


def test_loading_is_not_simulated_where_every_tensor_gets_a_block_of_its_size(monkeypatch) -> None:
    monkeypatch.setattr(run, "loaded_rounding_bytes", lambda *_: pytest.fail("it was simulated"))
    assert weights_rounding_bytes(llama_7b(), "bf16", False) == 2 * 256  # the rotary frequencies, 64 in fp32
