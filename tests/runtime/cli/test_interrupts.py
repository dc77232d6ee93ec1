"""SIGINT and SIGTERM, at any stage: never lost, the documented exit code, and training that can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from meft.planner.records.report import Report
from meft.runtime.cli import run as cli
from meft.runtime.training import interrupts

RUNNER = "meft.runtime.training.runner"
STAGES = (
    f"{RUNNER}.model_loading.check_model_folder",
    f"{RUNNER}.preflight.check",
    f"{RUNNER}.model_loading.load_tokenizer",
    f"{RUNNER}.load_dataset",
    f"{RUNNER}.kernels.warm_up",
    f"{RUNNER}.model_loading.load_frozen_model",
    f"{RUNNER}._begin",
)


def signal_during(monkeypatch, name: str, number: int) -> None:
    """Let a function be interrupted by a signal as it begins."""
    module, attribute = name.rsplit(".", 1)
    parts = module.removeprefix(f"{RUNNER}.").split(".") if module != RUNNER else []
    target = sys.modules[RUNNER]
    for part in parts:
        target = getattr(target, part)
    real = getattr(target, attribute)

    def interrupted(*args: object, **options: object) -> object:
        os.kill(os.getpid(), number)
        return real(*args, **options)

    monkeypatch.setattr(target, attribute, interrupted)


@pytest.mark.parametrize("stage", STAGES, ids=[name.rsplit(".", 1)[1] for name in STAGES])
def test_a_signal_while_loading_ends_the_run_before_training(small, tmp_path, monkeypatch, stage) -> None:
    import meft.runtime.training.runner  # noqa: F401  (what is patched)

    signal_during(monkeypatch, stage, signal.SIGINT)
    code, said = small.run(tmp_path / "out", "--steps", 4)
    assert (code, said) == (130, "SIGINT: stopped while loading; nothing was trained and nothing was written")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_with_its_code_after_its_checkpoint_and_goes_on(
    small, tmp_path, monkeypatch, number, code
) -> None:
    """In the third of eight micro-batches: the window of two ends, with adapter, report and checkpoint."""
    assert small.run(tmp_path / "straight", "--steps", 8)[0] == 0
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        from meft.runtime.training.training import Trainer

        real = Trainer.batch

        def batch(self, step):
            if step == 2:
                os.kill(os.getpid(), number)
            return real(self, step)

        patch.setattr(Trainer, "batch", batch)
        given, said = small.run(folder, "--steps", 8)
    name = signal.Signals(number).name
    assert (given, said) == (code, f"{name}: stopped after step 4, with a checkpoint; go on with --resume")
    assert {path.name for path in folder.iterdir()} == {"adapter", "checkpoint-00000004", "report.json"}
    assert Report.load(folder / "report.json").training.steps == 4
    assert small.run(folder, "--resume")[0] == 0
    losses = [Report.load(tmp_path / each / "report.json").training.loss_per_step for each in ("straight", "out")]
    assert losses[0] == losses[1]


def test_a_signal_while_a_checkpoint_is_written_is_obeyed_after_the_next_window(small, tmp_path, monkeypatch) -> None:
    """Whether the run ends was decided before the write."""
    from meft.runtime.training.training import Trainer

    real = Trainer.save

    def save(self) -> None:
        if self.steps_done == 2:
            os.kill(os.getpid(), signal.SIGINT)
        real(self)

    monkeypatch.setattr(Trainer, "save", save)
    code, said = small.run(tmp_path / "out", "--steps", 8, "--save-every", 1)
    assert (code, said) == (130, "SIGINT: stopped after step 4, with a checkpoint; go on with --resume")


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interrupts.Interrupts().installed() as asked:
        assert signal.getsignal(signal.SIGINT) not in before
        asked.check()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_signal_ends_the_process_at_once() -> None:
    script = (
        "import os, signal\n"
        "from meft.runtime.training.interrupts import Interrupts\n"
        "with Interrupts().installed():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert "SIGTERM: stopping before training begins; again to stop at once" in done.stderr
    assert "SIGINT again: stopped at once; what was saved is whole" in done.stderr


IMPORTED = """
import builtins, os, sys
real = builtins.__import__
def imported(name, *rest):
    if name == "click" and "click" not in sys.modules:
        os.kill(os.getpid(), NUMBER)
    return real(name, *rest)
builtins.__import__ = imported
sys.argv[0] = "meft-run"
from meft.runtime.cli.start import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan.json", "--steps", "2"], "stopped while loading; nothing was trained and nothing was written"),
        (["evaluate", "plan.json", "--model", "none"], "stopped before anything was begun"),
    ],
)
def test_a_signal_while_the_program_itself_is_imported_is_one_line(number, arguments, said, tmp_path) -> None:
    """A real process, hit as it imports what it stands on; it ended with -15 and without a word."""
    script = IMPORTED.replace("NUMBER", str(int(number)))
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    name = signal.Signals(number).name
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr.splitlines() == [
        f"meft-run: {name}: stopping before training begins; again to stop at once",
        f"meft-run: {name}: {said}",
    ]


def test_commands_besides_training_have_pythons_own_ctrl_c() -> None:
    script = (
        "import click, os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs begin without
        "from meft.runtime.cli import run, start\n"
        "@run.command.command('long')\n"
        "def long(): os.kill(os.getpid(), signal.SIGINT); print('still here')\n"
        "sys.argv = ['meft-run', 'long']\n"
        "start.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", f"meft-run: {cli.INTERRUPTED}")


def test_ctrl_c_before_click_has_begun_is_one_line(monkeypatch, capsys) -> None:
    def pressed(**_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.command, "main", pressed)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"meft-run: {cli.INTERRUPTED}\n"


def test_ctrl_c_in_a_destructor_is_not_ignored() -> None:
    """Python prints it and goes on; nine of 42 presses were lost so."""
    script = (
        "from meft.runtime.training.interrupts import no_interrupt_ignored\n"
        "class Held:\n"
        "    def __del__(self): raise KeyboardInterrupt\n"
        "with no_interrupt_ignored('meft-run', 'interrupted'):\n"
        "    held = Held()\n"
        "    del held\n"
        "print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "meft-run: interrupted\n")
