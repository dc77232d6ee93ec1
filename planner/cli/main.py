"""``meft-plan``: the command line. Planning is the default command; each has a module of this room.

Every error is one line on standard error with the exit code of :mod:`meft.planner.base.errors`; ``MEFT_DEBUG=1`` shows
the traceback of an unexpected one.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import Any, NoReturn

import click

from meft.planner.base.errors import EXIT_UNEXPECTED, MeftError, unknown_name
from meft.planner.base.options import one_line
from meft.planner.base.packages import missing_package
from meft.planner.base.version import VERSION

PROGRAM = "meft-plan"
DEFAULT_COMMAND = "plan"
EXIT_INTERRUPTED = 130
COMMANDS = {
    name: f"meft.planner.cli.{name}:{name}_command"
    for name in ("audit", "compare", "estimate", "plan", "replay", "trace")
}
"""Where each command is: loaded when it is asked for, so that planning need not wait for the others."""


class PlannerGroup(click.Group):
    """A group whose default command is planning, and whose errors are single lines with documented exit codes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Options without a command belong to planning."""
        own = {"--version", *self.get_help_option_names(ctx)}
        if not args or (args[0].startswith("-") and args[0] not in own):
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        """All of them, loaded or not."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name != DEFAULT_COMMAND:
            gc.enable()
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A misspelt command gets the near names."""
        if args[0] not in COMMANDS:
            raise unknown_name("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options of planning, the group's own, and the commands."""
        default = self.get_command(ctx, DEFAULT_COMMAND)
        assert default is not None
        with click.Context(default, parent=ctx, info_name=DEFAULT_COMMAND) as plan:
            records = [record for param in plan.command.get_params(plan) if (record := param.get_help_record(plan))]
        with formatter.section("Options of planning, the default command"):
            formatter.write_dl([record for record in records if not record[0].startswith("-h")])
        super().format_options(ctx, formatter)

    def main(self, *args: Any, **options: Any) -> Any:
        """Run as :meth:`click.Group.main` does, and end the process with the documented exit code."""
        words = sys.argv[1:] if not args or args[0] is None else args[0]
        try:
            code = super().main(*args, **options | {"prog_name": PROGRAM, "standalone_mode": False})
        except click.ClickException as error:
            _fail(one_line(error, program=PROGRAM, default_command=DEFAULT_COMMAND, arguments=words), error.exit_code)
        except click.exceptions.Abort:
            _fail("interrupted", EXIT_INTERRUPTED)
        except Exception as error:
            known = missing_package(error) or error
            if isinstance(known, MeftError):
                _fail(str(known), known.exit_code)
            if os.environ.get("MEFT_DEBUG"):
                raise
            _fail(f"unexpected {type(error).__name__}: {error} (MEFT_DEBUG=1 shows where)", EXIT_UNEXPECTED)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(
    cls=PlannerGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    options_metavar="",
    subcommand_metavar="[COMMAND] [OPTIONS]",
)
@click.version_option(VERSION, prog_name=PROGRAM)
def command() -> None:
    """Find what MEFT can train within a GPU's memory, and say what it needs.

    `meft-plan --gpu-mem 24GB` plans LLaMA-7B with the MEFT paper's workload and writes plan.json, which meft-run
    executes. For memory GB = GiB = 2^30 bytes: 24GB is what is printed on the card's box.

    Exit codes: 0 done; 1 unexpected, or an audit that failed; 2 usage or a bad file; 3 nothing fits; 4 this machine
    cannot run the plan.
    """


def main() -> None:
    """Entry point."""
    _start_lightly()
    try:
        command.main()
    except SystemExit as end:
        _end_lightly(end)


def _start_lightly() -> None:
    """Leave out what a short process has nothing of; must come before numpy and pydantic are loaded."""
    gc.disable()  # planning ends before garbage adds up; looking for it takes a twentieth of the time
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # no command multiplies large matrices by numpy
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for some means reading all installations


def _end_lightly(end: SystemExit) -> NoReturn:
    """End the process. After planning there is nothing to be tidied up but what was printed, and taking a process's
    objects apart takes a tenth of its time: it is left to the system."""
    if not gc.isenabled() and isinstance(end.code, int):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)
    raise end


def _fail(message: str, exit_code: int) -> NoReturn:
    click.echo(f"{PROGRAM}: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)
