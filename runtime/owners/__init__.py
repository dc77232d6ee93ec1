"""Rows that machines own: each has its part of the tables, and the others ask it for scores and rows.

May import the rooms before it (device, fake, host, ranks, data, exchange, chunks) and the planner's records.
"""
