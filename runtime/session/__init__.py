"""One plan on one device: model, adapter, optimizer and exchange, opened, saved and resumed.

May import the rooms before it (device, host, data, exchange, adapter) and the planner's records.
"""
