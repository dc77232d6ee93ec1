"""Names of the number formats that weights are kept in, and rows travel in."""

from __future__ import annotations

from typing import Literal

WeightsDtype = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
AdapterDtype = Literal["fp32", "bf16"]
