"""The rows at home: tables in host memory and the kernels that work on them.

May import the rooms before it (device) and the planner's records.
"""
