"""``meft-run`` and ``meft-profile``.

May import the rooms before it (device, host, data, exchange, adapter, session, use, training, profiling, fake, trace)
and the planner's records.
"""
