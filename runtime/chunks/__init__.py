"""Token chunks: the rows of a long micro-batch come one part of its tokens after the other.

May import the rooms before it (device, fake, host, ranks, data, exchange).
"""
