"""Weights that live in host memory: brought to the device for each use, the next one while the last is used.

Those that change at every step also go back, each while the next is computed.

A pass through a model uses its weights in an order that repeats: forward, then backward, where activation checkpointing
runs pieces of the forward again. :class:`HostQueue` remembers that order and starts the copy of the next weight, on a
stream of its own, as soon as one is asked for. The order is a guess that costs time where it is wrong (layers skipped,
run twice or in another order), never a wrong weight: a copy is used only if it is of the very tensors that are asked
for, as they were last written. None is started in one pass for the next, which may be a merge or an export away.

Where host memory is too small, too, weights are in files that are mapped into it, and a thread reads ahead.
"""

from __future__ import annotations

import functools
import logging
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from poetx.errors import UserError
from poetx.files import reason
from poetx.ops.transaction import copy_at_once_

logger = logging.getLogger(__name__)

Tensors = tuple[Tensor, ...]


class Copy:
    """Tensors on their way to ``device``, on a stream of their own where the device has streams."""

    def __init__(self, sources: Tensors, device: torch.device) -> None:
        self._versions = [source._version for source in sources]
        self._sources = tuple(source.detach() for source in sources)  # keeps their memory until they have arrived
        # Memory of the stream that computes: free for its later work as soon as nobody holds it.
        self._copies = tuple(torch.empty_like(source, device=device) for source in self._sources)
        self._device, self._event, self._side = device, None, _stream(device, "in")
        if self._side is not None:  # what used that memory before
            self._side.wait_stream(torch.get_device_module(device).current_stream(device))
        self._start()

    def _start(self) -> None:
        self._bring()

    def _bring(self) -> None:
        if self._side is None:
            self._fill()
            return
        with torch.get_device_module(self._device).stream(self._side):
            self._fill()
            self._event = self._side.record_event()

    def _fill(self) -> None:
        for copy, source in zip(self._copies, self._sources, strict=True):
            copy.copy_(source, non_blocking=True)

    def is_of(self, tensors: Tensors) -> bool:
        """Whether these are what was copied, not written since."""
        same = [_address(t) for t in tensors] == [_address(t) for t in self._sources]
        return same and [t._version for t in tensors] == self._versions

    def arrived(self) -> Tensors:
        """The copies, for work that the current stream does from here on."""
        if self._event is not None:
            torch.get_device_module(self._device).current_stream(self._device).wait_event(self._event)
        return self._copies


class FileCopy(Copy):
    """A copy of tensors in files, which a thread reads into locked memory while others compute.

    From there to the device, for a copy out of memory that is not locked would hold up the thread that starts it.
    """

    def _start(self) -> None:
        self._read = _reader().submit(self._bring)

    def _fill(self) -> None:
        for copy, source in zip(self._copies, self._sources, strict=True):
            there = source.pin_memory() if self._device.type == "cuda" else source
            copy.copy_(there, non_blocking=True)

    def arrived(self) -> Tensors:
        self._read.result()
        return super().arrived()


@functools.cache
def _reader() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "poetx-reader")


class Return:
    """Values on their way into ``targets``, some of them in host memory, on a stream of their own where there are any.

    All in one call, so that whatever interrupts, all are written or none.
    """

    def __init__(self, targets: Sequence[Tensor], values: Sequence[Tensor], device: torch.device) -> None:
        self._targets, self._values, self._device = targets, values, device
        self._side = _stream(device, "out")

    def start(self) -> None:
        if self._side is None:
            self._fill(wait=True)
            return
        module = torch.get_device_module(self._device)
        self._side.wait_stream(module.current_stream(self._device))
        with module.stream(self._side):
            self._fill(wait=False)

    def _fill(self, *, wait: bool) -> None:
        copy_at_once_(self._targets, self._values, wait=wait)

    def over(self, *, on_host: bool = False) -> None:
        """Have the current stream, or with ``on_host`` the caller, wait until nobody reads the values any more."""
        if self._side is not None:
            torch.get_device_module(self._device).current_stream(self._device).wait_stream(self._side)
            if on_host:
                self._side.synchronize()


