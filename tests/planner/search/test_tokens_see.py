"""What tokens see is passed from the request to the decision, priced, and said."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from meft.planner.base.errors import UsageError
from meft.planner.cli.main import command
from meft.planner.front.calls import estimate, plan

ASKED = {"gpu": "rtx-3090", "host_mem": "64GB", "model": "llama-3.2-1b", "adapter_width": 4096, "top_k": 64}


def test_tokens_that_see_their_own_rows_are_planned_and_priced() -> None:
    union, own = plan(**ASKED), plan(**ASKED, tokens_see="own")
    assert union.decision.tokens_see == "union"
    assert own.decision == union.decision.model_copy(update={"tokens_see": "own"})
    assert own.prediction.transfer == union.prediction.transfer
    assert own.prediction.timing.busy_seconds["gpu"] > union.prediction.timing.busy_seconds["gpu"]


def test_an_estimate_knows_it_where_rows_are_sparse() -> None:
    found = {see: estimate("meft", **ASKED, tokens_see=see) for see in ("union", "own")}
    assert found["own"].peak_allocated_bytes >= found["union"].peak_allocated_bytes
    with pytest.raises(UsageError, match=r"tokens_see does not go with .*lora"):
        estimate("lora", model="llama-3.2-1b", tokens_see="own")


def test_the_decision_says_so(tmp_path) -> None:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in ASKED.items()]
    arguments += ["--verbose", "-o", str(tmp_path / "plan.json")]
    for extra, said in (([], False), (["--tokens-see", "own"], True)):
        shown = CliRunner().invoke(command, [*arguments, *extra], catch_exceptions=False)
        assert shown.exit_code == 0, shown.output
        assert ("tokens see" in shown.output) == said
