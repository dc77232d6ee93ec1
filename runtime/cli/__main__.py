"""``python -m meft.runtime.cli``."""

from meft.runtime.cli.run import main

main()
