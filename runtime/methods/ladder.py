"""Ladder side tuning (LST; Sung, Cho and Bansal, NeurIPS 2022): a small transformer beside the frozen one.

After every block of the backbone a block of the side network of width ``w = D / r`` takes a gated sum of what the side
block before gave and of the backbone's hidden state, projected to ``w``::

    s_l = Side_l(g_l s_{l-1} + (1 - g_l) P_l h_l),   g_l = sigmoid(a_l / 0.1),   s_0 = P_0 h_0

and the head is given ``norm(h_L + U s_L)``. Nothing is differentiated in the backbone, whose forward runs without a
graph: of each block only its output is kept, as the input of its projection. ``U`` begins at zero, so training begins
at the model as it is; side blocks are the backbone's own, structurally pruned: the features, heads and inner units with
the largest weights. With ``dropped`` the side network leaves out so many blocks, evenly.

Letters: ``D`` hidden size, ``r`` reduction, ``w`` side width, ``T`` tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from meft.planner.base.errors import UsageError
from meft.planner.records.ladder import SideShape, kept_layers
from meft.runtime.adapter.blocks import decoder, decoder_blocks

GATE_TEMPERATURE = 0.1
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def config_of(model: nn.Module) -> Any:
    """What transformers calls a model's config."""
    return model.config


class Ladder(nn.Module):
    """The side network: one projection, gate and block for each rung, and the way back up."""

    def __init__(self, base: nn.Module, side: SideShape, layers: tuple[int, ...]) -> None:
        super().__init__()
        config: Any = copy.deepcopy(config_of(base))
        sizes = (side.width, side.inner, side.num_heads, side.num_kv_heads, side.head_dim)
        for name, size in zip(_SIZES, sizes, strict=True):
            setattr(config, name, size)
        blocks = decoder_blocks(base)
        first = next(blocks.parameters())
        made: dict[str, Any] = {"device": first.device, "dtype": torch.float32}
        hidden = int(config_of(base).hidden_size)
        self.enter = nn.Linear(hidden, side.width, bias=False, **made)
        self.down = nn.ModuleList(nn.Linear(hidden, side.width, bias=False, **made) for _ in layers)
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros((), **made)) for _ in layers)
        block_class: Any = type(blocks[0])
        self.blocks = nn.ModuleList(block_class(config, index).to(**made) for index, _ in enumerate(layers))
        self.up = nn.Linear(side.width, hidden, bias=False, **made)

    def rung(self, place: int, state: torch.Tensor, hidden: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        """``s_l`` of the rung at ``place``; ``given`` is what the backbone gave its own block."""
        gate = torch.sigmoid(self.gates[place] / GATE_TEMPERATURE)
        mixed = gate * state + (1 - gate) * self.down[place](hidden)
        out = self.blocks[place](mixed, **given)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


class LadderModel(nn.Module):
    """A frozen causal LM with a ladder; called and asked as the model itself is."""

    asked_unpadded = True
    """See :class:`~meft.runtime.methods.generating.UnpaddedGenerator`."""

    def __init__(self, base: nn.Module, side: SideShape, *, dropped: int) -> None:
        super().__init__()
        blocks = decoder_blocks(base)
        self.layers = kept_layers(len(blocks), dropped)
        self.base = base
        self.ladder = Ladder(base, side, self.layers)
        prune_into(self.ladder, base, side, self.layers)
        self._state: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        blocks[0].register_forward_pre_hook(self._begin, with_kwargs=True)
        for index, block in enumerate(blocks):
            block.register_forward_hook(self._after(index), with_kwargs=True)

    @property
    def config(self) -> Any:
        """The backbone's."""
        return config_of(self.base)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's."""
        embeddings: nn.Module = self.base.get_input_embeddings()  # type: ignore[operator]
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's."""
        head: nn.Module = self.base.get_output_embeddings()  # type: ignore[operator]
        return head

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options: Any) -> CausalLMOutput:
        """Logits, and the loss where there are labels."""
        options["use_cache"] = False
        backbone, base = decoder(self.base), self.base
        with torch.no_grad():
            backbone(input_ids=input_ids, **options)
        state, last = self._state, self._last
        self._state = self._last = None
        assert state is not None
        assert last is not None
        hidden = last + self.ladder.up(state).to(last.dtype)
        del state, last
        head: Any = base.get_output_embeddings()  # type: ignore[operator]
        logits = head(backbone.norm(hidden))  # type: ignore[operator]
        loss = None
        if labels is not None:
            size = config_of(base).vocab_size
            loss = base.loss_function(logits=logits, labels=labels, vocab_size=size)  # type: ignore[operator]
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self, input_ids: torch.Tensor, *, max_new_tokens: int, pad_token_id: int = 0, **_unused: Any
    ) -> torch.Tensor:
        """Greedy, each token from the whole sequence anew; prompts have no padding."""
        ends = self.config.eos_token_id
        stops = torch.tensor([] if ends is None else ends, device=input_ids.device).flatten()
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            new = self(input_ids).logits[:, -1].argmax(dim=-1)
            new = torch.where(done, torch.full_like(new, pad_token_id), new)
            input_ids = torch.cat((input_ids, new[:, None]), dim=1)
            done |= torch.isin(new, stops)
            if done.all():
                break
        return input_ids

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        hidden = args[0] if args else kwargs["hidden_states"]
        with torch.enable_grad():
            self._state = self.ladder.enter(hidden.detach().to(self.ladder.enter.weight.dtype))

    def _after(self, index: int) -> Any:
        place = self.layers.index(index) if index in self.layers else None
        final = index == len(decoder_blocks(self.base)) - 1

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            del module, args
            hidden = output[0] if isinstance(output, tuple) else output
            if place is not None:
                given = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                given |= {"past_key_values": None, "use_cache": False}
                wide = hidden.detach().to(self.ladder.enter.weight.dtype)
                assert self._state is not None
                with torch.enable_grad():
                    self._state = self.ladder.rung(place, self._state, wide, given)
            if final:
                self._last = hidden.detach()

        return hook


