"""A model's weights come to the device, and PEFT's preparation of a quantized model casts what is left of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from meft.planner.base.errors import UsageError
from meft.planner.records.setup import TrainingSetup
from meft.runtime.adapter.blocks import decoder_blocks
from meft.runtime.fake.books import CudaBooks
from meft.runtime.fake.flash import use_flash_attention
from meft.runtime.fake.linear4bit import Linear4bit
from meft.runtime.session.model_loading import COMPUTE_DTYPES, building
from meft.runtime.session.rotary import settle_rotary_frequencies

QUANTIZED_DTYPE = torch.bfloat16
"""What 4-bit weights are written out to, and what is not quantized is loaded in."""


def build_model(setup: TrainingSetup, config: dict[str, Any]) -> nn.Module:
    """The architecture with empty weights in their dtype; none of it is on the device yet."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(config)
    dtype = COMPUTE_DTYPES.get(setup.weights_dtype, QUANTIZED_DTYPE)
    kernel = "eager" if setup.attention == "eager" else "sdpa"
    with building(setup.model.name):
        made = AutoConfig.for_model(options.pop("model_type"), **options)
        try:
            model: nn.Module = AutoModelForCausalLM.from_config(
                made, dtype=dtype, attn_implementation=kernel, trust_remote_code=False
            )
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            said = f"attention {setup.attention}: not for {setup.model.name}; transformers: {reason}"
            raise UsageError(said) from error
    if setup.attention == "flash":
        use_flash_attention(model)
    settle_rotary_frequencies(model)
    return model


def load(books: CudaBooks, model: nn.Module, setup: TrainingSetup) -> None:
    """Enter every parameter and buffer, module by module; nf4 weights are brought in 16 bits and quantized there."""
    layers = decoder_blocks(model)
    linear = {id(module) for module in layers.modules() if is_linear(module)}
    if setup.weights_dtype == "nf4" and setup.method != "meft":
        with books.category("other_weights"), books:
            torch.empty(warm_up_bytes(model, in_4_bits=True), dtype=torch.uint8)

    def enter(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            in_linear = id(module) in linear and parameter.dim() > 1
            with books.category("linear_weights" if in_linear else "other_weights"):
                books.adopt(parameter)
        for name, buffer in module.named_buffers(recurse=False):
            with books.category("rotary_frequencies" if "inv_freq" in name else "other_weights"):
                books.adopt(buffer)
        for name, child in module.named_children():
            if setup.weights_dtype == "nf4" and id(child) in linear:
                setattr(module, name, _quantized(books, child, double_quant=setup.double_quant))
            else:
                enter(child)

    enter(model)
    if setup.weights_dtype == "nf4":
        quantized: Any = model
        quantized.is_loaded_in_4bit = quantized.is_quantized = quantized.config._is_quantized = True


def warm_up_bytes(model: nn.Module, *, in_4_bits: bool) -> int:
    """transformers' ``caching_allocator_warmup``: one block as large as all weights comes and goes before them."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            quarter = in_4_bits and is_linear(module) and module is not head and parameter.dim() > 1
            num_bytes = parameter.numel() * parameter.element_size()
            total += parameter.numel() // 2 if quarter else num_bytes
    return total


def is_linear(module: nn.Module) -> bool:
    """A linear module; GPT-2's, with a transposed weight, included."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _quantized(books: CudaBooks, module: nn.Module, *, double_quant: bool) -> Linear4bit:
    weight, bias = module.get_parameter("weight"), module.bias
    shape = weight.shape if isinstance(module, nn.Linear) else torch.Size(reversed(weight.shape))
    assert bias is None or isinstance(bias, nn.Parameter)
    with books.category("linear_weights"), books:
        made = Linear4bit(shape, bias, dtype=QUANTIZED_DTYPE, double_quant=double_quant)
    if bias is not None:
        with books.category("other_weights"):
            books.adopt(bias)
    return made


def prepare(books: CudaBooks, model: nn.Module, setup: TrainingSetup) -> None:
    """What comes before the method: PEFT's ``prepare_model_for_kbit_training`` where asked for, and checkpointing.

    For a quantized model the preparation enables checkpointing without saying which kind, and torch's default is the
    reentrant one; in PEFT it does so unasked, here only where checkpointing is asked for. Otherwise it is transformers'
    default, which in version 5 is the other kind.
    """
    if setup.kbit_preparation:
        _cast_to_fp32(books, model)
    if not setup.activation_checkpointing:
        return
    loaded: Any = model
    if setup.reentrant is not None:
        loaded.enable_input_require_grads()
        loaded.activation_checkpointing_enable({"use_reentrant": setup.reentrant})
    elif setup.kbit_preparation and setup.weights_dtype == "nf4":
        loaded.enable_input_require_grads()
        loaded.activation_checkpointing_enable({})
    else:
        loaded.activation_checkpointing_enable()


def cast_as_trl(books: CudaBooks, model: nn.Module) -> None:
    """TRL's ``peft_module_casting_to_bf16``: norms by their names to fp32, embeddings and head from there to bf16."""
    for path, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) or "norm" in path:
            _recast(books, model, module, to=torch.float32)
        elif any(name in path for name in ("lm_head", "embed_tokens", "wte", "wpe")):
            _recast(books, model, module, to=torch.bfloat16, only=torch.float32)


def _recast(
    books: CudaBooks, model: nn.Module, module: nn.Module, *, to: torch.dtype, only: torch.dtype | None = None
) -> None:
    """A module's own parameters, one after the other, wherever they are; ``only`` those of that dtype."""
    for name in [name for name, _ in module.named_parameters(recurse=False)]:
        old = module.get_parameter(name)
        if old.dtype == to or only not in (None, old.dtype):
            continue
        with books.category(books.entered_as(old)), books:
            new = nn.Parameter(old.detach().to(to), requires_grad=False)
        for holder, attribute in _places(model, old):
            holder.register_parameter(attribute, new)
        del old


def _places(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Where a parameter is: in more than one place when tied."""
    return [
        (module, name)
        for module in model.modules()
        for name, own in module.named_parameters(recurse=False)
        if own is parameter
    ]


def _cast_to_fp32(books: CudaBooks, model: nn.Module) -> None:
    """All parameters frozen, and those in 16 bits cast one after the other."""
    model.requires_grad_(False)
    for places in _places_of_16_bit_parameters(model):
        old = places[0][0].get_parameter(places[0][1])
        with books.category(books.entered_as(old)), books:
            new = nn.Parameter(old.detach().float(), requires_grad=False)
        for module, name in places:
            module.register_parameter(name, new)
        del old


def _places_of_16_bit_parameters(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """For each such parameter where it is: in more than one place when tied."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                places.setdefault(id(parameter), []).append((module, name))
    return list(places.values())
