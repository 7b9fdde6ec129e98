"""The part of Gluon that the Hopper kernel is written in, on the CPU: what it computes, and whether its barriers hold.

A warpgroup is a thread here, and so is the copy engine. What is asynchronous on a GPU happens as late as it may or as
early, by chance: copies come in any order, memory that a copy will fill holds nonsense from the moment it is asked for,
and matrix products read their operands when they are started or not before they are waited for. So a tile that is
taken too early or freed too early gives a wrong result, and a barrier that nobody passes a deadlock, which is an error
here. Registers, layouts and speed are the compiler's business, and not seen.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from importlib import import_module
from types import ModuleType, SimpleNamespace

import torch
import triton.experimental
from gluon_machine import (
    Barrier,
    Barriers,
    CopyEngine,
    Descriptor,
    DType,
    Layout,
    Pointer,
    Product,
    Program,
    Real,
    Shared,
    Value,
    Whole,
    load,
    running,
    store,
    value_of,
)

from diffsparse import kernels

KERNEL_FILES = ("tiles", "lists", "products", "attention", "copies", "kernel")


class Kernel:
    """A function of the kernel's text; as a kernel, launched over a grid."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments, **options):
        return self.function(*arguments, **options)

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, enable_fp_fusion, **constants):
            assert enable_fp_fusion, "products are exact here, as they are with it"
            arguments = [Pointer.to(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            for Program.number in range(grid[0]):
                Program.engine = CopyEngine()
                try:
                    self.function(*arguments, **constants)
                finally:
                    Program.engine.end()

        return launch


def warp_specialize(partitions, warps, registers):
    """Each partition in a thread of its own; the first failure is the program's."""
    failures = []

    def run(function, arguments):
        try:
            function(*arguments)
            assert all(product.result is not None for product in running().products), "a product that nobody waits for"
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def allocate_shared_memory(dtype, shape, layout):
    if layout == "barrier":
        return Barrier() if shape == [1] else Barriers(shape[0])
    memory = Shared(torch.empty(shape, dtype=dtype.torch), dtype)
    memory.spoil()
    return memory


def warpgroup_mma(left, right, total, use_acc=True, is_async=False):
    assert is_async
    for operand in (left, right):
        assert not (isinstance(operand, Shared) and operand.written[0]), "written, and no fence before the product"
    whole = right.dtype == torch.int8

    def compute():
        numbers = getattr(left, "numbers", left)
        # Of whole numbers exact in float64; of others an fp32 sum, as the tensor cores'.
        exact = torch.float64 if whole else torch.float32
        # A product may be added to one that runs: they come one after the other.
        start = total.finish() if isinstance(total, Product) else total
        product = (numbers.to(exact) @ right.numbers.to(exact)).to(start.dtype).as_subclass(Value)
        return start + product if use_acc else product

    product = Product(compute)
    running().products.append(product)
    return product


def warpgroup_mma_wait(num_outstanding, deps):
    products = running().products
    done = products[: len(products) - num_outstanding]
    for product in done:
        product.finish()
    running().products = products[len(done) :]
    results = []
    for x in deps:
        assert not isinstance(x, Product) or x in done, "a product that may still run"
        results.append(x.result if isinstance(x, Product) else x)
    return results[0] if len(results) == 1 else tuple(results)


def fence_async_shared():
    for written in running().written:
        written[0] = False
    running().written.clear()


def copy_to_shared(descriptor, place, barrier, tile):
    assert tile.shape == list(descriptor.tile)
    tile.spoil()

    def job():
        descriptor.read(place, tile)
        barrier.change(more_bytes=-descriptor.block_type.nbytes)

    Program.engine.ask(job)


def four_fp8(asm, constraints, numbers, dtype, is_pure, pack):
    """The only machine code in the kernel's text: four numbers in FP8, the first in the lowest byte."""
    assert asm.count("cvt.rn.satfinite.e4m3x2.f32") == 2
    packed = torch.stack([x.clamp(-448, 448).to(torch.float8_e4m3fn) for x in numbers], -1).contiguous()
    return packed.view(dtype.torch)[..., 0].as_subclass(Value)


def arrive(barrier, count):
    barrier.change(arrivals=count)
    # Now and then the others get far before this thread goes on.
    if random.random() < 0.2:
        time.sleep(5e-4)


def constexpr(x):
    return Whole(x) if isinstance(x, int) else Real(x)


def jit(function=None, do_not_specialize=()):
    return Kernel if function is None else Kernel(function)


def number(function):
    return lambda *values: function(*(value_of(x) for x in values)).as_subclass(Value)


def _fakes():
    language = SimpleNamespace(
        constexpr=constexpr,
        shared_memory_descriptor=Shared,
        constexpr_function=lambda function: function,
        static_range=range,
        program_id=lambda axis: value_of(Program.number),
        num_warps=lambda: 4,
        load=load,
        store=store,
        arange=lambda first, end, layout=None: value_of(torch.arange(first, end)),
        zeros=lambda shape, dtype, layout=None: value_of(torch.zeros(shape, dtype=dtype.torch)),
        full=lambda shape, x, dtype, layout=None: (
            value_of(torch.full(shape, float(x)).to(dtype.torch))
            if dtype != torch.int32
            else value_of(torch.full(shape, int(x), dtype=torch.int32))
        ),
        where=number(torch.where),
        exp2=number(torch.exp2),
        log2=number(torch.log2),
        # As on a GPU, a number is taken before what is none.
        minimum=number(torch.fmin),
        maximum=number(torch.fmax),
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        split=lambda x: x.unbind(-1),
        join=lambda first, second: torch.stack([first, second], -1),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        inline_asm_elementwise=four_fp8,
        allocate_shared_memory=allocate_shared_memory,
        warp_specialize=warp_specialize,
        **{
            name: DType(dtype)
            for name, dtype in {
                "int8": torch.int8,
                "int32": torch.int32,
                "int64": torch.int64,
                "float32": torch.float32,
                "float8e4nv": torch.float8_e4m3fn,
            }.items()
        },
        **dict.fromkeys(
            (
                "BlockedLayout",
                "SliceLayout",
                "DotOperandLayout",
                "NVMMADistributedLayout",
                "NVMMASharedLayout",
                "SwizzledSharedLayout",
            ),
            Layout,
        ),
    )
    barriers = SimpleNamespace(
        MBarrierLayout=lambda: "barrier",
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, size: barrier.change(arrivals=1, more_bytes=size),
        arrive=arrive,
        wait=lambda barrier, phase: barrier.wait(phase),
    )
    copies = SimpleNamespace(async_load=copy_to_shared)
    name = "triton.experimental.gluon"
    contents = {
        name: {"jit": jit, "constexpr_function": lambda function: function, "language": language},
        f"{name}.language": vars(language),
        f"{name}.language.nvidia": {},
        f"{name}.language.nvidia.hopper": {
            "mbarrier": barriers,
            "tma": copies,
            "warpgroup_mma": warpgroup_mma,
            "warpgroup_mma_wait": warpgroup_mma_wait,
            "fence_async_shared": fence_async_shared,
        },
        f"{name}.nvidia": {},
        f"{name}.nvidia.hopper": {"TensorDescriptor": Descriptor},
    }
    modules = {}
    for path, attributes in contents.items():
        modules[path] = ModuleType(path)
        vars(modules[path]).update(attributes)
    modules[name].language = modules[f"{name}.language"]
    return modules


def block_sparse_gluon_on_cpu():
    """The module `block_sparse_gluon`, for the CPU. The one for GPUs stays what `import` finds."""
    fakes = _fakes()
    ours = [f"diffsparse.kernels.hopper_{name}_gluon" for name in KERNEL_FILES]
    ours.append("diffsparse.kernels.block_sparse_gluon")
    before = {name: sys.modules.pop(name) for name in [*fakes, *ours] if name in sys.modules}
    attribute = getattr(triton.experimental, "gluon", None)
    sys.modules.update(fakes)
    triton.experimental.gluon = fakes["triton.experimental.gluon"]
    try:
        return import_module(ours[-1])
    finally:
        for name in [*fakes, *ours]:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        for name in ours:
            # What `from diffsparse.kernels import` finds first.
            vars(kernels).pop(name.rpartition(".")[2], None)
        if attribute is None:
            del triton.experimental.gluon
        else:
            triton.experimental.gluon = attribute
