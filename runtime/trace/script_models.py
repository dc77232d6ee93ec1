"""Models of a traced script: the architecture of a folder's ``config.json``, without weights.

transformers' ``from_pretrained`` and ``from_config`` are replaced; what a quantization config asks for in 4 bits is
made of the stand-ins that a planned trace has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import nn

from meft.planner.base.errors import UsageError
from meft.runtime.fake.flash import use_flash_attention
from meft.runtime.fake.linear4bit import Linear4bit, LoraLinear4bit
from meft.runtime.fake.script_books import ScriptBooks
from meft.runtime.session.rotary import settle_rotary_frequencies
from meft.runtime.trace.loading import is_linear, warm_up_bytes

_FLASH = "flash_attention_2"


class Models:
    """What a script loads, made without weights in the books."""

    def __init__(self, books: ScriptBooks) -> None:
        self.books = books

    @contextmanager
    def without_weights(self) -> Iterator[None]:
        """Inside, transformers makes models of their configs alone; PEFT and bitsandbytes know the stand-ins."""
        from transformers import PreTrainedModel
        from transformers.utils import import_utils

        own_from_config = PreTrainedModel._from_config.__func__  # type: ignore[attr-defined]

        def from_config(cls: Any, /, config: Any, **kwargs: Any) -> Any:
            return self._bare(own_from_config, cls, config, kwargs)

        def from_pretrained(cls: Any, /, reference: Any, *_: Any, **kwargs: Any) -> Any:
            return self._loaded(cls, reference, kwargs)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(PreTrainedModel, "_from_config", classmethod(from_config)))
            stack.enter_context(mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(from_pretrained)))
            stack.enter_context(mock.patch.object(torch.nn.Module, "load_state_dict", _no_state))
            # masks are followed, so what transformers asks of them has an answer
            stack.enter_context(mock.patch.object(import_utils, "is_fake_tensor", _no, create=True))
            self._lora_knows_4_bits(stack)
            self._bitsandbytes_without_kernels(stack)
            yield

    def _bare(self, own: Any, cls: Any, config: Any, kwargs: dict[str, Any]) -> Any:
        """A model on the host, without content."""
        flash = kwargs.get("attn_implementation") == _FLASH
        if flash:
            kwargs["attn_implementation"] = "sdpa"
        with self.books.host_only():
            model = own(cls, config, **kwargs)
        if flash:
            use_flash_attention(model)
        settle_rotary_frequencies(model)
        return model

    def _loaded(self, cls: Any, reference: Any, kwargs: dict[str, Any]) -> Any:
        config = kwargs.pop("config", None)
        if config is None:
            config = cls.config_class.from_pretrained(reference)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype", "auto"))
        if dtype in (None, "auto"):
            dtype = getattr(config, "dtype", None) or torch.float32
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        attention = kwargs.get("attn_implementation")
        quantization = kwargs.get("quantization_config") or getattr(config, "quantization_config", None)
        chosen = {} if attention is None else {"attn_implementation": attention}
        model = cls._from_config(config, dtype=dtype, **chosen)
        model.config._name_or_path = str(reference)
        model.eval()
        if quantization is not None:
            self._quantize(model, quantization, dtype)
        elif kwargs.get("device_map") not in (None, "cpu"):
            warm_up(self.books, model)
            self._to_device(model)
        return model

    def _to_device(self, model: nn.Module) -> None:
        model.to("cuda")
        device_map: Any = model
        device_map.hf_device_map = {"": "cuda:0"}

    def _quantize(self, model: Any, quantization: Any, dtype: torch.dtype) -> None:
        """4 bits: linear layers but the head become stand-ins, the rest goes to the device as it is."""
        options = quantization if isinstance(quantization, dict) else quantization.to_dict()
        if not options.get("load_in_4bit"):
            raise UsageError(
                f"quantization {options.get('quant_method', 'of another kind')}: its kernels' own memory is not known; "
                f"a traced script may load 16-bit weights, or 4-bit ones of bitsandbytes"
            )
        compute = options.get("bnb_4bit_compute_dtype") or torch.float32
        compute = getattr(torch, compute) if isinstance(compute, str) else compute
        double = bool(options.get("bnb_4bit_use_double_quant"))
        head = model.get_output_embeddings()
        warm_up(self.books, model, in_4_bits=True)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if is_linear(child) and child is not head:
                    shape = (
                        child.weight.shape if isinstance(child, nn.Linear) else torch.Size(reversed(child.weight.shape))
                    )
                    bias = child.bias
                    with self.books.on_device():
                        made = Linear4bit(shape, bias, dtype=dtype, double_quant=double)
                    made.compute_dtype = compute
                    setattr(module, name, made)
        model.to("cuda")
        model.is_loaded_in_4bit = model.is_quantized = model.config._is_quantized = True
        model.hf_device_map = {"": "cuda:0"}
        model.quantization_method = "bitsandbytes"
        model.hf_quantizer = _Quantizer(quantization)
        model.config.quantization_config = quantization

    # --- stand-ins -----------------------------------------------------------------------------------------------

    def _lora_knows_4_bits(self, stack: ExitStack) -> None:
        try:
            from peft import LoraConfig
        except ImportError:
            return
        own = LoraConfig.__post_init__

        def post_init(config: Any) -> None:
            own(config)
            config._register_custom_module({Linear4bit: LoraLinear4bit})

        stack.enter_context(mock.patch.object(LoraConfig, "__post_init__", post_init))

    def _bitsandbytes_without_kernels(self, stack: ExitStack) -> None:
        """Its optimizers' own code makes the states; the update is a kernel, which needs no memory."""
        try:
            from bitsandbytes import functional
            from bitsandbytes.optim import optimizer
        except ImportError:
            return

        def update(_self: Any, _group: Any, parameter: Any, *_: Any) -> None:
            parameter.grad = parameter.grad.contiguous()

        for kind in (optimizer.Optimizer1State, optimizer.Optimizer2State):
            stack.enter_context(mock.patch.object(kind, "update_step", update))
        replaced = {"get_paged": _paged, "prefetch_tensor": lambda *_, **__: None}
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(functional, name, function))


