"""What works with which family: every causal LM of the installed transformers, tiny, planned, traced and run.

    python scripts/families.py [TYPE ...] [--again] [--folder build/families] [--output docs/families.md]

For each model type a config of two layers and 64 numbers is made. It is planned for the emulated device, its step is
traced as on CUDA, and the plan is run there with random weights: two windows, the peak against the prediction. A fresh
adapter must change no logit, and none is left changed when it has been detached. Each type has a process of its own
and a time limit; what was found is kept in the folder, so that a run that was cut short goes on, and ``--again`` does
all anew. State-space models, whose blocks have no attention and no FFN, are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 180
"""A type's time limit."""
STATE_SPACE = ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm")
SEQ_LEN = 32
WITHIN = 0.03
"""How far a run's peak may be from the plan's."""

_WIDTHS = {
    64: "hidden_size d_model n_embd n_embed dim emb_dim embedding_size embed_dim dim_model lru_width",
    128: "intermediate_size ffn_dim n_inner d_ff inner_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff "
    "feed_forward_size block_ffn_dim intermediate_size_mlp prefix_dense_intermediate_size dense_intermediate_size "
    "max_position_embeddings n_positions max_sequence_length max_seq_len n_ctx",
    512: "vocab_size vocab_size_per_layer_input",
    64 // 2: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size",
    16: "head_dim dim_head q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim hidden_size_per_layer_input "
    "linear_key_head_dim linear_value_head_dim mamba_d_state mamba_dt_rank qk_rope_head_dim",
    8: "rotary_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_decoder_attention_heads num_encoder_attention_heads num_local_experts n_routed_experts moe_num_experts",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers eos_token_id "
    "num_encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok moe_k top_k_experts moe_topk "
    "num_experts_per_token",
    1: "n_group topk_group moe_num_shared_experts n_shared_experts bos_token_id",
    0: "pad_token_id",
}
SMALL = {name: value for value, names in _WIDTHS.items() for name in names.split()}
"""Fields of configs, by the size they have here."""
TEXT_PARTS = ("text_config", "decoder", "language_config")
_VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"is_decoder": True, "num_hidden_layers": 2, "attn_layers": ["local", "local"]},
    "zaya": {"num_experts_per_tok": 1},
    "dbrx": {
        "n_kv_heads": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["full_attention", "full_attention"]},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gemma3": {
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "image_size": 28,
            "num_attention_heads": 4,
        }
    },
}
"""What a type needs besides."""


@dataclass(frozen=True)
class Found:
    """What works with one type; ``why`` says what did not, in the words of the error."""

    model_type: str
    parameters: int = 0
    answered: str = ""
    plan: bool = False
    trace: bool = False
    run: bool = False
    attach: bool = False
    detach: bool = False
    counts_equal: bool = False
    peak_ratio: float = 0.0
    """The run's peak over the plan's."""
    why: str = ""


def causal_types() -> list[str]:
    """Model types of the installed transformers that may have an FFN beside which an adapter sits."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(STATE_SPACE))


def tiny_config(model_type: str) -> dict[str, Any]:
    """The config of a tiny model of a type, as its ``config.json`` would have it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from meft.planner.models.catalogue import text_part

    config_class = CONFIG_MAPPING[model_type]
    usual = config_class()
    fields = _small_fields(usual)
    for part in TEXT_PARTS:
        inner: Any = getattr(usual, part, None)
        if hasattr(inner, "to_dict"):
            fields[part] = {"model_type": inner.model_type, **_small_fields(inner)}
    made: dict[str, Any] = json.loads(config_class(**fields | OWN.get(model_type, {})).to_json_string(use_diff=False))
    made.pop("time_step_limit", None)  # a pair with an infinity, which JSON has none of; it is the default
    return text_part(made | {"model_type": model_type})


def _small_fields(config: Any) -> dict[str, Any]:
    there = config.to_dict()
    fields = {name: value for name, value in SMALL.items() if name in there}
    if "kv_lora_rank" in there and "num_key_value_heads" in there:  # latent attention: each head has its key
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return fields


# --- one type --------------------------------------------------------------------------------------------------------


def examine(model_type: str) -> Found:
    """Everything with one type, as far as it goes."""
    found = Found(model_type)
    for stage in (_built, _planned, _traced, _ran):
        try:
            found = stage(found)
        except Exception as error:  # noqa: BLE001 - whatever a family's own code raises is what this is about
            return replace(found, why=_first_line(error))
    return found


