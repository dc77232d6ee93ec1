"""One call for each question: the request made from what was given, the models asked, the record returned.

May import the rooms before it (base, models, records, allocator, traffic, terms, simulation, memory, timing, predict,
search, check). Commands and ``import meft`` are this room underneath.
"""
