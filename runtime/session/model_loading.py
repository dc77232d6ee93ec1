"""Frozen models from local folders, in the plan's dtype, checked against the plan's shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meft.planner.base.errors import MeftError, UsageError
from meft.planner.base.kinds import MODEL, refuse_other_path
from meft.planner.base.packages import require_packages
from meft.planner.base.schema import shortened
from meft.planner.models.architecture import ModelShape
from meft.planner.models.catalogue import CONFIG_NAME, how_to_download, is_hub_name, read_config, text_part
from meft.planner.models.shapes import shape_of
from meft.planner.models.stored import StoredMethod
from meft.planner.records.plan import Plan
from meft.runtime.device.device import cuda_out_of_memory
from meft.runtime.session.model_folder import SAFE, load_causal_lm, reading, stored_numbers

_PROBE = "A word, or two."
STORED_DTYPES: dict[str, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""What safetensors calls them."""
COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED_DTYPE = torch.bfloat16
"""What quantized weights are computed in, and what is not quantized is loaded in."""
NF4_BITS, BITS_OF_A_BYTE = 5, 8
"""Of a number at most: four and its share of an fp32 scale for 64, half a bit; rounded up."""
STORED_PACKAGES: dict[StoredMethod, tuple[str, ...]] = {
    "bitsandbytes-4bit": ("bitsandbytes", "accelerate"),
    "bitsandbytes-8bit": ("bitsandbytes", "accelerate"),
    "awq": ("gptqmodel", "accelerate"),
    "gptq": ("gptqmodel", "optimum", "accelerate"),
    "fp8": ("accelerate",),
    "compressed-tensors": ("compressed_tensors", "accelerate"),
}
"""What transformers loads each format with."""
_TEXT_KEYS = {r"^(model\.)?language_model\.model\.": "model.", r"^model\.language_model\.": "model."}
"""Where a wrapper's files have the text decoder's weights."""
ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}


def check_model_folder(plan: Plan, folder: Path) -> None:
    """Raise :class:`UsageError` unless ``folder`` holds a model of the plan's shape."""
    config = read_config(folder / CONFIG_NAME)
    shape = shape_of(text_part(config), name=folder.name)
    check_shape(plan.request.model, shape, where=str(folder))


def existing_folder(reference: str | Path, *, field: str = "--model") -> Path:
    """``reference`` as a folder; a :class:`UsageError` that says where a folder comes from when there is none."""
    folder = Path(reference)
    if folder.is_dir():
        return folder
    refuse_other_path(folder, wanted=MODEL)
    if is_hub_name(str(reference)):
        raise UsageError(
            f"{field} {reference}: no such folder, and nothing is downloaded here; get it first: "
            f"{how_to_download(str(reference))}"
        )
    raise UsageError(f"{field} {reference}: no such folder; give one with config.json and weights")


def check_shape(planned: ModelShape, found: ModelShape, *, where: str) -> None:
    """Raise :class:`UsageError` that lists what differs between the planned model and the one found."""
    differences = planned.differences(found)
    if differences:
        listed = ", ".join(f"{name} {mine} in the plan, {theirs} here" for name, (mine, theirs) in differences.items())
        raise UsageError(f"--model {where}: the plan was made for {planned.name}, which this is not: {listed}")


def load_frozen_model(plan: Plan, folder: Path, *, device_kind: str = "cuda") -> nn.Module:
    """Load the model to host memory in the plan's dtype and attention; quantized weights straight to a CUDA device, but
    those of a base that is sharded, which no device holds whole.

    Of a model of text and images it is the text part, and no more.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = "cpu" if plan.request.shard_base else device_kind
    options = _weight_options(plan, place) | _text_part_options(folder)
    with cuda_out_of_memory(plan.prediction.device_memory.allocator_budget_bytes):
        model = load_causal_lm(folder, attn_implementation=ATTENTION[plan.request.attention], **options)
    for module in model.modules():
        quantized: Any = module
        if hasattr(module, "quant_state") and hasattr(module, "compute_dtype"):
            quantized.compute_dtype = QUANTIZED_DTYPE  # a folder's own is what it was saved with
            if hasattr(module, "support_avx512bf16_for_cpu"):
                quantized.support_avx512bf16_for_cpu = False  # to evaluate it packs its weights anew, for good
    return model


def converted_bytes(plan: Plan, folder: Path) -> int:
    """Host memory that loading the model takes besides its files, which are mapped: what they hold in another dtype is
    converted, tensor by tensor, and stays in host memory until the whole model is on the device.

    Raises:
        UsageError: a file of weights is no whole safetensors file.
    """
    dtype = COMPUTE_DTYPES.get(plan.request.weights_dtype)
    if plan.request.shard_base and plan.request.weights_dtype == "nf4":
        return sum(stored_numbers(folder).values()) * NF4_BITS // BITS_OF_A_BYTE
    if dtype is None or plan.request.model.stored is not None:
        return 0  # quantized weights go to the device one by one
    same = STORED_DTYPES[plan.request.weights_dtype]
    return sum(count * dtype.itemsize for stored, count in stored_numbers(folder).items() if stored != same)


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer, or a :class:`UsageError`."""
    from transformers import AutoTokenizer

    with reading(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **SAFE)
        tokenizer.decode(tokenizer.encode(_PROBE), skip_special_tokens=True)  # some damage shows only in use
        return tokenizer


