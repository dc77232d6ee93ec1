"""The step as torch.compile may make it at best: elementwise results fused away, and computed again in backward.

May import the rooms before it (base, models, records, allocator, traffic, terms, simulation).
"""
