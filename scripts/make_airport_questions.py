"""Write questions about airport codes as JSONL, from the installed package ``airportsdata``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from meft.planner.base.errors import MeftError
from meft.planner.base.files import write_atomic
from meft.runtime.data.embedded import airport_questions


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--num", type=click.IntRange(min=1), default=200, show_default=True, help="How many questions.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which airports, and in which order.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("airports.jsonl"),
    show_default=True,
    help="The file to write.",
)
def main(num: int, seed: int, output: Path) -> None:
    """Write lines {"prompt": "Which city does the airport with IATA code ...", "completion": CITY}."""
    try:
        questions = airport_questions(num, seed=seed)
        write_atomic(output, "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions))
    except MeftError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(error.exit_code) from error
    except OSError as error:
        click.echo(f"Error: cannot write {output}: {error.strerror}", err=True)
        raise SystemExit(2) from error
    click.echo(f"Wrote {len(questions):,} questions about airports to {output}")


if __name__ == "__main__":
    main()
