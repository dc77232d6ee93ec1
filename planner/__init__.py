"""The torch-free half of MEFT: records, models of memory, transfer and time, the search, and ``meft-plan``.

Nothing in this package imports torch, transformers, numba or :mod:`meft.runtime`; a test says so.
"""
