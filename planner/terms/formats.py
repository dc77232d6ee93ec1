"""Formats of numbers, each as the bytes that one number takes.

>>> BF16 == FP16, BF16 == 2, 10 * BF16
(False, True, 20)
"""

from __future__ import annotations


class Format(int):
    """Bytes of a number, and which format it is: fp16 and bf16 are as large and not the same."""

    name: str

    def __new__(cls, num_bytes: int, name: str) -> Format:
        """``num_bytes`` a number."""
        made = super().__new__(cls, num_bytes)
        made.name = name
        return made

    def __eq__(self, other: object) -> bool:
        """Another format is another one, whatever its size; a plain number is a size."""
        return self is other if isinstance(other, Format) else int(self) == other

    def __ne__(self, other: object) -> bool:
        """The opposite."""
        return not self == other

    __hash__ = int.__hash__


FP32 = Format(4, "fp32")
BF16 = Format(2, "bf16")
FP16 = Format(2, "fp16")
INT64 = 8
BOOL = 1

STORED = {"fp32": FP32, "bf16": BF16, "fp16": FP16, "nf4": BF16, "int8": BF16}
"""Of what is not quantized, by the weights' dtype."""


def promoted(a: int, b: int) -> int:
    """The format of what is made of two: the wider, and of fp16 and bf16 fp32, which holds both.

    >>> promoted(FP16, BF16) is FP32, promoted(BF16, FP32) is FP32, promoted(BF16, BF16) is BF16
    (True, True, True)
    """
    if a == b:
        return a
    return FP32 if int(a) == int(b) else max(a, b)
