"""Where ``meft-run`` begins: signals are noted from here on, before anything that takes long to import.

SIGINT and SIGTERM in the tenths of a second until then are Python's own affair.
"""

from __future__ import annotations

from meft.runtime.training.interrupts import Interrupts


def main() -> None:
    """Entry point: import the program and run it, with both signals noted all along."""
    with Interrupts().installed() as interrupts:
        from meft.runtime.cli import run

        run.main(interrupts)


if __name__ == "__main__":
    main()
