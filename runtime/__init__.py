"""The torch half of MEFT: the CPU-resident sparse adapter, transfers, measurement, training, and ``meft-run``.

From :mod:`meft.planner` it uses the records, what reads profiles, the allocator model, units and errors.
"""
