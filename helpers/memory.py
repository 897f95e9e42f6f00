"""How much memory a run took."""

from __future__ import annotations

import sys

import torch


def peak_memory_bytes() -> int:
    """The most memory this process has held: of the GPU if there is one, otherwise resident.

    The resident size covers everything in the process, Python and the libraries included.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
