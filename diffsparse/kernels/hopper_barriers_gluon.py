"""Hardware barriers of the Hopper kernel: which memory is free, and whose turn it is to multiply.

Every warp arrives by itself and goes on. At an mbarrier one thread arrives for a warpgroup, which has to wait for its
slowest warp first, several times a tile: in INT8 that cost a tenth of the speed.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Waits for the warps of its own warpgroup; Triton 3.6 has another name for it.
wait_for_warps = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
KEYS = gl.constexpr(0)
VALUES = gl.constexpr(1)
# Of sixteen barriers in a processor Triton takes the first four for kernels of three parts. Ours are the last ones.
_NUM_BARRIERS = gl.constexpr(16)
# Two warpgroups; with them the copying warp.
_ARRIVE_FREE = gl.constexpr("{ bar.arrive $1, 288; mov.b32 $0, 0; }")
_WAIT_FREE = gl.constexpr("{ bar.sync $1, 288; mov.b32 $0, 0; }")
_ARRIVE_TURN = gl.constexpr("{ bar.arrive $1, 256; mov.b32 $0, 0; }")
_WAIT_TURN = gl.constexpr("{ bar.sync $1, 256; mov.b32 $0, 0; }")


@gluon.jit
def is_free(TILES: gl.constexpr, stage, STAGES: gl.constexpr):
    """Tell the copying warp that this warpgroup is done with what a stage holds, of `KEYS` or of `VALUES`."""
    _at_barrier(_ARRIVE_FREE, _NUM_BARRIERS - (2 - TILES) * STAGES + stage)


@gluon.jit
def wait_until_free(TILES: gl.constexpr, stage, STAGES: gl.constexpr):
    """Wait until both warpgroups are done with what a stage holds, of `KEYS` or of `VALUES`."""
    _at_barrier(_WAIT_FREE, _NUM_BARRIERS - (2 - TILES) * STAGES + stage)


@gluon.jit
def wait_for_turn(PART: gl.constexpr, STAGES: gl.constexpr):
    """Wait until the other warpgroup, the part that this one is not, has passed the turn."""
    _at_barrier(_WAIT_TURN, _NUM_BARRIERS - 2 * STAGES - 2 + PART)


@gluon.jit
def pass_turn(PART: gl.constexpr, STAGES: gl.constexpr):
    """Let the other warpgroup start its products."""
    _at_barrier(_ARRIVE_TURN, _NUM_BARRIERS - 2 * STAGES - 1 - PART)


@gluon.jit
def _at_barrier(INSTRUCTION: gl.constexpr, barrier):
    # A number, or the compiler would not take what it knows for an operand.
    barrier = gl.to_tensor(barrier)
    gl.inline_asm_elementwise(INSTRUCTION, "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)
