"""What people use instead of MEFT, as a run of its own: trained, measured, saved, resumed and scored alike.

May import the rooms before it (data, device, adapter, session, use, training) and the planner's records.
"""
