"""The shape of a model, and where it is found.

May import the rooms before it (base).
"""
