"""A CUDA device under fake tensors: what its operators allocate, without one.

May import the rooms before it (device, host, data, exchange, adapter, session, use, training, profiling) and the
planner's records.
"""
