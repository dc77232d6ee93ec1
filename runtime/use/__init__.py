"""The adapter in people's hands: inference, generation, evaluation, transformers' Trainer.

May import the rooms before it (device, host, data, exchange, adapter, session) and the planner's records.
"""
