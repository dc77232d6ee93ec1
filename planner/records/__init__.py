"""What travels between the parts: plan, report, profiles, the setup of a run, candidates of a search.

May import the rooms before it (base, models).
"""
