"""bitsandbytes' 4-bit linear layer and PEFT's LoRA around it: the same tensors in the same order, without numbers.

The library needs a GPU build, so this stands for it (releases 0.42 to 0.49). A quantized weight of ``N`` elements is
``N/2`` bytes, an fp32 maximum per 64 elements and a table of 16 fp32 values. Double quantization keeps those maxima in
8 bits, with an fp32 maximum per 256 of them, a table of 256 fp32 values per layer, and an fp32 offset. A product writes
the weight out in 16 bits, multiplies and drops it; backward writes it out again.

From release 0.50 on, a forward product of at most 1,536 rows runs without writing the weight out on some cards; that is
left out.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from meft.runtime.fake.books import made_as

BLOCK = 64
NESTED_BLOCK = 256
_TABLE_ENTRIES = 16
_NESTED_TABLE_ENTRIES = 256


class QuantizedWeight:
    """What is resident of one weight. Made inside the books, it leaves the trail of a real quantization."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, *, double_quant: bool) -> None:
        original = torch.empty(shape, dtype=dtype)
        self.shape, self.dtype = shape, dtype
        self.packed = torch.empty(-(-original.numel() // 2), 1, dtype=torch.uint8)
        blocks = -(-original.numel() // BLOCK)
        maxima = torch.empty(blocks, dtype=torch.float32)
        self.table = torch.empty(_TABLE_ENTRIES, dtype=torch.float32)
        self.nested: tuple[torch.Tensor, ...] = ()
        if double_quant:
            offset = maxima.mean()
            centred = maxima - offset
            quantized = torch.empty_like(centred, dtype=torch.uint8)
            nested_maxima = torch.empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32)
            self.nested = (nested_maxima, torch.empty(_NESTED_TABLE_ENTRIES, dtype=torch.float32), offset)
            maxima = quantized
        self.maxima = maxima

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that stays on the device."""
        return (self.packed, self.maxima, self.table, *self.nested)

    def written_out(self) -> torch.Tensor:
        """The weight in its own dtype; with double quantization the maxima are written out first."""
        with made_as("dequantized_weight"):
            maxima = torch.empty_like(self.maxima, dtype=torch.float32) if self.nested else self.maxima
            weight = torch.empty(self.shape, dtype=self.dtype)
        del maxima
        return weight


class MatMul4Bit(torch.autograd.Function):
    """``A W^T + bias``; only the quantized weight is kept."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """Output in the dtype of ``inputs``."""
        ctx.weight = weight
        return F.linear(inputs, weight.written_out().to(inputs.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        """Gradient of the inputs; bitsandbytes sums the bias's before it looks further."""
        grad_bias = grad_output.sum(0) if ctx.needs_input_grad[2] else None
        grad_inputs = None
        if ctx.needs_input_grad[0]:
            grad_inputs = torch.matmul(grad_output, ctx.weight.written_out().to(grad_output.dtype))
        return grad_inputs, None, grad_bias


class Linear4bit(nn.Linear):
    """A linear layer with a quantized weight; the input is cast to ``compute_dtype`` and the output back."""

    def __init__(self, shape: torch.Size, bias: nn.Parameter | None, *, dtype: torch.dtype, double_quant: bool) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.compute_dtype = dtype
        self.quantized = QuantizedWeight(shape, dtype, double_quant=double_quant)
        self.weight = nn.Parameter(self.quantized.packed, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As bitsandbytes' layer: the bias is cast for good at the first call."""
        dtype = input.dtype
        inputs = input.to(self.compute_dtype)
        del input
        if self.bias is not None and self.bias.dtype != self.compute_dtype:
            self.bias = nn.Parameter(self.bias.detach().to(self.compute_dtype), self.bias.requires_grad)
        output: torch.Tensor = MatMul4Bit.apply(inputs, self.quantized, self.bias)
        return output.to(dtype)


class LoraLinear4bit(nn.Module, LoraLayer):
    """PEFT's LoRA around a 4-bit layer, which PEFT itself defines only where bitsandbytes is installed."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        rank, alpha = kwargs["r"], kwargs["lora_alpha"]
        self.update_layer(adapter_name, rank, lora_alpha=alpha, config=config)

    def forward(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output is cloned; without autocast the adapter's input is cast to its dtype and back."""
        result: torch.Tensor = self.base_layer(inputs, *args, **kwargs).clone()
        for adapter in self.active_adapters:
            lora_a, lora_b = self.lora_A[adapter], self.lora_B[adapter]
            requires_conversion = not torch.is_autocast_enabled()
            if requires_conversion:
                expected_dtype = result.dtype
                inputs = self._cast_input_dtype(inputs, lora_a.get_parameter("weight").dtype)
            output = lora_b(lora_a(self.lora_dropout[adapter](inputs))) * self.scaling[adapter]
            if requires_conversion:
                output = output.to(expected_dtype)
            result = result + output
        return result
