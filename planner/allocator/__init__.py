"""PyTorch's caching allocator, and recordings of real ones replayed through it.

May import the rooms before it (base, models, records).
"""
