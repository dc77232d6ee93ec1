"""What a step takes, on four lanes.

May import the rooms before it (base, models, records, allocator, traffic, terms, simulation, memory).
"""
