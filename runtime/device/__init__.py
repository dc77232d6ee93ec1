"""The device: its books, its link, its lanes, and what its driver says.

May import no other room, only the planner's records.
"""
