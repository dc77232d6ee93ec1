"""A campaign's result file, to which sessions add: stopping one loses nothing, and running it again goes on.

A file holds, for every seed, how many trials were made and what they came to. A campaign asks for the next trials of
its seed, counts each, and the file is written every half minute, at the end and when a signal stops it. A trial depends
on its seed and number alone, so that the sum over sessions is that of one.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from meft.planner.base.files import write_atomic

SAVE_EVERY_SECONDS = 30.0
MOST_FAILURES = 100
"""Kept of each seed; all are counted."""
PACKAGES = ("meft", "torch", "transformers", "safetensors", "numpy")


class Record:
    """What trials of one seed came to, on top of what the file at ``path`` has of it; no file: in memory alone.

    ``campaign`` is its file's name, and the options that make it another one.
    """

    def __init__(self, campaign: str, seed: int, path: Path | None) -> None:
        self.campaign, self.seed, self.path = campaign, seed, path
        before = self._read().get("seeds", {}).get(str(seed), {})
        self.trials: int = before.get("trials", 0)
        """Made so far; the number of the next."""
        self.counts: Counter[str] = Counter(before.get("counts", {}))
        self.largest: dict[str, float] = before.get("largest", {})
        self.failures: list[dict[str, Any]] = before.get("failures", [])
        self.seconds: float = before.get("seconds", 0.0)
        self.details: dict[str, Any] = before.get("details", {})
        """What a campaign says besides."""
        self._stopped = False
        self._saved = self._begun = time.monotonic()

    def numbers(self, count: int, *, seconds: float | None = None) -> Iterator[int]:
        """Numbers of the trials that are left of ``count``, until so many seconds are over or a signal comes.

        Each is done when the next is asked for; the file is written on the way and at the end.
        """
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        until = float("inf") if seconds is None else time.monotonic() + seconds
        try:
            for number in range(self.trials, count):
                if self._stopped or time.monotonic() > until:
                    break
                yield number
                self.trials = number + 1
                if time.monotonic() - self._saved > SAVE_EVERY_SECONDS:
                    self.save()
        finally:
            self.save()
            for signal_number, handler in handlers.items():
                signal.signal(signal_number, handler)

    def fail(self, number: int, why: str, **more: Any) -> None:
        """A promise was not kept."""
        self.counts["failed"] += 1
        if len(self.failures) < MOST_FAILURES:
            self.failures.append({"trial": number, "why": why, **more})

    def note_largest(self, name: str, value: float) -> None:
        """Keep the largest of a figure."""
        self.largest[name] = max(self.largest.get(name, 0.0), round(value, 6))

    def save(self) -> None:
        """Put this seed's part into the file, beside what other seeds have there."""
        now = time.monotonic()
        self.seconds, self._begun, self._saved = self.seconds + now - self._begun, now, now
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # another seed may be running
            seeds = self._read().get("seeds", {}) | {str(self.seed): self.content()}
            write_atomic(self.path, json.dumps(_whole(self.campaign, seeds), indent=1) + "\n")
        finally:
            os.close(folder)

    def tell(self) -> None:
        """What came of this seed, on standard output; failures on standard error."""
        print(json.dumps(self.content() | {"failures": len(self.failures)}, indent=1))
        for failure in self.failures:
            print(json.dumps(failure), file=sys.stderr)

    def content(self) -> dict[str, Any]:
        """This seed's part of the file."""
        return {
            "trials": self.trials,
            "counts": dict(sorted(self.counts.items())),
            **({"largest": dict(sorted(self.largest.items()))} if self.largest else {}),
            **({"details": self.details} if self.details else {}),
            "seconds": round(self.seconds, 1),
            "failures": self.failures,
        }

    def _read(self) -> dict[str, Any]:
        if self.path is None or not self.path.exists():
            return {}
        content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        if content.get("campaign") != self.campaign:
            raise SystemExit(f"--json {self.path}: holds results of {content.get('campaign')}; name another file")
        return content

    def _stop(self, number: int, frame: object) -> None:
        del number, frame
        self._stopped = True


def _whole(campaign: str, seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The file: sums over the seeds, then each of them."""
    name, *options = campaign.split()
    program = " ".join([f"campaigns/{name}.py", *options])
    counts: Counter[str] = Counter()
    for each in seeds.values():
        counts.update(each["counts"])
    return {
        "campaign": campaign,
        "commands": [f"python {program} --count {each['trials']} --seed {seed}" for seed, each in seeds.items()],
        "trials": sum(each["trials"] for each in seeds.values()),
        "counts": dict(sorted(counts.items())),
        "versions": {name: version(name) for name in PACKAGES},
        "seeds": dict(sorted(seeds.items(), key=lambda item: int(item[0]))),
    }
