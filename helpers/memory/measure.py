"""Memory measured: the bytes that real tensors hold while something runs."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Storages(TorchDispatchMode):
    """While active, follow every storage that an operation reads or makes, until it is freed.

    A storage is the memory behind one or more tensors; views share one, and it counts once.
    A storage that is first seen as an input was there before, so it counts from the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._alive: dict[int, tuple[int, weakref.ref]] = {}  # address -> (number, storage)
        self._sizes: list[int] = []  # by number, in order of appearance
        self._shapes: list[tuple[int, ...]] = []
        self._changes: list[int] = []  # number + 1 where one appears, its negative where it goes
        self._from_the_start: set[int] = set()

    def watch(self, tensor: torch.Tensor, existed: bool = True) -> int:
        """Follow the storage of a tensor; return its number."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return self._alive[address][0]
        number, size = len(self._sizes), storage.nbytes()

        def gone(_: weakref.ref) -> None:
            del self._alive[address]
            self.bytes -= size
            self._changes.append(-(number + 1))

        self._alive[address] = (number, weakref.ref(storage, gone))
        self._sizes.append(size)
        self._shapes.append(tuple(tensor.shape))
        self.bytes += size
        if existed:
            self.peak += size
            self._from_the_start.add(number)
        else:
            self._changes.append(number + 1)
        self.peak = max(self.peak, self.bytes)
        return number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in tree_iter((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self.watch(value)
        result = func(*args, **kwargs)
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.watch(value, existed=False)
        return result

    @property
    def now(self) -> int:
        """The position in time: how many storages have come and gone."""
        return len(self._changes)

    def fullest(self) -> tuple[int, dict[int, tuple[int, tuple[int, ...]]]]:
        """(position in time, {number: (bytes, shape)}) of the moment with the most bytes alive."""
        size = most = sum(self._sizes[number] for number in self._from_the_start)
        when = 0
        for position, change in enumerate(self._changes, start=1):
            size += self._sizes[abs(change) - 1] * (1 if change > 0 else -1)
            if size > most:
                when, most = position, size
        alive = set(self._from_the_start)
        for change in self._changes[:when]:
            if change > 0:
                alive.add(change - 1)
            else:
                alive.discard(-change - 1)
        return when, {number: (self._sizes[number], self._shapes[number]) for number in alive}


def iter_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor | None]:
    """Every tensor that a model holds: parameters, buffers, and the constants of quantization."""
    for module in model.modules():
        yield from module._parameters.values()
        yield from module._buffers.values()
        state = getattr(module, "state", None)  # of a Linear8bitLt
        yield from (getattr(state, name, None) for name in ("CB", "SCB"))
    for parameter in model.parameters():
        yield from (getattr(parameter, name, None) for name in ("CB", "SCB"))
        if (state := getattr(parameter, "quant_state", None)) is not None:  # of a Params4bit
            yield from (state.absmax, state.code, state.offset)
            if state.state2 is not None:
                yield from (state.state2.absmax, state.state2.code)


@dataclasses.dataclass
class Measured:
    """What `measure` found, in bytes: the model alone, and the fullest moment, model included."""

    baseline_bytes: int = 0
    peak_bytes: int = 0


@contextlib.contextmanager
def measure(model: torch.nn.Module) -> Iterator[Measured]:
    """Measure the memory of what runs in the block: `with measure(model) as measured: step()`.

    On a CPU every storage is followed (`Storages`). On a GPU PyTorch's allocator
    counts by itself, and its count is taken.

    Yields:
        A `Measured`; complete when the block has ended.
    """
    measured = Measured()
    tensors = [tensor for tensor in iter_tensors(model) if isinstance(tensor, torch.Tensor)]
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        measured.baseline_bytes = torch.cuda.memory_allocated()
        try:
            yield measured
        finally:
            torch.cuda.synchronize()
            measured.peak_bytes = torch.cuda.max_memory_allocated()
        return
    storages = Storages()
    for tensor in tensors:
        storages.watch(tensor)
    del tensors
    measured.baseline_bytes = storages.bytes
    try:
        with storages:
            yield measured
    finally:
        measured.peak_bytes = storages.peak


def peak_memory_bytes(device: str = "cpu") -> int:
    """The most memory this process has held, in bytes.

    Args:
        device: "cuda" for what torch allocated on the GPU; "cpu" for the resident size, which
            covers everything in the process, Python and the libraries included.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