def _built(found: Found) -> Found:
    from meft.runtime.session.measure import empty_model

    model = empty_model(tiny_config(found.model_type), name=found.model_type)
    return replace(found, parameters=model.num_parameters())


def _planned(found: Found) -> Found:
    from meft.planner.front.traced import answered_by

    plan = _plan(found.model_type)
    shape = plan.request.model
    equal = shape.num_parameters == found.parameters
    if not equal:
        raise ValueError(f"the plan counts {shape.num_parameters:,} parameters, the class has {found.parameters:,}")
    return replace(found, answered=answered_by(plan.request), plan=True, counts_equal=equal)


def _plan(model_type: str) -> Any:
    from meft.planner.base.errors import Infeasible
    from meft.planner.front.options import RequestOptions
    from meft.planner.front.plan import find_plan

    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent) / model_type)
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text(json.dumps(tiny_config(model_type)))
        options = {"seq_len": SEQ_LEN, "grad_accum": 1, "adapter_width": 64, "top_k": 4, "min_trainable": 0.0}
        budgets = {"gpu": "emulated", "gpu_mem": 1 << 32, "host_mem": 1 << 30, "max_slowdown": 1000.0}
        chosen = {"routing": "exact", "activation_checkpointing": False}
        planned = find_plan(RequestOptions(model=folder, **options, **budgets, **chosen))  # type: ignore[arg-type]
    if isinstance(planned, Infeasible):
        raise ValueError(planned.message)
    return planned.plan


def _traced(found: Found) -> Found:
    from meft.planner.simulation.stream import stream_peaks
    from meft.runtime.trace.verify import verify_plan

    stream = verify_plan(_plan(found.model_type), tiny_config(found.model_type))
    return replace(found, trace=stream_peaks(stream).allocated_bytes > 0)


def _ran(found: Found) -> Found:
    """Bare logits, a session with a fresh adapter, two windows of it, and the model without it again."""
    import torch

    from meft.runtime.data.examples import Batch
    from meft.runtime.device.device import EmulatedDevice
    from meft.runtime.session.model_loading import model_from_config
    from meft.runtime.session.session import WindowEnd, open_session

    plan = _plan(found.model_type)
    torch.manual_seed(0)
    model = model_from_config(plan, tiny_config(found.model_type))
    ids = torch.randint(3, 500, (plan.request.batch_size, SEQ_LEN))
    bare = _logits(model, ids)
    device = EmulatedDevice(plan.request.gpu_mem_bytes)
    session = open_session(plan, model, device, seed=0, compiled=False)
    device.books.adopt(ids)
    with session.device.scope():
        fresh = _logits(model, ids)
    found = replace(found, attach=bool(torch.equal(fresh, bare)))
    del fresh
    model.train()
    session.device.reset_peaks()
    for _ in range(2):
        batch = Batch(ids.clone(), torch.ones_like(ids), ids.clone())
        result = session.step(batch, loss_scale=1.0, window_end=WindowEnd(1e-3, 1.0))
        session.optimizer_step(learning_rate=1e-3, max_norm=1.0)
    session.drain()
    peak = session.device.peaks().allocated_bytes
    ratio = peak / plan.prediction.device_memory.peak_allocated_bytes
    session.close()
    session.adapter.detach()
    detached = bool(torch.equal(_logits(model, ids), bare))
    found = replace(found, run=bool(result.loss == result.loss), detach=detached, peak_ratio=round(ratio, 4))
    if not found.attach:
        return replace(found, why="a fresh adapter changes the logits")
    return found if abs(ratio - 1) <= WITHIN else replace(found, why=f"its run takes {ratio:.3f} of the plan's peak")


def _logits(model: Any, ids: Any) -> Any:
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.clone()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# --- all of them -----------------------------------------------------------------------------------------------------


