"""Where things lie: the repository, and what its developers share beside it, which a clone need not have."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
