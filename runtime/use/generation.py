"""Batched greedy generation: prompts in, answers out, the same whichever prompts share a batch.

Prompts become the tokens that training put before a completion: the user's turn of the chat template, or the text as it
stands (``raw``, or a tokenizer without a template). They are padded on the left and sorted by length, so that a batch
holds little padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from meft.planner.base.errors import UsageError
from meft.runtime.data.chat_template import TemplateError, rendered
from meft.runtime.data.examples import pad_token_id
from meft.runtime.session.model_loading import check_token_ids
from meft.runtime.session.session import Session
from meft.runtime.use.inference import AS_TRAINED, Serving, serving


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are made: greedily, up to ``max_new_tokens`` each, ``batch_size`` at a time."""

    max_new_tokens: int = 32
    batch_size: int = 8
    raw: bool = False
    serving: Serving = AS_TRAINED
    """Which rows a token meets where an adapter is in training."""


class Generator(Protocol):
    """Something that continues padded prompts."""

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, max_new_tokens: int, pad_id: int
    ) -> torch.Tensor:
        """Host tensors ``[B, S]`` in, the new tokens ``[B, up to max_new_tokens]`` out, on the host."""
        ...


@dataclass(frozen=True)
class SessionGenerator:
    """A session's model with its adapter active, on the session's device."""

    session: Session
    serving: Serving = AS_TRAINED

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, max_new_tokens: int, pad_id: int
    ) -> torch.Tensor:
        """See :class:`Generator`. A device budget that is exceeded raises as in training."""
        session = self.session
        check_token_ids(input_ids.tolist(), session.plan.request.model.vocab_size, where="the prompts")
        with serving(session, self.serving), session.device.scope():
            ids, mask = session.to_device(input_ids), session.to_device(attention_mask)
            made = greedy(session.model, ids, mask, max_new_tokens=max_new_tokens, pad_id=pad_id)
            host = session.engine.host_empty(*made.shape, dtype=made.dtype)
            session.engine.to_host(made.contiguous(), host, category="tokens").wait_on_host()
        return host


@dataclass(frozen=True)
class ModelGenerator:
    """A Hugging Face model as it is, on the device that holds it."""

    model: nn.Module

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, max_new_tokens: int, pad_id: int
    ) -> torch.Tensor:
        """See :class:`Generator`."""
        device = next(self.model.parameters()).device
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        embedding = getattr(embedding, "base_layer", embedding)  # where peft trains some of its rows
        check_token_ids(input_ids.tolist(), embedding.num_embeddings, where="the prompts")
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                ids, mask = input_ids.to(device), attention_mask.to(device)
                return greedy(self.model, ids, mask, max_new_tokens=max_new_tokens, pad_id=pad_id).cpu()
        finally:
            self.model.train(was_training)


def greedy(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, max_new_tokens: int, pad_id: int
) -> torch.Tensor:
    """New tokens of Hugging Face's own greedy search; whatever else the model's generation config says is off."""
    with _dense_into_head(model):
        made: torch.Tensor = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_id,
        )
    return made[:, input_ids.shape[1] :]


@contextmanager
def _dense_into_head(model: Any) -> Iterator[None]:
    """The head gets the last hidden states ``[B, 1, D]`` contiguous: of prompts they are a slice, and a CPU's bf16
    product of such a one takes a thousand times as long (torch 2.13, B 32, SmolLM2's head: 15 s, 15 ms)."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def answers(generator: Generator, tokenizer: Any, prompts: Sequence[str], options: GenerationOptions) -> list[str]:
    """What the model says to each prompt, special tokens left out, in the order of the prompts."""
    encoded = [prompt_ids(tokenizer, prompt, raw=options.raw) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (len(encoded[index]), index))
    pad_id = pad_token_id(tokenizer)
    said = [""] * len(prompts)
    for first in range(0, len(order), options.batch_size):
        chosen = order[first : first + options.batch_size]
        ids, mask = left_padded([encoded[index] for index in chosen], pad_id=pad_id)
        made = generator.generate(ids, mask, max_new_tokens=options.max_new_tokens, pad_id=pad_id)
        for index, tokens in zip(chosen, made.tolist(), strict=True):
            said[index] = tokenizer.decode(tokens, skip_special_tokens=True)
    return said


def prompt_ids(tokenizer: Any, prompt: str, *, raw: bool) -> list[int]:
    """The tokens after which training put a completion."""
    if raw or tokenizer.chat_template is None:
        ids: list[int] = tokenizer.encode(prompt, add_special_tokens=True)
        if ids and ids[-1] == tokenizer.eos_token_id:  # a tokenizer that ends every text
            ids = ids[:-1]
    else:
        text = _rendered(tokenizer, prompt)
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise UsageError("--prompt: is empty and the tokenizer puts no token before it, so there is nothing to go on")
    return ids


def _rendered(tokenizer: Any, prompt: str) -> str:
    turn = [{"role": "user", "content": prompt}]
    try:
        return rendered(tokenizer, turn, add_generation_prompt=True)
    except TemplateError as error:
        raise UsageError(f"the tokenizer's chat template refuses the prompt ({error}); try --raw") from error


def left_padded(sequences: Sequence[Sequence[int]], *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask ``[B, longest]``, int64, padding on the left."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, longest - len(sequence) :] = 1
    return ids, mask
