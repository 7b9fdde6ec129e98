"""Triton kernels where there is no GPU: run by the interpreter, compiled, and their launches counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode


def passes_in_the_interpreter(file: Path) -> None:
    """Run the tests of a file in a process of its own, since Triton interprets all kernels of a process or none."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def compile_for(capability, kernel, pointers, constants, even=(), options=None):
    """Compile as at a launch: pointers are aligned, and numbers that are 1 are constants.

    `pointers` are the types of those arguments that are no int32, `even` the numbers that are multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffsparse.kernels.launch import FUSION

    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = [
        i
        for i, parameter in enumerate(kernel.params)
        if (signature[parameter.name].startswith("*") and not parameter.do_not_specialize_on_alignment)
        or parameter.name in even
    ]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=(options or {}) | FUSION)


class Operators(TorchDispatchMode):
    """The operators that ran, views aside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.seen.append(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


class Launches:
    """In place of a kernel: counts how often it is launched, and on which grid."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.grids.append(grid)
