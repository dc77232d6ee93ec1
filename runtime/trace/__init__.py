"""One training step of the real model in that fake device: the exact stream of its allocations.

May import the rooms before it (device, host, data, exchange, adapter, session, use, training, profiling, fake) and the
planner's records.
"""