class _Quantizer:
    """What libraries ask a loaded model's quantizer."""

    is_trainable = True
    is_qat_trainable = False
    is_compileable = False
    is_serializable = True
    requires_calibration = False

    def __init__(self, quantization: Any) -> None:
        self.quantization_config = quantization


@contextmanager
def libraries_look_again() -> Iterator[None]:
    """Inside, and again afterwards, transformers and accelerate look anew for the device that they have found."""
    from transformers.utils import import_utils

    def forget() -> None:
        for function in vars(import_utils).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    with suppress(ImportError):
        from accelerate import state

        shared = (state.AcceleratorState._shared_state, state.PartialState._shared_state)
        kept = [(each, dict(each)) for each in (*shared, state.GradientState._shared_state)]
    forget()
    for content, _ in kept:
        content.clear()
    try:
        yield
    finally:
        forget()
        for content, before in kept:
            content.clear()
            content.update(before)


def _no(_: Any) -> bool:
    return False


def _paged(*shape: int, dtype: torch.dtype = torch.float32, **_: Any) -> torch.Tensor:
    """Managed memory, outside of the allocator."""
    made = torch.zeros(shape, dtype=dtype)
    made.is_paged = True  # type: ignore[attr-defined]
    return made


def _no_state(module: nn.Module, state_dict: Any, *_: Any, **__: Any) -> Any:
    """Weights of a file change no memory."""
    del module, state_dict
    return torch.nn.modules.module._IncompatibleKeys([], [])


def warm_up(books: ScriptBooks, model: nn.Module, *, in_4_bits: bool = False) -> None:
    """The block that comes and goes before the weights."""
    with books.on_device():
        torch.empty(warm_up_bytes(model, in_4_bits=in_4_bits), dtype=torch.uint8)
