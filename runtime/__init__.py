"""The torch half of MEFT: the CPU-resident sparse adapter, transfers, measurement, training, and ``meft-run``.

From :mod:`meft.planner` it uses the records, what reads profiles, the allocator model, units and errors.
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
"""Where it is installed it warns when it is imported, of a kernel on a hub; nothing here asks for it."""
