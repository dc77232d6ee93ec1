"""A training run made and freed, tensor by tensor, in the order of the real one.

May import the rooms before it (base, models, records, allocator, traffic, terms).
"""
