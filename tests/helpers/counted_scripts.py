"""A training script run in full on the CPU, numbers and all, with its allocations in the books of an emulated card.

What a traced script is compared with: nothing here is fake, no number is taken for granted, and what lies on the host
in the script lies on the device here, which is little. CUDA's choices (attention, autocast, workspaces) are the books'.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.amp import autocast_mode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from meft.planner.simulation.stream import StreamPeaks, stream_peaks
from meft.runtime.fake.autocast import cuda_lists
from meft.runtime.fake.books import CudaBooks
from meft.runtime.fake.experts import grouped_products
from meft.runtime.fake.functions import cuda_functions
from meft.runtime.fake.linear4bit import Linear4bit, LoraLinear4bit
from meft.runtime.trace.script_models import libraries_look_again

WORKSPACE_BYTES = 8_519_680


class _Done(BaseException):
    pass


class _Books(CudaBooks):
    """Everything lies on the device, whoever made it."""

    def _is_host_view(self, func: Any, args: Any, kwargs: Any) -> bool:
        return False


def counted_script(script: Path, *arguments: str, steps: int = 2) -> StreamPeaks:
    """Peaks of the first steps."""
    books = _Books(workspace_bytes=WORKSPACE_BYTES, categorise=lambda: "anything")
    done: list[int] = []

    def begins(*_: Any) -> None:
        books.scalars_on_host = True

    def ended(*_: Any) -> None:
        books.scalars_on_host = False
        done.append(1)
        if len(done) == steps:
            raise _Done

    handles = [register_optimizer_step_pre_hook(begins), register_optimizer_step_post_hook(ended)]
    with mock.patch.object(sys, "argv", [str(script), *arguments]), _on_cpu(books):
        try:
            with books:
                runpy.run_path(str(script), run_name="__main__")
        except _Done:
            books.log.moment("end")
        finally:
            for handle in handles:
                handle.remove()
    assert len(done) == steps
    return stream_peaks(books.log.stream())


@contextmanager
def _on_cpu(books: CudaBooks) -> Iterator[None]:
    """``cuda`` means the CPU, where a tensor that comes from the host is copied; models have numbers of chance."""
    from bitsandbytes import functional
    from bitsandbytes.optim import optimizer
    from peft import LoraConfig
    from transformers import PreTrainedModel, training_args

    own_to, own_autocast = torch.Tensor.to, autocast_mode.autocast.__init__
    own_post_init = LoraConfig.__post_init__
    sent: set[int] = set()

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = [str(each) for each in (*args, kwargs.get("device"))]
        if not any(name.startswith("cuda") for name in names):
            return own_to(self, *args, **kwargs)
        args = tuple(each for each in args if not isinstance(each, bool) and not str(each).startswith("cuda"))
        moved = self if isinstance(self, nn.Parameter) or id(self) in sent else self.clone()
        sent.add(id(moved))
        return own_to(moved, *args) if args and args[0] is not None else moved

    def autocast(
        self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None
    ) -> None:
        own_autocast(self, "cpu", dtype, enabled, cache_enabled)

    def post_init(config: Any) -> None:
        own_post_init(config)
        config._register_custom_module({Linear4bit: LoraLinear4bit})

    def from_pretrained(cls: Any, reference: str, *_: Any, dtype: torch.dtype, **options: Any) -> Any:
        with books.host():
            model = cls._from_config(cls.config_class.from_pretrained(reference), dtype=dtype)
        if "quantization_config" in options:
            _in_4_bits(model, options["quantization_config"])
        for tensor in (*model.parameters(), *model.buffers()):
            books.adopt(tensor)
        return model

    replaced = [
        (torch.Tensor, "to", to),
        (torch.Tensor, "cuda", lambda self: to(self, "cuda")),
        (autocast_mode.autocast, "__init__", autocast),
        (PreTrainedModel, "from_pretrained", classmethod(from_pretrained)),
        *((kind, "update_step", _update) for kind in (optimizer.Optimizer1State, optimizer.Optimizer2State)),
        (functional, "get_paged", lambda *shape, dtype, **_: _paged(books, shape, dtype)),
        (functional, "prefetch_tensor", lambda *_, **__: None),
        (LoraConfig, "__post_init__", post_init),
        (training_args, "is_torch_bf16_gpu_available", lambda: True),
    ]
    with ExitStack() as stack:
        for context in (libraries_look_again(), cuda_lists(), cuda_functions(), grouped_products()):
            stack.enter_context(context)
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield


def _in_4_bits(model: Any, quantization: Any) -> None:
    """The blocks' linear layers, as bitsandbytes would have them."""
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                double = quantization.bnb_4bit_use_double_quant
                made = Linear4bit(child.weight.shape, None, dtype=torch.bfloat16, double_quant=double)
                setattr(module, name, made)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.hf_quantizer = mock.MagicMock(quantization_config=quantization, is_trainable=True)
    model.hf_device_map = {"": "cpu"}


def _paged(books: CudaBooks, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with books.host():
        return torch.zeros(shape, dtype=dtype)


def _update(_self: Any, _group: Any, parameter: Any, *_: Any) -> None:
    parameter.grad = parameter.grad.contiguous()


def make_folder(folder: Path, config: Any) -> Path:
    """A model's folder as a script finds it, without weights."""
    from transformers import PreTrainedTokenizerFast

    config.save_pretrained(folder)
    words = ["<pad>", "<unk>", "</s>", "one", "two", "three", "four"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder
