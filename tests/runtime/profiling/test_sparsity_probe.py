"""Unions, recalls and popularity against code that counts one token at a time, and the command on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from meft.planner.base.errors import UsageError
from meft.planner.records.profile_catalogue import load_sparsity
from meft.planner.records.profile_file import ProfileFile
from meft.planner.traffic.sparsity import active_rows_per_layer
from meft.runtime.cli.profile import command
from meft.runtime.profiling import sparsity_probe as probe
from meft.runtime.profiling.sparsity_profile import dealt


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def union_by_hand(keys: torch.Tensor, hidden: torch.Tensor, top_k: int) -> set[int]:
    chosen: set[int] = set()
    for token in hidden:
        scores = (keys @ token).tolist()
        chosen |= set(sorted(range(len(scores)), key=lambda row: -scores[row])[:top_k])
    return chosen


def test_unions_of_every_size_equal_those_by_hand(generator) -> None:
    keys, hidden = torch.randn(96, 8, generator=generator), torch.randn(256, 8, generator=generator)
    grid = probe.Grid(tokens=(64, 128), top_ks=(2, 5), widths=(32, 64))
    found = probe.count_unions(keys, hidden, grid)
    assert set(found) == {(t, k, r) for t in (64, 128) for k in (2, 5) for r in (32, 64)}
    for (tokens, top_k, width), sizes in found.items():
        sets = [keys[first : first + width] for first in range(0, 96 - width + 1, width)]  # disjoint, whole
        windows = hidden.split(tokens)
        expected = [np.mean([len(union_by_hand(rows, window, top_k)) for rows in sets]) for window in windows]
        assert sizes == pytest.approx(expected)


def test_recall_and_unions_by_window(generator) -> None:
    keys = [torch.randn(32, 8, generator=generator) for _ in range(3)]
    hidden = [torch.randn(64, 8, generator=generator) for _ in range(3)]
    exact = [probe.window_unions(k, h, tokens=32, top_k=3) for k, h in zip(keys, hidden, strict=True)]
    assert set(exact[0][1].nonzero().flatten().tolist()) == union_by_hand(keys[0], hidden[0][32:], 3)
    recalls = []
    for layer in range(3):
        for start in (0, 32):
            mine = union_by_hand(keys[layer], hidden[layer][start : start + 32], 3)
            ahead = union_by_hand(keys[layer], hidden[max(0, layer - 2)][start : start + 32], 3)
            recalls.append(len(mine & ahead) / len(mine))
    found = probe.look_ahead_recall(keys, hidden, exact, depth=2, tokens=32, top_k=3)
    assert found == pytest.approx(np.mean(recalls))


def test_recall_of_experts_by_hand(generator) -> None:
    keys, hidden = torch.randn(24, 4, generator=generator), torch.randn(10, 4, generator=generator)
    router = torch.randn(6, 4, generator=generator)
    shares = []
    for token in hidden:
        exact = (keys @ token).topk(5).indices // 4
        best = set((router @ token).topk(2).indices.tolist())
        shares.append(np.mean([int(expert) in best for expert in exact]))
    assert probe.expert_recall(keys, hidden, router, num_probes=2, top_k=5) == pytest.approx(np.mean(shares))
    assert probe.expert_recall(keys, hidden, router, num_probes=6, top_k=5) == 1


def test_clusters_hold_every_row_once_and_alike_ones_together(generator) -> None:
    centres = torch.eye(4)
    keys = (centres.repeat(5, 1) + 0.01 * torch.randn(20, 4, generator=generator))[
        torch.randperm(20, generator=generator)
    ]
    ordered = probe.clustered(keys, 4)
    assert torch.equal(ordered.sort(0).values, keys.sort(0).values)
    kinds = ordered.argmax(1).view(4, 5)
    assert (kinds == kinds[:, :1]).all()


def test_popularity_by_hand() -> None:
    fetches = np.array([0] * 50 + [1] * 40 + [10] * 9 + [70])  # 200 fetches
    found = probe.popularity(fetches)
    assert found[0.01] == pytest.approx(70 / 200)
    assert found[0.10] == pytest.approx(160 / 200)
    assert found[0.50] == 1
    elsewhere = np.concatenate([np.arange(100, 50, -1), np.zeros(50, np.int64)])  # other text says: the first 50
    assert probe.popularity(fetches, ranked_by=elsewhere)[0.50] == 0


def test_rows_are_the_models_own(glass_model) -> None:
    pools = probe.model_rows(glass_model)
    block = glass_model.model.layers[0].mlp
    own = torch.cat([block.gate_proj.weight, block.up_proj.weight, -block.up_proj.weight]).detach()
    assert torch.equal(pools[0].sort(0).values, own.sort(0).values)
    assert not torch.equal(pools[0], own)


def test_hidden_states_leave_padding_out(glass_model) -> None:
    sequences = [tuple(range(4, 4 + length)) for length in (900, 700, 600, 500, 300)]
    (group,) = probe.hidden_groups(glass_model, sequences)
    assert len(group) == len(glass_model.model.layers)
    assert all(len(states) == probe.GROUP_TOKENS for states in group)
    (alone,) = probe.hidden_groups(glass_model, [sequences[0], sequences[1], sequences[2][:448]])
    assert torch.allclose(group[-1][:2000], alone[-1][:2000], atol=1e-4)


def test_halves_have_as_many_tokens_of_each_source() -> None:
    """One source's sequences are six times as long as the other's: dealt by turns, a half could get most of them."""
    long, short = [(1,) * (200 + 7 * place) for place in range(40)], [(2,) * 40] * 300
    (one, other), lacking = dealt([long, short], needed=8000)
    assert lacking is None
    for token in (1, 2):
        counts = [sum(len(each) for each in half if each[0] == token) for half in (one, other)]
        assert abs(counts[0] - counts[1]) <= 300
        assert min(counts) > 1700
    assert dealt([long, short[:5]], needed=8000)[1] == 1


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    words = ["river", "stone", "the", "green", "house", "of", "a", "north", "ship", "and", "bird", "seven"]
    chosen = np.random.default_rng(0).choice(words, size=9000)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(chosen))
    return path


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(command, ["sparsity", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit | UsageError):
        raise done.exception
    return done.exit_code, str(done.exception) if isinstance(done.exception, UsageError) else done.output


def test_the_command_writes_a_profile_that_planning_reads(glass_folder, text, tmp_path) -> None:
    path = tmp_path / "sparsity.json"
    words = ("--model", glass_folder, "--data", text, "--text", "--tokens", 4096, "--seq-len", 128, "-o", path)
    code, output = run(*words)
    assert code == 0, output
    assert "that the fit did not see" in output
    profile, file = load_sparsity(str(path)), ProfileFile.load(path)
    assert len(profile.layers) == 4
    assert profile.prefetch_recall_by_depth[0] == 1
    assert len(profile.prefetch_recall_by_depth) == 4  # no deeper than the model
    assert profile.filled_fraction == 1
    assert [point.rows for point in profile.popularity] == list(probe.HOT_SHARES)
    assert 0.5 <= profile.popularity[-1].traffic < 1
    by_detail = {each.detail: each for each in file.measurements if each.name.startswith("active rows")}
    seen = by_detail["T=512, K=32, R=256, spread over layers"].median
    rows = active_rows_per_layer(profile, 4, tokens=512, top_k=32, adapter_width=256)
    assert np.median(rows) == pytest.approx(seen, rel=0.15)
    assert {each.name for each in file.measurements} >= {"look-ahead recall, depth 1", "error of active rows, mean"}


def test_a_trained_adapters_rows(glass_folder, text, tmp_path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{layer}.rows": torch.randn(512, 2 * 128, generator=generator) for layer in range(4)}
    hidden_size = json.loads((glass_folder / "config.json").read_text())["hidden_size"]
    tensors = {name: rows[:, : 2 * hidden_size].contiguous() for name, rows in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    path = tmp_path / "sparsity.json"
    words = ("--model", glass_folder, "--data", text, "--text", "--tokens", 2048, "-o", path, "--adapter", adapter)
    code, output = run(*words)
    assert code == 0, output
    assert "the rows of a trained adapter" in load_sparsity(str(path)).source
    details = [each.detail for each in ProfileFile.load(path).measurements if each.name.startswith("active rows")]
    assert not [detail for detail in details if "R=1024" in detail]
    del tensors["layers.3.rows"]
    save_file(tensors, adapter / "meft_adapter.safetensors")
    assert "it does not have 4 layers" in run(*words)[1]


def test_too_little_text_is_refused(glass_folder, tmp_path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    code, message = run("--model", glass_folder, "--data", short, "--text", "-o", tmp_path / "x.json")
    assert "tokens were found and" in message
    assert code == 1  # click's runner: the entry point makes it 2
    assert not (tmp_path / "x.json").exists()
