"""Documents packed into one sequence: each as if it were alone, the same bytes over the link, and who cannot do it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sessions import EXPERTS, open_small, small_plan
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from meft.runtime.data.examples import Example, collate
from meft.runtime.data.packing import joined
from meft.runtime.session.documents import DOCUMENT_START, attends_across, positions_from


def documents(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(4, 1024, (length,), generator=generator).tolist()) for length in lengths]
    return [Example(each, each) for each in ids]


def test_positions_begin_anew_with_each_document() -> None:
    start = DOCUMENT_START
    labels = torch.tensor([[start, 5, start, 6, 7], [start, 1, 2, 3, -100]])
    assert positions_from(labels).tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert labels.tolist() == [[-100, 5, -100, 6, 7], [-100, 1, 2, 3, -100]]


@pytest.mark.parametrize("choice", [{}, {"prefetch_depth": 1, **EXPERTS}])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_learns_as_if_it_were_alone(glass_folder, choice, attention) -> None:
    """The loss of a packed batch is that of its documents, weighted by their tokens."""
    plan = small_plan(glass_folder, choice=choice, batch_size=1, seq_len=24, attention=attention)
    session = open_small(glass_folder, plan)
    parts = documents(9, 10, 5)
    packed = joined(parts)
    assert packed.starts == (0, 9, 19)
    total = tokens = 0.0
    for part in parts:
        result = session.step(collate([part], seq_len=24, pad_id=0), loss_scale=1.0)
        total, tokens = total + result.loss * part.num_trained_tokens, tokens + part.num_trained_tokens
    together = session.step(collate([packed], seq_len=24, pad_id=0), loss_scale=1.0).loss
    across = session.step(collate([replace(packed, starts=(0,))], seq_len=24, pad_id=0), loss_scale=1.0).loss
    assert together == pytest.approx(total / tokens, rel=2e-5)
    assert abs(across - together) > 1e-3
    session.close()


def test_no_more_bytes_cross_the_link(glass_folder) -> None:
    session = open_small(glass_folder, small_plan(glass_folder, batch_size=1, seq_len=24))
    packed = joined(documents(9, 10, 5))
    counted = []
    for example in (replace(packed, starts=(0,)), packed):
        session.engine.counted_bytes.clear()
        session.step(collate([example], seq_len=24, pad_id=0), loss_scale=1.0)
        counted.append(session.engine.counted_bytes["h2d", "inputs", "step"])
    assert counted == [2 * 24 * 8] * 2
    session.close()


def test_who_attends_across_documents(glass_model) -> None:
    sizes = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1}
    bloom = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, **sizes))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **sizes))
    assert not attends_across(glass_model, batch_size=2, vocab_size=1024)
    assert not attends_across(gpt2, batch_size=2, vocab_size=64)
    assert attends_across(bloom, batch_size=2, vocab_size=64)


class Asked(TorchDispatchMode):
    """Counts how often a number is read from the device outside the engine, which on a GPU waits for all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_an_unpacked_step_asks_the_device_nothing(glass_folder) -> None:
    """transformers would look whether a sequence is packed, once a forward; packed ones it still sees."""
    session = open_small(glass_folder, small_plan(glass_folder, batch_size=1, seq_len=24))
    whole, packed = documents(24)[0], joined(documents(9, 15))
    for example, times in ((whole, 0), (packed, 1)):
        batch = collate([example], seq_len=24, pad_id=0)
        with session.device.scope(), Asked() as asked:
            session.loss(batch)
        assert asked.times == times, example.starts
