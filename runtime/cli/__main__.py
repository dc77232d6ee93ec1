"""``python -m meft.runtime.cli``."""

from meft.runtime.cli.start import main

main()
