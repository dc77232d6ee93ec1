"""What records leave out of their JSON, since it is as it was before there was a choice."""

from __future__ import annotations

from typing import Any

_USUAL: dict[str, Any] = {"tokens_see": "union", "packed": False, "gpus_per_link": 1}
_USUAL |= {"nodes": 1, "interconnect_bytes_per_second": None, "foreign_total": None, "summed_total": None}
_USUAL |= dict.fromkeys(("network_bytes_per_step", "network_bytes_per_optimizer_step", "network_bytes_total"), 0)
_USUAL |= {"batch_size_basis": "given", "switch": None, "stable": None, "rows": "replicated"}
_USUAL |= dict.fromkeys(("asked_total", "scored_total"))
_USUAL |= {"shard_base": False, "cards_bytes_per_step": 0, "cards_bytes_total": 0}


def without_usual(content: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Written only where they say something, so that other plans stay as they were, byte for byte."""
    usual = _USUAL | more
    return {name: value for name, value in content.items() if name not in usual or value != usual[name]}
