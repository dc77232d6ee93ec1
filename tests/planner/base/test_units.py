"""Numbers as people read and write them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft.planner.base.errors import UsageError
from meft.planner.base.units import GIB, KIB, MIB, format_bytes, format_seconds, parse_count, parse_rate


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (3 * KIB, "3.0 KiB"),
        (622_363 * KIB, "607.8 MiB"),
        (1006.6 * MIB, "1,007 MiB"),
        (GIB, "1.00 GiB"),
        (23.416 * GIB, "23.42 GiB"),
        (123.456 * GIB, "123.5 GiB"),
        (12_345 * GIB, "12,345 GiB"),
        (-9.45 * GIB, "-9.45 GiB"),
    ],
)
def test_bytes(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 us"),
        (58.4e-6, "58.4 us"),
        (999.96e-6, "1.0 ms"),
        (0.3725, "372.5 ms"),
        (0.99999, "1.00 s"),
        (59.99, "59.99 s"),
        (119, "119.0 s"),
        (120, "2.0 min"),
        (7199, "120.0 min"),
        (7200, "2.0 h"),
        (112_320, "31.2 h"),
        (259_200, "3.0 days"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.floats(1e-6, 1e9))
def test_times_have_at_most_four_digits_up_to_years(seconds: float) -> None:
    number, unit = format_seconds(seconds).split(" ")
    assert unit in ("us", "ms", "s", "min", "h", "days")
    assert len(re.sub(r"\D", "", number)) <= 5
    scale = {"us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "days": 86_400}[unit]
    assert float(number.replace(",", "")) * scale == pytest.approx(seconds, rel=0.06)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1),
        ("10M", 10_000_000),
        ("1.5B", 1_500_000_000),
        ("1.5 b", 1_500_000_000),
        ("300k", 300_000),
        ("2,500,000", 2_500_000),
        ("2_500_000", 2_500_000),
        ("0.1M", 100_000),
        ("1000T", 10**15),
    ],
)
def test_counts_as_people_write_them(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "lots", "1.5", "0.0001k", "10MB", "2000T", "nan", "1e9", "\u0661"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--tokens: .* such as 10M, 1.5B or 2500000"):
        parse_count(text, field="--tokens")


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("25Gbit/s", 3.125e9),
        ("25 Gbps", 3.125e9),
        ("25Gb/s", 3.125e9),
        ("25GbE", 3.125e9),
        ("3.1GB/s", 3.1e9),
        ("100 MB/s", 1e8),
        ("1GiB/s", 2**30),
        ("8000kbit/s", 1e6),
    ],
)
def test_rates_as_networks_are_sold_and_measured(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["25", "25G", "25GB", "fast", "-1Gbit/s", "25gbit/s", "1kbit/s", "999TB/s", ""])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--interconnect: .* as 25Gbit/s, 25Gbps or 25GbE"):
        parse_rate(text, field="--interconnect")