def attach_ladder(model: nn.Module, side: SideShape, *, dropped: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """The frozen model with a ladder beside it, and what is trained.

    Raises:
        UsageError: the model's blocks are not those of Llama and its descendants.
    """
    attention = getattr(decoder_blocks(model)[0], "self_attn", None)
    if not all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")):
        raise UsageError(
            f"--method lst: {type(model).__name__} has no separate q_proj, k_proj, v_proj and o_proj, from which the "
            f"side network is pruned; LST is for Llama, Mistral and Qwen"
        )
    laddered = LadderModel(model, side, dropped=dropped)
    return laddered, list(laddered.ladder.parameters())


# --- structural pruning ----------------------------------------------------------------------------------------------


@torch.no_grad()
def prune_into(ladder: Ladder, base: nn.Module, side: SideShape, layers: tuple[int, ...]) -> None:
    """Side blocks become the backbone's at the same places, cut down to what weighs most; projections pick the features
    that are kept."""
    blocks: list[Any] = list(decoder_blocks(base))
    features = _largest(_feature_weight(blocks), side.width)
    ladder.up.weight.zero_()
    for projection in (ladder.enter, *ladder.down):
        _pick(projection, features)
    for place, index in enumerate(layers):
        _prune_block(ladder.blocks[place], blocks[index], side, features)


def _feature_weight(blocks: list[Any]) -> torch.Tensor:
    """Per feature of the residual stream, ``[D]``: the squares of all weights that write to it."""
    writing = [matrix for block in blocks for matrix in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight)]
    return torch.stack([matrix.float().square().sum(dim=1) for matrix in writing]).sum(dim=0)


def _largest(weights: torch.Tensor, count: int) -> torch.Tensor:
    found: torch.Tensor = weights.topk(count).indices.sort().values
    return found


def _pick(projection: nn.Module, features: torch.Tensor) -> None:
    weight: Any = projection.weight
    weight.zero_()
    weight[torch.arange(features.shape[0], device=weight.device), features] = 1.0


def _prune_block(small: Any, large: Any, side: SideShape, features: torch.Tensor) -> None:
    """Key-value heads by what their queries' outputs weigh, with the first of their query heads; inner units alike."""
    attention, size = large.self_attn, side.head_dim
    by_head = attention.o_proj.weight.float().square().sum(dim=0).view(-1, size).sum(dim=1)  # [H]
    num_kv_heads = attention.k_proj.weight.shape[0] // size
    kv_heads = _largest(by_head.view(num_kv_heads, -1).sum(dim=1), side.num_kv_heads)
    group, kept = by_head.shape[0] // num_kv_heads, side.num_heads // side.num_kv_heads
    heads = (kv_heads[:, None] * group + torch.arange(kept, device=kv_heads.device)).flatten()
    inner = _largest(large.mlp.down_proj.weight.float().square().sum(dim=0), side.inner)
    queries, keys = _of_heads(heads, size), _of_heads(kv_heads, size)
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        getattr(small.self_attn, name).weight.copy_(getattr(attention, name).weight[rows][:, features])
    small.self_attn.o_proj.weight.copy_(attention.o_proj.weight[features][:, queries])
    for name in ("gate_proj", "up_proj"):
        getattr(small.mlp, name).weight.copy_(getattr(large.mlp, name).weight[inner][:, features])
    small.mlp.down_proj.weight.copy_(large.mlp.down_proj.weight[features][:, inner])
    for name in ("input_layernorm", "post_attention_layernorm"):
        getattr(small, name).weight.copy_(getattr(large, name).weight[features])


def _of_heads(heads: torch.Tensor, size: int) -> torch.Tensor:
    return (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()
