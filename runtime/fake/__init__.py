"""A CUDA device under fake tensors: what its operators allocate, without one.

May import the rooms before it (device) and the planner's records.
"""
