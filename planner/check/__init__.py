"""Predicted against observed, and what is learnt from the difference.

May import the rooms before it (base, models, records, allocator, traffic, terms, simulation, memory, timing, predict,
search).
"""
