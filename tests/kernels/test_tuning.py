from __future__ import annotations

import itertools

import pytest

from diffsparse.kernels.cross_compile_triton import SHARED_MEMORY
from diffsparse.kernels.quantization import PRECISIONS
from diffsparse.kernels.tuning import tuning


@pytest.mark.parametrize("precision", [name for name, formats in PRECISIONS.items() if formats.values != "native"])
def test_products_of_8_bits_take_32_keys_at_a_time(precision):
    blocks, dims, sizes = itertools.product((16, 128), (32, 64, 128)), (32, 64, 128, 256), (2, 4)
    for (capability, memory), (query, key), dim, size in itertools.product(SHARED_MEMORY.items(), blocks, dims, sizes):
        key_tile = tuning(divmod(capability, 10), memory, query, key, dim, precision, size).key_tile
        assert 32 <= key_tile <= key
        assert key % key_tile == 0
