"""The adapter in the model: the sparse one, and the dense oracle that it is tested against.

May import the rooms before it (device, host, data, exchange) and the planner's records.
"""