@functools.cache
def _stream(device: torch.device, way: str) -> Any:
    """The stream that copies to ``device`` ("in") or from there ("out"), or None where there are none."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    return module.Stream(device) if hasattr(module, "Stream") else None  # pyright: ignore[reportOptionalMemberAccess]


class _Use(NamedTuple):
    """One use of a weight: which, its place among all of them, and in what: "forward", "backward" or "step"."""

    address: int
    place: int
    phase: str


def _begins(use: _Use, before: _Use) -> bool:
    """Whether a use can be the first of another pass."""
    return use.phase != "backward" and (use.phase != before.phase or use.place <= before.place)


class _Order:
    """Uses so far, and the guess which come next: those that followed before."""

    def __init__(self) -> None:
        self._uses: list[_Use] = []
        self._next = 0  # what follows is what followed there

    def record(self, use: _Use, limit: int) -> None:
        """Go on in the uses before where they continue like this one; else to the last place that this pair was at.

        Args:
            limit: of uses beyond which half of them are forgotten.
        """
        before = self._uses
        if self._next < len(before) and before[self._next] == use:
            self._next += 1
        else:
            pairs = range(len(before) - 1, 0, -1)
            alike = (place for place in pairs if before[place] == use and before[place - 1] == before[-1])
            self._next = next(alike, len(before)) + 1
        before.append(use)
        if len(before) > limit and self._next > (half := len(before) // 2):
            del before[:half]
            self._next -= half

    def guess(self, number: int) -> list[_Use]:
        return self._uses[self._next : self._next + number]


class HostQueue:
    """Copies of the weights of one model, ahead of their use.

    Args:
        prefetch: weights whose copies are under way, or wait to be used, beyond the one in use. 0: each is waited for.
        keep: weights that stay on the device after their use, the latest, for as long as the pass lasts.
        directory: where the weights are in files that are mapped into memory; None: they are in memory.

    Attributes:
        loads: copies started; moved: their bytes; missed: uses that no copy was there or under way for.
        writes: weights that went back to host memory; returned: their bytes.
    """

    start_copy: Callable[[Tensors, torch.device], Copy] = Copy
    start_read: Callable[[Tensors, torch.device], Copy] = FileCopy
    start_return: Callable[[Sequence[Tensor], Sequence[Tensor], torch.device], Return] = Return

    def __init__(self, prefetch: int = 1, keep: int = 0, directory: Path | None = None) -> None:
        self.prefetch, self.keep, self.directory = prefetch, keep, directory
        self.loads = self.moved = self.missed = self.writes = self.returned = 0
        self._weights: dict[int, tuple[int, Callable[[], Tensors | None]]] = {}
        passes = _Order()
        self._orders = {"forward": passes, "backward": passes, "step": _Order()}  # a step is once in many passes
        self._last: _Use | None = None
        self._ahead: list[tuple[_Use, Copy]] = []
        self._kept: dict[int, Copy] = {}  # the latest last
        self._going: Return | None = None
        self._lock = threading.RLock()  # so that one left by an interrupt does not stop its own thread

    def __reduce__(
        self,
    ) -> Any:  # a copy of a model has weights of its own, in memory, which are met when they are used
        return HostQueue, (self.prefetch, self.keep)

    def meet(self, tensors: Tensors, now: Callable[[], Tensors | None]) -> None:
        """Know the tensors of one weight; ``now`` gives them as they are later, None once they are gone."""
        address = _address(tensors[0])
        place = self._weights[address][0] if address in self._weights else len(self._weights)
        self._weights[address] = place, now
        _QUEUES[address] = self

    def fetch(self, tensors: Tensors, device: torch.device, *, once: bool = False) -> Tensors:
        """The tensors on ``device``, and the copies of those that will be asked for next under way.

        Args:
            once: for an optimizer's step, which does not need them again, whatever :attr:`keep` says.
        """
        address = _address(tensors[0])
        with self._lock:
            phase = "step" if once else "forward" if torch._C._current_graph_task_id() == -1 else "backward"
            use = _Use(address, self._weights[address][0], phase)
            if self._last is not None and _begins(use, self._last):
                self._kept.clear()
            if self._ahead and self._ahead[0][0] == use and self._ahead[0][1].is_of(tensors):
                copy = self._ahead.pop(0)[1]
            else:
                self._drop()
                self.missed += address not in self._kept
                copy = self._start(tensors, device)
            self._last = use
            self._orders[phase].record(use, 16 * len(self._weights))
            self._kept[address] = copy
            self._look_ahead(use, device)
            if once:
                del self._kept[address]
            while len(self._kept) > self.keep:
                del self._kept[next(iter(self._kept))]
            return copy.arrived()

    def write(self, targets: Sequence[Tensor], values: Sequence[Tensor], device: torch.device) -> None:
        """Copy ``values`` into ``targets``, of which the first is in host memory, beside what ``device`` does next.

        :meth:`settle` waits for it.
        """
        self.writes += 1
        self.returned += targets[0].numel() * targets[0].element_size()
        if self._going is not None:
            self._going.over()
        self._going = self.start_return(targets, values, device)  # held first: whatever interrupts, settle() waits
        self._going.start()

    def settle(self) -> None:
        """Wait until everything is written."""
        if self._going is not None:
            self._going.over(on_host=True)
        self._going = None

    def _start(self, tensors: Tensors, device: torch.device) -> Copy:
        kept = self._kept.pop(_address(tensors[0]), None)
        if kept is not None and kept.is_of(tensors):
            return kept
        self.loads += 1
        self.moved += sum(t.numel() * t.element_size() for t in tensors)
        return (self.start_copy if self.directory is None else self.start_read)(tensors, device)

    def _drop(self) -> None:
        for _, copy in self._ahead:
            copy.arrived()  # its memory is written to until then
        self._ahead.clear()

    def _look_ahead(self, use: _Use, device: torch.device) -> None:
        for number, following in enumerate(self._orders[use.phase].guess(self.prefetch)):
            if _begins(following, use):
                return
            use = following
            if number < len(self._ahead):
                continue
            tensors = self._weights[following.address][1]()
            if tensors is None or _address(tensors[0]) != following.address:
                return
            self._ahead.append((following, self._start(tensors, device)))


#: Whose weight a tensor is the first of, by address.
_QUEUES: weakref.WeakValueDictionary[int, HostQueue] = weakref.WeakValueDictionary()


def bring(tensors: Tensors, device: torch.device) -> Tensors:
    """One weight's tensors on ``device``, by way of the queue that has met them, if one has."""
    queue = _QUEUES.get(_address(tensors[0]))
    return Copy(tensors, device).arrived() if queue is None else queue.fetch(tensors, device)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def in_host_memory(tensor: Tensor, device: torch.device, directory: Path | None = None) -> Tensor:
    """A copy of ``tensor`` in :func:`empty_in_host_memory`, or in a file. Meta and fake tensors are given back.

    Args:
        directory: where the file is. It has no name, so it is gone with the tensor or the process, however that ends;
            the system keeps in memory what there is room for, and writes the rest out.

    Raises:
        UserError: there is no such directory, or no room on its disk; or it is in memory itself (tmpfs).
    """
    if not tensor.numel() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return tensor
    empty = empty_in_host_memory(tensor, device) if directory is None else _empty_in_a_file(tensor, directory)
    return empty.copy_(tensor.detach())


