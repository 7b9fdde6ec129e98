from __future__ import annotations

import torch

from diffsparse.eval.backend_states import backend_state
from diffsparse.kernels import block_sparse_eager
from diffsparse.kernels.quantization import QUANTIZED


def test_the_eager_backend_is_right_on_the_cpu_in_every_dtype():
    state = backend_state("eager", "cpu")
    assert state.works
    native = {test.dtype: test for test in state.self_tests if test.precision == "native"}
    # Rounding a right answer costs at most so much.
    for dtype, roundoff in ((torch.float32, 2.0**-20), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        assert 0 < native[dtype].error < roundoff < native[dtype].allowed


def test_a_backend_of_halves_alone_is_tested_in_halves(only_backends):
    def why_not(query, *sizes):
        return "it takes no float32" if query.dtype == torch.float32 else None

    only_backends(halves=(why_not, block_sparse_eager.attend))
    state = backend_state("halves", "cpu")
    tested = [(test.dtype, test.reason) for test in state.self_tests if test.precision == "native"]
    assert tested == [(torch.bfloat16, None), (torch.float16, None)]
    reasons = [test.reason for test in state.self_tests if test.precision != "native"]
    assert reasons == [f"it does not compute in {name}" for name in QUANTIZED]


def test_a_backend_that_takes_a_precision_but_not_native_does_not_work(only_backends):
    def why_not(query, query_block_size, key_block_size, precision="native"):
        return "it takes INT8 alone" if precision != "int8" else None

    only_backends(eager=(why_not, block_sparse_eager.attend))
    state = backend_state("eager", "cpu")
    assert {test.precision: test.reason for test in state.self_tests}["int8"] == "the reference itself"
    assert not state.works
