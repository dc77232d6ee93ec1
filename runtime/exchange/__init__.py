"""Rows and gradients on their way between host and device.

May import the rooms before it (device, host, data) and the planner's records.
"""
