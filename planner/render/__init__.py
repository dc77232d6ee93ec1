"""What people see: tables, and figures.

May import the rooms before it (base, models, records, allocator, traffic, terms, simulation, memory, timing, predict,
search, check, front).
"""
