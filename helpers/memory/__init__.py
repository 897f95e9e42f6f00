"""How much memory a training run takes: planned, simulated and measured.

Three views of one number, the bytes in use at the peak of a training step:

    plan        a closed form, written out; for understanding, in no time
    simulate    the real architecture's real step, run on PyTorch's meta device, where tensors have
                a shape and no content; for truth, in seconds, without weights and without a GPU
    measure     the same count around a step with real tensors

On a CPU the last two agree to a fraction of a percent, and the first comes within 5 % of them
(tests/test_memory.py). All count what is asked of the allocator. What a kernel allocates and frees
before it returns, the gaps between tensors, Python and (on a GPU) the CUDA context come on top.
"""

from helpers.memory.measure import Measured, Storages, iter_tensors, measure, peak_memory_bytes
from helpers.memory.plan import plan
from helpers.memory.settings import (
    ARCHITECTURES,
    COMPONENTS,
    DEVICES,
    HEADROOM,
    PLANNED_METHODS,
    Plan,
    Settings,
    will_it_fit,
)
from helpers.memory.simulate import simulate
from helpers.profiles import GIB

__all__ = [
    "ARCHITECTURES",
    "COMPONENTS",
    "DEVICES",
    "GIB",
    "HEADROOM",
    "PLANNED_METHODS",
    "Measured",
    "Plan",
    "Settings",
    "Storages",
    "iter_tensors",
    "measure",
    "peak_memory_bytes",
    "plan",
    "simulate",
    "will_it_fit",
]
