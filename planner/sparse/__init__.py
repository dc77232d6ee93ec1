"""MEFT's own step, event by event: the frozen model simulated, with the sparse adapter beside every FFN.

May import the rooms before it (base, models, records, allocator, traffic, terms, simulation, fusion).
"""
