"""The terms of device memory: one pure function for each size, and the rows of the ledger that hold them.

May import the rooms before it (base, models, records, allocator, traffic).
"""
