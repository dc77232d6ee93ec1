"""This machine and a model's sparsity, measured.

May import the rooms before it (device, host, data, exchange, adapter, session, use, training) and the planner's
records.
"""
