"""Weights of a frozen model set to zero, layer by layer, so that what each layer gives changes least.

May import the rooms before it (data, adapter, session) and the planner's base.
"""
