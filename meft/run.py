"""``python -m meft.run``: ``meft-run``, as ``torchrun --nproc-per-node N -m meft.run plan.json`` starts it."""

from meft.runtime.cli.start import main

if __name__ == "__main__":
    main()
