from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch

from diffsparse.kernels import backends, block_sparse, block_sparse_eager
from diffsparse.kernels.backends import available_backends
from diffsparse.kernels.block_sparse import block_sparse_attention, check_lists
from diffsparse.kernels.reorder import in_order
from diffsparse.kernels.self_test import largest_error, self_test


def make_arguments(**changes):
    """Arguments that fit, 105 tokens in query blocks of 32 and key blocks of 16, with the given ones in their place."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 105, 32, generator=generator) for _ in range(3))
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "key_blocks": torch.rand(2, 3, 4, 7, generator=generator).argsort(dim=-1).to(torch.int32),
        "counts": torch.randint(1, 8, (2, 3, 4), generator=generator, dtype=torch.int32),
        "query_block_size": 32,
        "key_block_size": 16,
    }
    return {**arguments, **changes}


def test_the_output_is_the_eager_backend_s():
    arguments = make_arguments()
    expected = block_sparse.import_module("diffsparse.kernels.block_sparse_eager").attend(
        **arguments, key_length=None, tail=None, scale=0.3, return_lse=True
    )
    actual = block_sparse_attention(**arguments, scale=0.3, return_lse=True)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected))
    assert torch.equal(block_sparse_attention(**arguments, scale=0.3, backend="eager"), expected[0])


def test_the_default_scale_is_one_over_the_root_of_the_head_dim():
    arguments = make_arguments()
    assert torch.equal(block_sparse_attention(**arguments), block_sparse_attention(**arguments, scale=32**-0.5))


def test_queries_and_keys_may_differ_in_number():
    key = torch.randn(2, 3, 50, 32)
    key_blocks = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4)
    counts = torch.full((1, 1, 4), 4, dtype=torch.int32)
    arguments = make_arguments(key=key, value=key, key_blocks=key_blocks, counts=counts)
    dense = torch.nn.functional.scaled_dot_product_attention(arguments["query"], key, key)
    torch.testing.assert_close(block_sparse_attention(**arguments), dense)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [[1.0]]}, TypeError, "`query` must be a tensor .* got list"),
        (
            {"query": torch.ones(2, 105, 32)},
            ValueError,
            r"`query` must be \[B, H, S, D\].* got the shape \(2, 105, 32\)",
        ),
        ({"query": torch.ones(2, 3, 0, 32)}, ValueError, "`query` must be .* not empty"),
        ({"query": torch.ones(2, 3, 105, 32).double()}, TypeError, "`query` must be float32, .* got torch.float64"),
        ({"key": torch.ones(2, 3, 105, 32).half()}, TypeError, "`key` must have query's dtype torch.float32, got"),
        (
            {"value": torch.ones(2, 3, 105, 32, device="meta")},
            ValueError,
            "`value` must be on query's device cpu, got meta",
        ),
        ({"key": torch.ones(2, 1, 105, 32)}, ValueError, r"`key` must have query's batch, heads .* Repeat keys"),
        ({"value": torch.ones(2, 3, 104, 32)}, ValueError, "`value` must have as many tokens as key, 105, got 104"),
        (
            dict.fromkeys(("query", "key", "value"), torch.ones(2, 3, 105, 257)),
            ValueError,
            "at most 256, got 257. Use dense",
        ),
        (
            {"key": torch.ones(2, 3, 105, 32, requires_grad=True)},
            ValueError,
            "`key` requires grad, .* Use dense attention",
        ),
        ({"query_block_size": 0}, ValueError, "`query_block_size` must be at least one token, got 0"),
        ({"key_block_size": -16}, ValueError, "`key_block_size` must be at least one token, got -16"),
        ({"key_block_size": 16.0}, TypeError, "`key_block_size` must be a whole number of tokens, got 16.0"),
        ({"key_blocks": [[0]]}, TypeError, "`key_blocks` must be a tensor .* got list"),
        (
            {"key_blocks": torch.zeros(2, 3, 4, 7).long()},
            TypeError,
            r"`key_blocks` must be torch.int32, got torch.int64",
        ),
        (
            {"key_blocks": torch.zeros(2, 3, 5, 7).int()},
            ValueError,
            r"`key_blocks` must be .*\(2, 3, 4, C\), got .* 5, 7",
        ),
        (
            {"key_blocks": torch.zeros(2, 3, 4, 0).int()},
            ValueError,
            r"`key_blocks` must be .* got the shape \(2, 3, 4, 0\)",
        ),
        ({"counts": torch.ones(2, 3, 4)}, TypeError, "`counts` must be torch.int32, got torch.float32"),
        (
            {"counts": torch.ones(2, 2, 4).int()},
            ValueError,
            r"`counts` must be .*\(2, 3, 4\), got the shape \(2, 2, 4\)",
        ),
        ({"counts": torch.ones(2, 3, 4, device="meta").int()}, ValueError, "`counts` must be on query's device cpu"),
        (
            {"key_length": torch.ones(1).int()},
            ValueError,
            r"`key_length` must be \[B\], here \(2\), got the shape \(1,\)",
        ),
        ({"key_length": torch.ones(2)}, TypeError, "`key_length` must be torch.int32"),
        ({"tail": torch.ones(2, 3)}, TypeError, "`tail` must be torch.bool"),
        (
            {"tail": torch.ones(3, 3).bool()},
            ValueError,
            r"`tail` must be \[B\|1, H\|1\].*\(2, 3\), got the shape \(3, 3\)",
        ),
        ({"query_order": [0]}, TypeError, r"`query_order` must be a tensor \[H\|1, S\] of torch.int64, got list"),
        ({"key_order": torch.zeros(1, 105).int()}, TypeError, "`key_order` must be torch.int64, got torch.int32"),
        (
            {"key_order": torch.zeros(1, 105, device="meta").long()},
            ValueError,
            "`key_order` must be on query's device cpu, got meta",
        ),
        (
            {"query_order": torch.zeros(2, 105).long()},
            ValueError,
            r"`query_order` must be \[H\|1, S\], here \(3 or 1, 105\), got the shape \(2, 105\)",
        ),
        ({"key_order": torch.zeros(3, 104).long()}, ValueError, r"`key_order` must be .* got the shape \(3, 104\)"),
        ({"schedule": [0]}, TypeError, r"`schedule` must be a tensor \[B \* H \* Q\], here \(24,\), .* got list"),
        ({"schedule": torch.zeros(24)}, ValueError, r"`schedule` must be .* torch.int32, got \(24,\) of torch.float32"),
        ({"schedule": torch.zeros(23).int()}, ValueError, r"`schedule` must be .*\(24,\).* got \(23,\)"),
        (
            {"schedule": torch.zeros(24, device="meta").int()},
            ValueError,
            "`schedule` must be on query's device cpu, got meta",
        ),
        ({"backend": "cuda"}, ValueError, f"`backend` must be one of {', '.join(backends.BACKENDS)}, got 'cuda'"),
        (
            {"precision": "fp4"},
            ValueError,
            "`precision` must be one of native, int8, int8_int8, int8_fp8, fp8, int4, got 'fp4'. Leave",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(changes, error, message):
    with pytest.raises(error, match=message):
        block_sparse_attention(**make_arguments(**changes))


def test_tokens_are_taken_in_their_orders():
    query_order, key_order = torch.stack([torch.randperm(105) for _ in range(3)]), torch.randperm(105)[None]
    arguments = make_arguments(tail=torch.tensor([[True]]))
    actual = block_sparse_attention(**arguments, query_order=query_order, key_order=key_order, return_lse=True)
    arguments["query"] = torch.stack([arguments["query"][:, h, order] for h, order in enumerate(query_order)], 1)
    for name in ("key", "value"):
        arguments[name] = arguments[name][:, :, key_order[0]]
    expected = block_sparse_attention(**arguments, return_lse=True)
    for h, order in enumerate(query_order):
        assert all(torch.equal(x[:, h, order], y[:, h]) for x, y in zip(actual, expected))


def test_inputs_that_require_grad_are_fine_without_grad():
    arguments = make_arguments()
    expected = block_sparse_attention(**arguments)
    arguments["query"].requires_grad_()
    with torch.no_grad():
        assert torch.equal(block_sparse_attention(**arguments), expected)


@pytest.mark.parametrize(
    ("key_blocks", "counts", "message"),
    [
        ([[0, 1], [0, 1]], [0, 1], "`counts` must be from 1 to 2, .* from 0 to 1"),
        ([[0, 1], [0, 1]], [1, 3], "`counts` must be from 1 to 2, .* from 1 to 3"),
        ([[0, 7], [0, 1]], [2, 1], "`key_blocks` must list blocks from 0 to 6, got blocks from 0 to 7"),
        ([[0, 1], [-1, 1]], [2, 2], "`key_blocks` must list blocks from 0 to 6, got blocks from -1 to 1"),
        ([[0, 1], [5, 5]], [2, 2], r"`key_blocks` must list a block at most once, got block 5 .* in \[0, 0, 1\]"),
    ],
)
def test_lists_that_cannot_be_are_an_error(key_blocks, counts, message):
    key_blocks = torch.tensor([[key_blocks]], dtype=torch.int32)
    counts = torch.tensor([[counts]], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        check_lists(key_blocks, counts, 7)
    arguments = make_arguments(query_block_size=64, key_blocks=key_blocks, counts=counts)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)


def test_what_lies_beyond_the_counts_may_be_anything():
    key_blocks = torch.tensor([[[[3, 3, -5, 99]]]], dtype=torch.int32)
    check_lists(key_blocks, torch.tensor([[[1]]], dtype=torch.int32), 7)


def test_lists_shared_by_heads_are_checked_for_every_count():
    key_blocks = torch.tensor([[[[3, 4, 4]]]], dtype=torch.int32)
    check_lists(key_blocks, torch.tensor([[[1], [2]]], dtype=torch.int32), 7)
    with pytest.raises(ValueError, match=r"block 4 more than once in \[0, 1, 0\]"):
        check_lists(key_blocks, torch.tensor([[[1], [3]]], dtype=torch.int32), 7)


def test_the_check_of_the_lists_can_be_left_out(monkeypatch):
    monkeypatch.setattr(block_sparse, "check_lists", lambda *args: pytest.fail("checked"))
    block_sparse_attention(**make_arguments(), validate=False)


@pytest.fixture
def picky(monkeypatch):
    """A backend that comes first, and runs nothing but half precision."""
    module = ModuleType("picky_backend")
    module.why_not = lambda query, *sizes: None if query.dtype == torch.float16 else f"{query.dtype} is beneath it"
    module.attend = lambda query, *others, **options: (
        torch.full_like(query, 7),
        torch.zeros(query.shape[:3]),
    )
    monkeypatch.setitem(sys.modules, "picky_backend", module)
    first = {"picky": "picky_backend", **backends.BACKENDS}
    for user in (backends, block_sparse, import_module("diffsparse.kernels.self_test")):
        monkeypatch.setattr(user, "BACKENDS", first)


@pytest.mark.usefixtures("picky")
def test_the_first_backend_that_can_run_is_taken():
    arguments = make_arguments()
    assert torch.equal(block_sparse_attention(**arguments), block_sparse_attention(**arguments, backend="eager"))
    halves = {name: arguments[name].half() for name in ("query", "key", "value")}
    assert (block_sparse_attention(**{**arguments, **halves}) == 7).all()


@pytest.mark.usefixtures("picky")
def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(ValueError, match=r"`backend` 'picky' cannot run here: picky: torch.float32 is beneath it"):
        block_sparse_attention(**make_arguments(), backend="picky")


@pytest.mark.usefixtures("picky")
def test_a_precision_that_the_fastest_backend_lacks_is_an_error_and_not_a_slower_backend():
    arguments = make_arguments()
    halves = {name: arguments[name].half() for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match="`precision` 'int8' cannot run here: picky: it does not compute in int8"):
        block_sparse_attention(**{**arguments, **halves}, precision="int8")
    # Where that backend would not run at all, the next one is not a slower one than without the precision.
    block_sparse_attention(**arguments, precision="int8")
    block_sparse_attention(**{**arguments, **halves}, precision="int8", backend="eager")


def test_what_no_backend_can_is_said_of_what_was_asked_for(monkeypatch):
    """As on a GPU whose FP8 numbers torch does not know: nobody has named a backend that could be left out."""
    knows = {"native"}
    monkeypatch.setattr(block_sparse, "_why_not_trusted", lambda *of_call: None if of_call[3] in knows else "no FP8")
    query = torch.empty(1, 1, 64, 32, device="meta")
    with pytest.raises(ValueError, match=r"^`precision` 'fp8' cannot run here: .*eager: no FP8;.* Take another one of"):
        block_sparse.pick_backend(None, query, 64, 64, "fp8")
    knows.clear()
    with pytest.raises(ValueError, match=r"^Sparse attention cannot run here: .*eager: no FP8;.* Use dense attention"):
        block_sparse.pick_backend(None, query, 64, 64)


@pytest.mark.usefixtures("picky")
def test_a_wrong_backend_fails_its_self_test():
    assert self_test("picky", dtype=torch.float16) > 0.1


@pytest.mark.usefixtures("picky")
@pytest.mark.parametrize(
    "taken",
    [{"query_order", "key_order", "back"}, {"query_order", "key_order"}, {"query_order", "back"}, {"key_order"}],
)
def test_a_backend_that_forgets_an_order_fails_its_self_test(taken):
    def attend(query, key, value, *lists, query_order, key_order, **options):
        if "query_order" in taken:
            query = in_order(query, query_order)
        if "key_order" in taken:
            key, value = in_order(key, key_order), in_order(value, key_order)
        out, lse = block_sparse_eager.attend(query, key, value, *lists, **options)
        if query_order is not None and "back" in taken:
            back = query_order.argsort(-1)
            out, lse = in_order(out, back), in_order(lse[..., None], back)[..., 0]
        return out, lse

    sys.modules["picky_backend"].attend = attend
    error = self_test("picky", dtype=torch.float16)
    assert error > 0.1 if len(taken) < 3 else error < largest_error(torch.float16, "native")


@pytest.mark.usefixtures("picky")
def test_a_backend_can_step_through_key_lengths_by_one():
    def attend(query, *others, key_length, **options):
        lengths.append(key_length)
        return query.clone(), torch.zeros(0)

    lengths = []
    sys.modules["picky_backend"].attend = attend
    arguments = make_arguments(key_length=torch.tensor([50], dtype=torch.int32).expand(2))
    arguments |= {name: arguments[name].half() for name in ("query", "key", "value")}
    block_sparse_attention(**arguments)
    assert lengths[0].stride() == (1,)
    assert lengths[0].tolist() == [50, 50]


@pytest.mark.usefixtures("picky")
def test_a_backend_may_put_tokens_in_order_and_back_itself():
    def attend(query, key, value, *lists, query_order=None, key_order=None, **options):
        orders.append((query_order, key_order))
        return query.clone(), torch.zeros(0)

    orders = []
    sys.modules["picky_backend"].attend = attend
    arguments = make_arguments()
    arguments |= {name: arguments[name].half() for name in ("query", "key", "value")}
    order, every_other = torch.randperm(105)[None], torch.randperm(105).repeat_interleave(2)[None, ::2]
    out = block_sparse_attention(**arguments, query_order=order, key_order=every_other)
    assert torch.equal(out, arguments["query"])
    (query_order, key_order), *more = orders
    assert not more
    assert query_order is order
    # A kernel steps through an order by one.
    assert torch.equal(key_order, every_other)
    assert key_order.stride(1) == 1


@pytest.mark.usefixtures("picky")
@pytest.mark.parametrize("given", [None, torch.arange(24).int()])
def test_a_backend_may_ask_for_a_schedule(given):
    def attend(query, key, value, *lists, schedule, **options):
        schedules.append(schedule)
        return query.clone(), torch.zeros(0)

    schedules = []
    sys.modules["picky_backend"].attend = attend
    arguments = make_arguments()
    arguments |= {name: arguments[name].half() for name in ("query", "key", "value")}
    block_sparse_attention(**arguments, schedule=given)
    assert schedules == [given]


@pytest.mark.parametrize("query_order", [None, torch.randperm(105)[None]])
def test_the_output_lies_as_projections_want_it(query_order):
    assert block_sparse_attention(**make_arguments(), query_order=query_order).transpose(1, 2).is_contiguous()


def test_a_backend_whose_module_is_missing_cannot_run(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "absent", "diffsparse.kernels.absent")
    assert "does not import (No module named" in available_backends("cpu")["absent"]


def test_the_eager_backend_can_always_run():
    assert available_backends("cpu")["eager"] is None


# Each dtype's unit roundoff: what rounding a right answer costs at most.
@pytest.mark.parametrize(
    ("dtype", "roundoff"), [(torch.float32, 2.0**-20), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]
)
def test_self_test_finds_the_eager_backend_right(dtype, roundoff):
    assert 0 < self_test("eager", dtype=dtype) < roundoff


def test_a_default_device_does_not_reach_the_self_test():
    expected = self_test("eager", "cpu")
    with torch.device("meta"):
        assert self_test("eager", "cpu") == expected


@pytest.mark.parametrize(("return_lse", "precision"), [(False, "native"), (True, "native"), (True, "int8_fp8")])
def test_the_operator_is_well_formed(return_lse, precision):
    arguments = make_arguments()
    tail, key_length = torch.tensor([[True]]), torch.tensor([105, 40], dtype=torch.int32)
    halves = [arguments[name].bfloat16() for name in ("query", "key", "value")]
    order = torch.arange(105).flip(0)[None]
    schedule = torch.arange(2 * 3 * 4).int()
    tensors = (*halves, arguments["key_blocks"], arguments["counts"], key_length, tail, order, order, schedule)
    operator = torch.ops.diffsparse.block_sparse_attention.default
    torch.library.opcheck(operator, (*tensors, 32, 16, 0.2, return_lse, precision, None))


def test_it_compiles_into_one_graph():
    arguments = make_arguments(tail=torch.tensor([[True]]), key_length=torch.tensor([105, 40], dtype=torch.int32))

    def attention(query):
        out, lse = block_sparse_attention(**{**arguments, "query": query * 2}, return_lse=True)
        return out + 1, lse

    expected = attention(arguments["query"])
    actual = torch.compile(attention, fullgraph=True, backend="aot_eager")(arguments["query"])
    assert all(torch.equal(x, y) for x, y in zip(actual, expected))
