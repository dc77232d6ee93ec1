"""All of it for one decision, for one configuration of any method, and for every method beside the others.

May import the rooms before it (base, models, records, allocator, traffic, terms, simulation, memory, timing).
"""
