"""All decisions weighed, the best that fits found, or what stands in the way.

May import the rooms before it (base, models, records, allocator, traffic, terms, simulation, memory, timing, predict).
"""
