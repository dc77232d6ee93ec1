"""Several ranks, on one machine or several: processes that train one adapter together, each with a device of its own.

May import the rooms before it (device, fake, host) and the planner's records.
"""
