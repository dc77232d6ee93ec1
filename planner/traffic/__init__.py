"""Which rows are active, and the bytes over the link that follow.

May import the rooms before it (base, models, records, allocator).
"""
