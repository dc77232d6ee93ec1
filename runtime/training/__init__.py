"""A run from plan to report.

May import the rooms before it (device, host, data, exchange, adapter, session, use) and the planner's records.
"""
