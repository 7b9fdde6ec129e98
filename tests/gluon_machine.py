"""What the Hopper kernel runs on, on the CPU: numbers, memories, barriers, products and the copy engine.

For `gluon_on_cpu.py`. What is asynchronous on a GPU happens as late as it may or as early, by chance.
"""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import torch

SECONDS_UNTIL_DEADLOCK = 20.0


class DType:
    """A number format by Gluon's name for it."""

    def __init__(self, dtype):
        self.torch = dtype
        self.primitive_bitwidth = 8 * dtype.itemsize

    def __eq__(self, other):
        return self.torch == getattr(other, "torch", other)

    def __hash__(self):
        return hash(self.torch)


class Value(torch.Tensor):
    """A tensor or a number in registers."""

    type = property(lambda self: SimpleNamespace(layout=None))

    def to(self, dtype, bitcast=False):
        dtype = getattr(dtype, "torch", dtype)
        return self.view(dtype) if bitcast else super().to(dtype)

    def __mul__(self, other):
        if self.is_floating_point() and isinstance(other, Value) and self.ndim == other.ndim == 0:
            # Scales of scales are kept as they are in a register.
            return super().__mul__(other).float()
        # A GPU adds to the exact product, which the kernel relies on.
        return super().__mul__(other) if self.dtype != torch.float32 else torch.mul(self.double(), other)

    # `x *= y` is a new x in the kernel's text.
    __rmul__ = __imul__ = __mul__
    __iadd__ = torch.Tensor.__add__


class Whole(int):
    """A whole number that the kernel's text calls a constant."""

    value = property(int)


class Real(float):
    value = property(float)


class Layout:
    """Where numbers lie: of no account here."""

    def __init__(self, *what, **more):
        pass


def value_of(x):
    return x if isinstance(x, Value) else torch.as_tensor(x).as_subclass(Value)


class Pointer:
    """Numbers in global memory from a place on, or at several."""

    def __init__(self, numbers, offset=0):
        self.numbers, self.offset = numbers, offset
        self.dtype = SimpleNamespace(element_ty=DType(numbers.dtype))

    @classmethod
    def to(cls, x):
        """To a tensor, as it lies in memory."""
        size = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        return cls(x.as_strided((size,), (1,), x.storage_offset()))

    def __add__(self, offset):
        return Pointer(self.numbers, self.offset + offset)

    def places(self, mask):
        places = value_of(self.offset).long()
        mask = torch.ones(places.shape, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        inside = (places >= 0) & (places < len(self.numbers))
        assert (inside | ~mask).all(), "access beyond a tensor"
        return places, mask


def load(pointer, mask=None, other=0):
    places, mask = pointer.places(mask)
    numbers = pointer.numbers[torch.where(mask, places, 0)]
    # In float64, which holds them all: FP8 knows no `where`.
    return torch.where(mask, numbers.double(), other).to(numbers.dtype).as_subclass(Value)


def store(pointer, value, mask=None):
    places, mask = pointer.places(mask)
    mask = mask.expand(places.shape)
    pointer.numbers[places[mask]] = value.expand(places.shape)[mask].to(pointer.numbers.dtype)


class Shared:
    """Shared memory. `written` says whether a thread has written what the copy engine and products may not see yet."""

    def __init__(self, numbers, dtype, written=None):
        self.numbers, self.dtype = numbers, dtype
        self.written = [False] if written is None else written
        self.shape = list(numbers.shape)
        self.parts = {}

    def index(self, place):
        place = int(place)
        return self.parts.setdefault(place, Shared(self.numbers[place], self.dtype))

    def slice(self, first, size):
        return Shared(self.numbers[first : first + size], self.dtype, self.written)

    def permute(self, order):
        return Shared(self.numbers.permute(order), self.dtype, self.written)

    def reinterpret(self, dtype, shape, layout):
        count = torch.Size(shape).numel() * dtype.torch.itemsize
        bytes_of_it = self.numbers.view(torch.uint8).flatten()
        assert count == len(bytes_of_it)
        return Shared(bytes_of_it.view(dtype.torch).view(shape), dtype)

    def load(self, layout):
        return self.numbers.clone().as_subclass(Value)

    def store(self, value):
        assert (value.dtype, list(value.shape)) == (self.dtype.torch, self.shape)
        self.numbers.copy_(value)
        self.written[0] = True
        running().written.append(self.written)

    def spoil(self):
        """Fill it with nonsense."""
        self.numbers.copy_(torch.full((), 85 if self.dtype == torch.int8 else float("nan")).to(self.dtype.torch))


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self):
        self.condition = threading.Condition()
        self.phase = self.missing = self.bytes = self.count = 0

    def index(self, place):
        raise TypeError("a barrier is one already")

    def init(self, count):
        self.missing = self.count = count

    def change(self, arrivals=0, more_bytes=0):
        with self.condition:
            assert self.count > 0, "a barrier that is not initialised"
            self.missing -= arrivals
            self.bytes += more_bytes
            assert self.missing >= 0, "more arrivals than a barrier counts"
            if self.missing == self.bytes == 0:
                self.phase ^= 1
                self.missing = self.count
                self.condition.notify_all()

    def wait(self, phase):
        with self.condition:
            passed = self.condition.wait_for(lambda: self.phase != int(phase), SECONDS_UNTIL_DEADLOCK)
            assert passed, "a barrier that nobody lets pass"


class Barriers:
    def __init__(self, count):
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, place):
        return self.barriers[int(place)]


class Product:
    """A matrix product that may still run."""

    def __init__(self, compute):
        self.compute, self.result = compute, None
        if random.random() < 0.5:
            self.finish()

    def finish(self):
        if self.result is None:
            self.result = self.compute()
        return self.result


class Descriptor:
    """What the copy engine takes tiles [rows, columns] of x [B, H, S, D] by; zeros beyond its end."""

    def __init__(self, base, shape, strides, block_shape, layout):
        assert shape == list(base.shape)
        assert block_shape[:2] == [1, 1]
        assert strides[3] == 1
        assert base.data_ptr() % 16 == 0
        assert all(step * base.element_size() % 16 == 0 for step in strides[:3])
        self.base, self.tile, self.layout = base, block_shape[2:], layout
        self.dtype = DType(base.dtype)
        self.block_type = SimpleNamespace(nbytes=torch.Size(self.tile).numel() * base.element_size())

    def read(self, place, tile):
        b, h, first, column = (int(x) for x in place)
        assert first >= 0
        assert column >= 0
        part = self.base[b, h, first : first + self.tile[0], column : column + self.tile[1]]
        tile.numbers.copy_(torch.zeros((), dtype=self.base.dtype))
        tile.numbers[: part.shape[0], : part.shape[1]] = part


class CopyEngine:
    """Does what it is asked for one thing after the other, in any order, in a thread of its own."""

    def __init__(self):
        self.jobs, self.condition, self.ends = [], threading.Condition(), False
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def ask(self, job):
        with self.condition:
            self.jobs.append(job)
            self.condition.notify()

    def run(self):
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.jobs or self.ends)
                if not self.jobs:
                    return
                job = self.jobs.pop(random.randrange(len(self.jobs)))
            job()

    def end(self):
        with self.condition:
            self.ends = True
            self.condition.notify()
        self.thread.join()


class Warps(threading.local):
    """What a thread, which stands for a warpgroup or a warp, has started."""

    def __init__(self):
        self.products, self.written = [], []


class Program:
    """The program that runs: one after the other does."""

    number = 0
    engine = None
    warps = Warps()


def running():
    return Program.warps
