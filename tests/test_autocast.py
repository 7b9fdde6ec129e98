"""Sparse attention under torch.autocast, held to what torch's own attention does there."""

import pytest
import torch
import torch.nn.functional as F
from enabled import DENSE, FULL, SPARSE, report_of, run
from tiny_models import TINY

import diffsparse  # noqa: F401
from diffsparse.autocast import as_autocast, without_autocast
from diffsparse.session import Session
from diffsparse.steps import Step

FAMILIES = [name for name in TINY if TINY[name].compiled]


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture(params=FAMILIES)
def tiny(request):
    return TINY[request.param]


def run_cast(model, call):
    with autocast():
        return run(model, call)


def test_dense_calls_are_bit_equal_to_stock(tiny):
    model = tiny.make()
    call = tiny.call(model, tiny.grid)
    stock = run_cast(model, call)
    model.enable_sparse_attention(DENSE)
    assert torch.equal(run_cast(model, call), stock)


def test_full_density_is_as_exact_as_stock(tiny):
    model = tiny.make()
    call = tiny.call(model, tiny.grid)
    exact, stock = run(model, call), run_cast(model, call)
    model.enable_sparse_attention(FULL)
    output = run_cast(model, call)
    assert output.dtype == stock.dtype
    # Both are off by what autocast leaves of the projections' precision, and by the order of sums in attention.
    assert (output - exact).norm() <= 2 * (stock - exact).norm()
    assert report_of(model).density == 1


def test_tensors_without_numbers_are_compiled_as_they_are():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: as_autocast(x) + 1, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2, device="meta")).dtype == torch.float32


# One calls attention through diffusers, the other as torch's own function.
@pytest.mark.parametrize("tiny", ["wan", "cogvideox"], indirect=True)
def test_compiled_blocks_run_sparse(tiny):
    eager, compiled = tiny.make(), tiny.make()
    call = tiny.call(eager, tiny.grid)
    for model in (eager, compiled):
        model.enable_sparse_attention(SPARSE)
    torch._dynamo.reset()
    for name in tiny.layers:
        compiled.get_submodule(name).compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run_cast(compiled, call), run_cast(eager, call))
    assert report_of(compiled).sparse_calls == report_of(eager).sparse_calls > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_inputs_become_what_torch_makes_of_them(dtype):
    x = torch.ones(1, 2, 3, 4, dtype=dtype)
    assert as_autocast(x) is x
    with autocast():
        assert as_autocast(x).dtype == F.scaled_dot_product_attention(x, x, x).dtype
        mask = torch.ones(3, 3, dtype=torch.bool)
        assert as_autocast(mask) is mask


def test_without_autocast_products_keep_their_dtype():
    x = torch.ones(3, 3)
    with autocast():
        with without_autocast(x.device):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_a_session_takes_inputs_of_several_dtypes():
    class Anything:
        name, padding_mask, text_apart = "anything", False, None

    session = Session("model", Anything(), ("layer",), FULL)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 3 * 5 * 7, 16, generator=generator) for _ in range(3))
    value = value.bfloat16()
    session.begin(Step(0, 4, None, is_first_of_generation=True), (3, 5, 7, 0, 0))
    with autocast():
        output = session.attend(0, query, key, value, None, None)
        stock = F.scaled_dot_product_attention(query, key, value)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert output.dtype == stock.dtype
    assert (output - exact).norm() <= 2 * (stock - exact).norm()
