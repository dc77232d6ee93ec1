"""A causal LM's blocks and the FFN in each, found by structure, whatever a family calls them.

The blocks are the largest list of modules in the text decoder: a list within another list (experts) is none, and
towers that see images or hear speech are passed over. The FFN of a block is the child with two matrices or more (one
will do under an FFN's usual name) that works on the model's hidden size and is no attention and no state-space mixer; a
mixture of experts is one FFN as a whole.

Letters: ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from meft.planner.base.errors import UsageError

FFN_NAMES = (
    "mlp",
    "feed_forward",
    "ffn",
    "block_sparse_moe",
    "moe",
    "mlp_block",
    "feedforward",
    "ff",
    "mixer",
    "shared_mlp",
)
"""What families call it, the usual first: it decides where a block has more than one candidate."""
_OTHER_TOWERS = ("vision", "visual", "image", "img", "audio", "speech")
_NO_FFN = ("attn", "attention", "mamba", "conv", "lstm", "temporal", "router", "rotary")
"""In a child's name or class: mixers over tokens, and small parts around an FFN."""
_MATRICES_OF_AN_FFN = 2
_MATRIX_DIMS = 2


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The stack of blocks that text goes through.

    Raises:
        UsageError: there is no list of blocks.
    """
    stacks = _stacks(_text_decoder(model)) or _stacks(model)  # what a class calls its decoder may be the head alone
    if not stacks:
        raise UsageError(f"{type(model).__name__}: no list of blocks with an FFN each, which the adapter sits beside")
    return max(stacks, key=lambda stack: (_num_parameters(stack), len(stack)))


def ffn_modules(model: nn.Module) -> list[nn.Module]:
    """The FFN of every block, first to last.

    Raises:
        UsageError: a block has none, or more than one that could be meant.
    """
    blocks, hidden_size = decoder_blocks(model), _hidden_size(model)
    found = [_ffn_of(block, hidden_size) for block in blocks]
    missing = [index for index, ffn in enumerate(found) if ffn is None]
    if missing:
        which = "its blocks have" if len(missing) == len(found) else f"{len(missing)} of {len(found)} blocks have"
        block = blocks[missing[0]]
        children = ", ".join(name for name, _ in block.named_children()) or "nothing"
        raise UsageError(
            f"{type(model).__name__}: {which} no FFN module of their own, which the adapter sits beside "
            f"({type(block).__name__} has {children})"
        )
    return [ffn for ffn in found if ffn is not None]


def decoder(model: nn.Module) -> nn.Module:
    """The module that runs the blocks, whose forward every use of the model passes through, with or without head."""
    blocks = decoder_blocks(model)
    return next(module for module in model.modules() if any(child is blocks for child in module.children()))


def _text_decoder(model: nn.Module) -> nn.Module:
    """Where transformers says the decoder of text is; the model itself where it does not say."""
    find = getattr(model, "get_decoder", None)
    found = find() if callable(find) else model
    return found if isinstance(found, nn.Module) else model


def _stacks(root: nn.Module) -> list[nn.ModuleList]:
    return [stack for name, stack in _outermost_lists(root) if not _other_tower(name)]


def _outermost_lists(root: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules that are in no other, by their path."""
    waiting: list[tuple[str, nn.Module]] = [("", root)]
    while waiting:
        path, module = waiting.pop(0)
        if isinstance(module, nn.ModuleList):
            if len(module):
                yield path, module
            continue
        waiting += [(f"{path}.{name}", child) for name, child in module.named_children()]


def _other_tower(path: str) -> bool:
    return any(word in path.lower() for word in _OTHER_TOWERS)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _hidden_size(model: nn.Module) -> int | None:
    """``D`` as the text part's config has it; None where it does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    size = vars(text).get(getattr(text, "attribute_map", {}).get("hidden_size", "hidden_size"))
    return size if isinstance(size, int) else None


def _ffn_of(block: nn.Module, hidden_size: int | None) -> nn.Module | None:
    candidates = {name: child for name, child in block.named_children() if _could_be_ffn(name, child, hidden_size)}
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    return next((candidates[name] for name in FFN_NAMES if name in candidates), None)


def _could_be_ffn(name: str, child: nn.Module, hidden_size: int | None) -> bool:
    words = f"{name} {type(child).__name__}".lower()
    if isinstance(child, nn.ModuleList) or any(word in words for word in _NO_FFN):
        return False
    found = [sizes for module in child.modules() for sizes in _sizes(module)]
    enough = len(found) >= (1 if name in FFN_NAMES else _MATRICES_OF_AN_FFN)
    return enough and (hidden_size is None or any(hidden_size in sizes for sizes in found))


def _sizes(module: nn.Module) -> list[tuple[int, ...]]:
    """Sizes of a module's own matrices, as they are when they are not quantized: ``in_features`` tells."""
    features = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if all(isinstance(size, int) for size in features):
        return [features]  # type: ignore[list-item]
    return [tuple(each.shape) for each in module.parameters(recurse=False) if each.dim() >= _MATRIX_DIMS]
