"""Sizes as people write them, and bytes as people read them. Everywhere else a size is an int of bytes.

For memory ``GB`` means what is printed on the box of a GPU: 2**30 bytes, the same as ``GiB``.
"""

from __future__ import annotations

import re
from decimal import Decimal

from meft.planner.base.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_UNITS = {"": 1, "b": 1, "k": KIB, "kb": KIB, "kib": KIB, "m": MIB, "mb": MIB, "mib": MIB}
_UNITS |= {"g": GIB, "gb": GIB, "gib": GIB, "t": GIB << 10, "tb": GIB << 10, "tib": GIB << 10}
_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?P<unit>[A-Za-z]*)")
_ACCEPTED = "a positive size such as 24GB, 24GiB, 1200MiB or 25769803776 (bytes); for memory GB = GiB = 2^30 bytes"

_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_COUNT = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?P<unit>[kKmMbBgGtT]?)", re.ASCII)
MAX_COUNT = 10**15

_PREFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": KIB, "Mi": MIB, "Gi": GIB}
_RATE = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?P<prefix>k|Ki|[MGT]|Mi|Gi)(?P<unit>bits?/s|bps|b/s|bE|B/s)", re.ASCII
)
_ACCEPTED_RATES = "bits as 25Gbit/s, 25Gbps or 25GbE, or bytes as 3.1GB/s; G is 10^9, Gi 2^30"
MIN_RATE, MAX_RATE = 1e6 / 8, 1e14 / 8
"""Outside of these a rate is a typing slip."""

MAX_BYTES = 1 << 50  # one PiB: above this a size is a typing slip, not a machine


def parse_bytes(text: str, *, field: str = "size") -> int:
    """Read a memory size.

    Raises :class:`UsageError` naming ``field``, the value and what is accepted.

    >>> parse_bytes("24GB") == parse_bytes("24 GiB") == 24 * 2**30
    True
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match["unit"].lower() not in _UNITS:
        raise UsageError(f"{field}: {text!r} is not a size; give {_ACCEPTED}")
    num_bytes = round(float(match["number"]) * _UNITS[match["unit"].lower()])
    if num_bytes <= 0:
        raise UsageError(f"{field}: {text!r} is not above zero; give {_ACCEPTED}")
    if not match["unit"] and num_bytes < MIB:
        raise UsageError(f"{field}: {text!r} is so many bytes; did you mean {text.strip()}GB? Give {_ACCEPTED}")
    if num_bytes > MAX_BYTES:
        raise UsageError(f"{field}: {text!r} is more than 1 PiB, which no machine has; give {_ACCEPTED}")
    return num_bytes


def parse_rate(text: str, *, field: str = "rate") -> float:
    """Read what a network carries, in bytes per second.

    Bits as networks are sold (``25Gbit/s``, ``25Gbps``, ``25Gb/s``, ``25GbE``), or bytes as they are measured
    (``3.1GB/s``); here k, M and G are powers of 1000, Ki, Mi and Gi of 1024.

    Raises :class:`UsageError` naming ``field``, the value and what is accepted.

    >>> parse_rate("25Gbit/s") == parse_rate("3.125 GB/s") == 3.125e9
    True
    """
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{field}: {text!r} is not a rate; give {_ACCEPTED_RATES}")
    per_unit = 1 if match["unit"].startswith("B") else 1 / 8
    rate = float(match["number"]) * _PREFIXES[match["prefix"]] * per_unit
    if not MIN_RATE <= rate <= MAX_RATE:
        raise UsageError(f"{field}: {text!r} is not between 1 Mbit/s and 100 Tbit/s; give {_ACCEPTED_RATES}")
    return rate


def format_rate(rate: float) -> str:
    """Render bytes per second as networks are sold: ``25 Gbit/s``, ``2.4 Gbit/s``, ``800 Mbit/s``."""
    bits = 8 * rate
    unit, name = (1e9, "Gbit/s") if bits >= 1e9 else (1e6, "Mbit/s")
    return f"{bits / unit:.4g} {name}"


def format_bytes(num_bytes: float) -> str:
    """Render bytes for a table, in three or four digits: ``23.42 GiB``, ``512.0 MiB``, ``1,007 MiB``, ``17 B``.

    Negative sizes keep their sign.
    """
    magnitude = abs(num_bytes)
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if magnitude >= unit:
            return f"{_digits(num_bytes / unit, most_decimals=2 if unit == GIB else 1)} {name}"
    return f"{num_bytes:.0f} B"


def parse_count(text: str, *, field: str = "count") -> int:
    """Read a number of things: ``1500000``, ``1,500,000``, ``1.5M``, ``2B``; here M is a million and B 10^9.

    Raises :class:`UsageError` naming ``field``, the value and what is accepted.
    """
    accepted = "a whole number above zero, such as 10M, 1.5B or 2500000"
    match = _COUNT.fullmatch(text.strip().replace(",", "").replace("_", ""))
    if match is None:
        raise UsageError(f"{field}: {text!r} is not a count; give {accepted}")
    number = Decimal(match["number"]) * _COUNT_UNITS[match["unit"].lower()]
    if not 1 <= number <= MAX_COUNT or number != number.to_integral_value():
        raise UsageError(f"{field}: {text!r} is not between 1 and 10^15, or not whole; give {accepted}")
    return int(number)


def format_size_argument(num_bytes: int) -> str:
    """Render a size so that :func:`parse_bytes` reads the same bytes back, in the largest unit that divides it."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes % unit == 0:
            return f"{num_bytes // unit}{name}"
    return str(num_bytes)


def format_seconds(seconds: float) -> str:
    """Render a duration for a table: ``58.4 us``, ``45.6 ms``, ``1.23 s``, ``12.5 min``, ``3.4 h``, ``2.1 days``."""
    if seconds < 0.99995e-3:
        return f"{seconds * 1e6:.1f} us"
    if seconds < 0.99995:
        return f"{seconds * 1e3:.1f} ms"
    for unit, name, up_to in ((1, "s", 120), (60, "min", 7200), (3600, "h", 172_800)):
        if seconds < up_to:
            return f"{_digits(seconds / unit, most_decimals=2 if unit == 1 else 1)} {name}"
    return f"{_digits(seconds / 86_400, most_decimals=1)} days"


def _digits(number: float, *, most_decimals: int) -> str:
    """No more decimals than four digits have room for."""
    whole = len(str(int(abs(number))))
    return f"{number:,.{max(min(most_decimals, 4 - whole), 0)}f}"