def check_token_ids(sequences: Iterable[Sequence[int]], vocab_size: int, *, where: str) -> None:
    """Raise :class:`UsageError` unless the model's vocabulary has every token; ``where`` says where they are from."""
    for number, ids in enumerate(sequences, 1):
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            wrong = max(ids) if max(ids) >= vocab_size else min(ids)
            raise UsageError(
                f"{where}, sequence {number}: token {wrong}, but the model's vocabulary has {vocab_size:,} tokens "
                f"(0 to {vocab_size - 1:,}); is the tokenizer that of another model?"
            )


def model_from_config(plan: Plan, config: dict[str, Any]) -> nn.Module:
    """The architecture with uninitialised weights, for a rehearsal under fake tensors.

    Raises:
        UsageError: the plan's weights are quantized, which needs numbers, or transformers cannot build the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    request = plan.request
    if request.weights_dtype not in COMPUTE_DTYPES or request.model.stored is not None:
        how = request.model.stored.title if request.model.stored is not None else request.weights_dtype
        raise UsageError(f"{request.model.name}: weights in {how} have no rehearsal on the emulated device")
    options = dict(config)
    dtype = COMPUTE_DTYPES[plan.request.weights_dtype]
    with building(request.model.name):
        made = AutoConfig.for_model(options.pop("model_type"), **options)
        model: nn.Module = AutoModelForCausalLM.from_config(
            made, dtype=dtype, attn_implementation=ATTENTION[plan.request.attention], trust_remote_code=False
        )
    return model


@contextmanager
def building(name: str) -> Iterator[None]:
    """Let transformers build a model from a config that others wrote; a :class:`UsageError` where it cannot."""
    from transformers import __version__

    try:
        yield
    except MeftError:
        raise
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        said = shortened(f"{type(error).__name__}: {first}" if first else type(error).__name__)
        raise UsageError(f"model {name}: transformers {__version__} cannot build it from its config: {said}") from error


def _text_part_options(folder: Path) -> dict[str, Any]:
    """What lets transformers build the text decoder of a model of text and images, from its weights among the rest."""
    from transformers import AutoConfig

    try:
        config = read_config(folder / CONFIG_NAME)
    except UsageError:
        return {}  # loading will say of all files which is damaged
    text = text_part(config)
    if text is config:
        return {}
    fields = dict(text)
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return {"config": made, "key_mapping": dict(_TEXT_KEYS)}


def _place(device_kind: str) -> dict[str, int | str]:
    """Where transformers puts a quantized model."""
    return {"": torch.cuda.current_device() if device_kind == "cuda" else "cpu"}


def _weight_options(plan: Plan, device_kind: str) -> dict[str, Any]:
    request = plan.request
    stored = request.model.stored
    if stored is not None:
        require_packages(*STORED_PACKAGES[stored.method], purpose=f"weights stored as {stored.title}")
        return {"dtype": QUANTIZED_DTYPE, "device_map": _place(device_kind)}
    if request.weights_dtype in COMPUTE_DTYPES:
        return {"dtype": COMPUTE_DTYPES[request.weights_dtype]}
    from transformers import BitsAndBytesConfig

    require_packages("bitsandbytes", "accelerate", purpose="nf4 weights")

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.double_quant,
        bnb_4bit_compute_dtype=QUANTIZED_DTYPE,
    )
    return {"dtype": QUANTIZED_DTYPE, "quantization_config": quantization, "device_map": _place(device_kind)}
