"""``meft-plan``: options read, one call made, its result shown.

May import the rooms before it (base, models, records, allocator, traffic, terms, simulation, memory, timing, predict,
search, check, front, render).
"""
