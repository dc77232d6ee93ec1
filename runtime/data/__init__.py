"""Text in: examples, tasks and their sources, metrics.

May import the rooms before it (device, host) and the planner's records.
"""