def examined(model_types: Iterable[str], folder: Path, *, again: bool = False) -> list[Found]:
    """Every type, from the folder where it is there; each in a process forked from this one."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MEFT_CACHE", str(folder.resolve() / "cache"))
    for name in ("transformers", "meft.runtime.trace.verify"):
        __import__(name)
    results = []
    for model_type in model_types:
        path = folder / f"{model_type}.json"
        if again or not path.exists():
            _examine_apart(model_type, path)
        results.append(Found(**json.loads(path.read_text())))
    return results


def _examine_apart(model_type: str, path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_write_found, args=(model_type, path))
    path.write_text(json.dumps(asdict(Found(model_type, why=f"it was not done within {SECONDS} s, or died"))))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def _write_found(model_type: str, path: Path) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path.write_text(json.dumps(asdict(examine(model_type))))


def table(results: Iterable[Found]) -> str:
    """The table in Markdown."""
    lines = ["| model type | memory by | plan | trace | run | attach | detach | peak of run / plan | why not |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for found in results:
        marks = ("yes" if each else "-" for each in (found.plan, found.trace, found.run, found.attach, found.detach))
        ratio = f"{found.peak_ratio:.3f}" if found.run else ""
        cells = (f"`{found.model_type}`", found.answered or "-", *marks, ratio, found.why.replace("|", "\\|"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document(results: list[Found], versions: Mapping[str, str]) -> str:
    """docs/families.md, from its head and the table."""
    whole = [found for found in results if found.plan and found.trace and found.run and found.detach and not found.why]
    closed = sum(found.answered == "closed form" for found in whole)
    counts = {"whole": len(whole), "all": len(results), "closed": closed, "traced": len(whole) - closed}
    return HEAD.format(**counts, **versions, within=WITHIN) + table(results) + "\n"


HEAD = """# Families

- [Closed form, or the real code](#closed-form-or-the-real-code)
- [Weights stored quantized](#weights-stored-quantized)
- [Every type](#every-type)

## Closed form, or the real code

For {closed} model types a closed form says what a plan needs, without torch. Of any other causal LM that transformers
builds, the shape (layers, sizes, parameters, those that a token meets) is read from the real class on the meta device,
and memory comes from traces of its own code under fake tensors: two, at the batch size and one sequence more, give the
search its terms, and the decision that it prefers is traced itself, so that the plan's peak is that trace. `meft-plan`
says which of the two answered.

Both are kept in the cache by a digest of the config: the shape once, the terms for each sequence length, dtype and
attention. What is there needs no torch again, at any batch size (then the decision itself is not traced); what is not
asks for `pip install 'meft[run]'`. `meft-plan estimate` traces each dense method; `compare`, which would trace
hundreds, is for closed forms.

Blocks and FFNs are found by structure: the largest list of blocks of the text decoder, never a vision tower's, and in
each block the child that works on the hidden size and is no attention. A mixture of experts is one FFN: the adapter is
added to its output, to the first of a tuple. Qwen3-MoE is counted by closed form and traced. Of Gemma 3 with images the
text part is planned, loaded and trained alone. Refused, with the reason: blocks without an FFN module (OPT's `fc1` and
`fc2`, BERT's), code that looks at numbers, which a trace does not have, and folders that bring code of their own.

## Weights stored quantized

`quantization_config` is read; such a folder is planned and estimated as it is stored, and another `--weights-dtype` is
refused.

| stored by | counted | runs with |
|---|---|---|
| bitsandbytes, 4 bits (doubly quantized too) | half a byte, and scales per 64 | bitsandbytes; CUDA or emulated |
| bitsandbytes, 8 bits | a byte, and a scale per output | bitsandbytes; CUDA |
| AWQ, GPTQ | packed int32, a scale and a zero point per group, GPTQ's order | gptqmodel; CUDA |
| FP8 | a byte, and a scale per block or tensor | CUDA |
| compressed-tensors: int 4, int 8, float 8 | packed or a byte, and scales | compressed-tensors; CUDA |

Embeddings, head, norms, and what the config leaves out stay in 16 bits. Where the library or the device is missing, a
run is refused before data is read. The CUDA paths of all but bitsandbytes' 4 bits have never run; other methods, and
formats of families without a closed form (but bitsandbytes' 4 bits), are refused.

## Every type

Every causal LM of transformers {transformers} but the state-space ones ({all} model types), tiny and with random
weights, by `python scripts/families.py --output docs/families.md`: {whole} are planned, traced and run, {closed} of
them with memory by closed form and {traced} by traces. `run` trains two windows on the emulated device; its peak of
allocated bytes stands beside the plan's, and more than {within:.0%} between them is a fault. `attach`: a fresh adapter
changes no logit; `detach`: none is changed after training once the adapter is gone. Counts are those of the class on
the meta device wherever `plan` says yes.

"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "families")
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    import transformers

    results = examined(given.types or causal_types(), given.folder, again=given.again)
    if given.output is not None:
        given.output.write_text(document(results, {"transformers": transformers.__version__}))
    else:
        print(table(results))


if __name__ == "__main__":
    main()
