"""The README.md of an adapter folder: what it is, and how it is used."""

from __future__ import annotations

import json

from meft.planner.records.plan import Plan

_CARD = """\
---
library_name: meft
base_model: {quoted_name}
tags: [meft, sparse-adapter]
---

# A MEFT adapter for {name}

A parallel adapter beside every FFN of {name} ({num_layers} layers, hidden size {hidden_size}): {adapter_width:,} rows
per layer, {num_parameters:,} parameters, trained with {top_k} rows per token ({routing}). Made by meft {version}
([MEFT](https://arxiv.org/abs/2406.04984)).

It works beside the weights that it was trained beside and no others; loading checks that. PEFT cannot load it.

## Use

In Python:

    import meft

    model = meft.AdapterModel.from_pretrained("FOLDER-OF-THE-BASE-MODEL", "THIS-FOLDER")
    model.generate(**tokenizer("...", return_tensors="pt"))

On the command line:

    meft-run generate "..." --model FOLDER-OF-THE-BASE-MODEL --adapter THIS-FOLDER

To train it further, with a plan of the same adapter width:

    meft-run plan.json --model FOLDER-OF-THE-BASE-MODEL --data FILE.jsonl --adapter THIS-FOLDER

## Files

- `meft_adapter.safetensors`: `layers.I.rows`, one row of numbers per neuron, its key and then its value{routers}
- `meft_config.json`: the base model's shape, the adapter's, and a digest of the base's norms
"""


def model_card(plan: Plan, *, meft_version: str) -> str:
    """The card of an adapter that was trained as ``plan`` says."""
    decision, shape = plan.decision, plan.request.model
    chosen = f"the best {decision.num_probes} of {decision.num_experts}"
    routed = decision.needs.router_rows(decision.num_experts) * shape.hidden_size
    return _CARD.format(
        name=shape.name,
        quoted_name=json.dumps(shape.name, ensure_ascii=False),
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        adapter_width=decision.adapter_width,
        num_parameters=shape.num_layers * (decision.adapter_width * 2 * shape.hidden_size + routed),
        top_k=decision.top_k,
        routing=f"{decision.needs.title}: {chosen}" if decision.needs.in_experts else decision.needs.title,
        version=meft_version,
        routers="; `layers.I.router`, the router" if routed else "",
    )
