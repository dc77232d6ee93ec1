"""What every other room stands on: sizes and units, errors, files, names, the base of every record.

May import no other room.
"""
