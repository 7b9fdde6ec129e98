"""How the Triton kernel is compiled, by architecture, head dim and precision: never by the number of tokens.

So a new resolution compiles nothing new. `MEASURED` holds what was found fastest; a line there is all that
another GPU takes. Elsewhere the choice is what fits into shared memory and registers.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffsparse.kernels.quantization import PRECISIONS


@dataclass(frozen=True)
class Tuning:
    """How the kernel is compiled.

    Attributes:
        key_tile: tokens of a key block taken at a time, at most.
        num_warps, num_stages: as in Triton; more stages take more shared memory.
        descriptors: whether keys and values come through the tensor memory accelerator (Hopper or newer).
    """

    key_tile: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


# By compute capability's major number, head dim as padded, and precision, for query blocks of 128.
MEASURED: dict[tuple[int, int, str], Tuning] = {
    # One H200, torch 2.11, triton 3.6: the fastest of 3 to 10 each, at 75,600 (head dim 64: 45,106) tokens, 25 %.
    # In INT8 at head dim 128, four warps and tiles of 64 were faster still without options, and spill much with them.
    (9, 128, "native"): Tuning(128, 8, 3, descriptors=True),
    (9, 128, "int8"): Tuning(128, 8, 3, descriptors=True),
    (9, 128, "int4"): Tuning(128, 8, 3, descriptors=True),
    (9, 128, "int8_fp8"): Tuning(128, 8, 3, descriptors=True),
    (9, 128, "fp8"): Tuning(128, 8, 4, descriptors=True),
    (9, 64, "native"): Tuning(128, 4, 3, descriptors=True),
    (9, 64, "int8"): Tuning(128, 4, 3, descriptors=True),
    (9, 64, "int4"): Tuning(128, 4, 3, descriptors=True),
    (9, 64, "int8_fp8"): Tuning(128, 4, 3, descriptors=True),
    (9, 64, "fp8"): Tuning(128, 4, 3, descriptors=True),
}


def tuning(
    capability: tuple[int, int],
    shared_memory: int,
    query_block_size: int,
    key_block_size: int,
    padded_dim: int,
    precision: str,
    element_size: int,
) -> Tuning:
    """The measured choice, else what fits.

    Args:
        capability: compute capability of the GPU.
        shared_memory: bytes that a program may use.
        query_block_size, key_block_size: in tokens.
        padded_dim: head dim rounded up to a power of two.
        precision: one of `quantization.PRECISIONS`.
        element_size: bytes of a number of query, key and value.
    """
    measured = MEASURED.get((capability[0], padded_dim, precision))
    if measured is not None and query_block_size == 128 and element_size <= 2 and measured.key_tile <= key_block_size:
        return measured
    row = padded_dim * element_size
    num_warps = 8 if query_block_size * row > 64 * 128 else 4
    for key_tile, num_stages in ((64, 3), (64, 2), (32, 2), (32, 1), (16, 1)):
        # The query block, and a key and a value tile for every stage.
        if (query_block_size + 2 * num_stages * key_tile) * row <= 0.8 * shared_memory:
            break
    # Products of 8 bits take 32 keys at least, and their operands half the room.
    if PRECISIONS[precision].values != "native":
        key_tile = max(key_tile, 32)
    # On consumer Blackwell (12.x) pointers are faster than descriptors.
    return Tuning(min(key_tile, key_block_size), num_warps, num_stages, capability[0] in (9, 10))
