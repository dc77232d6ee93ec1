"""Several ranks on one machine: processes that train one adapter together, each with a device of its own.

Imports ``host`` and what stands before it.
"""
