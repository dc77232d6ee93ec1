"""Prompt tuning, prefix tuning and (IA)^3 as ``peft`` runs them: what each adds to a decoder's step.

Letters: ``B`` sequences, ``S`` their tokens, ``T = B S``, ``n`` virtual tokens, ``D`` hidden size, ``L`` layers, ``k``
the size of a layer's keys (heads times head size), ``m`` the FFN's inner size.

- *Prompt tuning* (Lester et al., 2021) trains ``[n, D]``: embeddings put before those of every sequence. The model then
  runs on ``S + n`` tokens a sequence, and the labels are as much longer.
- *Prefix tuning* (Li and Liang, 2021; without its MLP, as ``peft`` has it) trains ``[n, 2 L k]``: keys and values put
  before each layer's own. Queries stay ``S``, keys and values are ``S + n``, so there is a mask, and beside a mask
  transformers writes grouped heads out.
- *(IA)^3* (Liu et al., 2022) trains ``2 k + m`` numbers a layer: factors of keys, values and of what the FFN's last
  layer is given. Each product keeps what it scales: ``T (2 k + m)`` numbers a layer, and makes as much again.
"""

from __future__ import annotations

from meft.planner.models.architecture import ModelShape
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.autograd import Tensor
from meft.planner.simulation.operators import Operators
from meft.planner.terms.formats import STORED

PROMPT, PREFIX, FACTORS = "PROMPT_TUNING", "PREFIX_TUNING", "IA3"
SCALED = ("k_proj", "v_proj", "down_proj")
"""What (IA)^3 scales in the families below: what the first two give, and what the last is given."""
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types for which the three are written here; for any other the real code is traced."""
_ARGUMENTS = {PROMPT: {"num_virtual_tokens"}, PREFIX: {"num_virtual_tokens"}, FACTORS: set[str]()}
"""Arguments that the closed forms know; with any other the real code is traced."""


def has_closed_form(setup: TrainingSetup) -> bool:
    """Whether the step of a method of ``peft`` is simulated here, or has to be traced."""
    peft = setup.peft
    if peft is None or setup.model.measured is not None or setup.model.model_type not in FAMILIES:
        return False
    if peft.enum_name not in _ARGUMENTS or set(peft.arguments) - _ARGUMENTS[peft.enum_name]:
        return False
    return isinstance(peft.arguments.get("num_virtual_tokens", 1), int)


def virtual_tokens(setup: TrainingSetup, kind: str) -> int:
    """``n``; 0 where the method is another."""
    if setup.peft is None or setup.peft.enum_name != kind:
        return 0
    return int(setup.peft.arguments.get("num_virtual_tokens", 0))


def trained_sizes(setup: TrainingSetup) -> list[int]:
    """Numbers of each trained tensor, in the order of the modules."""
    shape, peft = setup.model, setup.peft
    assert peft is not None
    if peft.enum_name == PROMPT:
        return [virtual_tokens(setup, PROMPT) * shape.hidden_size]
    if peft.enum_name == PREFIX:
        return [virtual_tokens(setup, PREFIX) * 2 * shape.num_layers * shape.kv_size]
    return shape.num_layers * list(factor_sizes(shape).values())


def factor_sizes(shape: ModelShape) -> dict[str, int]:
    """Of (IA)^3, by the linear layer beside which they are."""
    return {"k_proj": shape.kv_size, "v_proj": shape.kv_size, "down_proj": shape.intermediate_size}


def running(setup: TrainingSetup) -> TrainingSetup:
    """The setup of what the model itself runs: with a prompt its sequences are ``S + n`` tokens long."""
    longer = virtual_tokens(setup, PROMPT)
    return setup.model_copy(update={"seq_len": setup.seq_len + longer}) if longer else setup


def prompted(ops: Operators, setup: TrainingSetup, table: Tensor, prompt: Tensor) -> Tensor:
    """The embeddings ``[B, S, D]`` with the prompt's before them, ``[B, S + n, D]``; ``setup`` is :func:`running`'s."""
    width, batch = setup.model.hidden_size, setup.batch_size
    virtual = prompt.numel // width
    embedded = ops.embedding(table, setup.tokens - batch * virtual, width)
    if setup.activation_checkpointing:
        embedded = ops.tape.as_leaf(embedded)  # transformers makes the embedding module's output require a gradient
    looked_up = ops.embedding(prompt, virtual, width)
    repeated = ops.tape.new(batch * looked_up.numel, looked_up.itemsize, "embeddings")
    repeated = ops.tape.connect(repeated, (looked_up,), lambda grad: (grad.detached(),))
    repeated = ops.cast(repeated, embedded.itemsize, "embeddings")
    return ops.concatenate((repeated, embedded), "embeddings")


def prefixes(ops: Operators, setup: TrainingSetup, prefix: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values ``[B, n, k]``, as copies in the cache: views of one lookup, ``[B, n, 2 L k]``."""
    virtual, layers = virtual_tokens(setup, PREFIX), setup.model.num_layers
    looked_up = ops.embedding(prefix, setup.batch_size * virtual, prefix.numel // virtual)
    looked_up = ops.cast(looked_up, STORED[setup.weights_dtype], "attention")
    parts = ops.split(looked_up, (looked_up.numel // (2 * layers),) * (2 * layers))
    copies = [ops.copy(part, "attention") for part in parts]
    return list(zip(copies[::2], copies[1::2], strict=True))


def scaled(ops: Operators, x: Tensor, factor: Tensor, *, before: bool) -> Tensor:
    """(IA)^3's product with a factor for every feature, cast back; ``before`` a layer its input is made fp32 first."""
    once = ops.scale(factor, "adapter")  # peft begins with one, times the factor
    wide = ops.cast(x, factor.itemsize, "adapter") if before else x
    return ops.cast(ops.multiply(wide, once, "adapter"), x.itemsize, "adapter")
