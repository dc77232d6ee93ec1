"""``python -m meft.run``: ``meft-run``, as ``torchrun --nproc-per-node N -m meft.run plan.json`` starts it."""

if __name__ == "__main__":
    from meft.runtime.cli.start import main

    main()