def _empty_in_a_file(like: Tensor, directory: Path) -> Tensor:
    size = like.numel() * like.element_size()
    try:
        if _kind_of_disk(directory) in ("tmpfs", "ramfs"):
            raise UserError(f"offload to {directory}: is in memory itself (a tmpfs); give a directory on a disk")
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found now: later it would end the process
            name = f"/proc/self/fd/{file.fileno()}"
            return torch.from_file(name, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
    except (OSError, AttributeError) as error:  # posix_fallocate and /proc are Linux's
        raise UserError(
            f"offload to {directory}: a weight of {size:,} bytes cannot be written there ({reason(error)}); give a "
            "directory on a disk with room for all weights"
        ) from None


@functools.cache
def _kind_of_disk(directory: Path) -> str:
    """The file system's name as Linux gives it; empty where it is not found."""
    device = directory.stat().st_dev
    wanted, table = f"{os.major(device)}:{os.minor(device)}", Path("/proc/self/mountinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    kinds = [line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == wanted]
    return kinds[-1] if kinds else ""


def empty_in_host_memory(like: Tensor, device: torch.device) -> Tensor:
    """Pages of its own for a tensor like ``like``, locked where ``device`` is a GPU: copies need no help of a CPU then.

    Not ``pin_memory``, whose allocator rounds up to powers of two. Of a fake tensor a fake one, which no mode sees.
    """
    if isinstance(like, FakeTensor):
        with _disable_current_modes(), like.fake_mode:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu")
    size = like.numel() * like.element_size()
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    pages = mmap.mmap(-1, size, **flags)
    made = torch.frombuffer(pages, dtype=like.dtype).view(like.shape)
    if device.type == "cuda":
        _lock_pages(pages, made.data_ptr(), size)
    return made


def _lock_pages(pages: mmap.mmap, address: int, size: int) -> None:
    runtime = torch.cuda.cudart()
    status = runtime.cudaHostRegister(address, size, 0)  # pyright: ignore[reportOptionalMemberAccess]
    if int(status):
        _say_unlocked(int(status))
        return
    weakref.finalize(pages, _unlock_pages, address).atexit = False  # pyright: ignore[reportAttributeAccessIssue]


def _unlock_pages(address: int) -> None:
    torch.cuda.synchronize()  # a copy from there may be under way
    torch.cuda.cudart().cudaHostUnregister(address)  # pyright: ignore[reportOptionalMemberAccess]


@functools.cache
def _say_unlocked(status: int) -> None:
    logger.warning(
        "host memory cannot be locked (CUDA error %d): weights are copied to the device more slowly; raise the limit "
        "of locked memory (ulimit -l)",
        status,
    )
