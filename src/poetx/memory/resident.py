"""Memory that the system has given to this process."""

from __future__ import annotations

import sys


def resident_peak() -> int:
    """Largest resident set of the process so far, bytes; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
