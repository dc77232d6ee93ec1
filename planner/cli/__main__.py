"""``python -m meft.planner.cli``."""

from meft.planner.cli.main import main

main()
