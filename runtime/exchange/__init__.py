"""Rows and gradients on their way between host and device.

May import the rooms before it (device, host, ranks, data) and the planner's records.
"""
