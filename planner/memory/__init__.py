"""The ledgers of device and host memory, and the disk that a run takes, for one decision or a grid of them.

May import the rooms before it (base, models, records, allocator, traffic, terms, simulation).
"""
