from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffsparse.kernels import block_sparse_eager


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(
    *,
    batch=1,
    heads=2,
    num_queries=105,
    num_keys=None,
    head_dim=32,
    query_block_size=32,
    key_block_size=16,
    lengths=None,
    tail=None,
    dtype=torch.float32,
    shared_lists=False,
    seed=0,
):
    """Random inputs of `attend`: lists of random length in random order, with nonsense after their counts."""
    generator = torch.Generator().manual_seed(seed)
    num_keys = num_queries if num_keys is None else num_keys
    query = torch.randn(batch, heads, num_queries, head_dim, generator=generator).to(dtype)
    key, value = (torch.randn(batch, heads, num_keys, head_dim, generator=generator).to(dtype) for _ in range(2))
    rows, columns = -(-num_queries // query_block_size), -(-num_keys // key_block_size)
    leading = (1, 1) if shared_lists else (batch, heads)
    counts = torch.randint(1, columns + 1, (*leading, rows), generator=generator, dtype=torch.int32)
    key_blocks = torch.rand(*leading, rows, columns, generator=generator).argsort(dim=-1).to(torch.int32)
    key_blocks[torch.arange(columns) >= counts[..., None]] = -7
    return SimpleNamespace(
        query=query,
        key=key,
        value=value,
        key_blocks=key_blocks,
        counts=counts,
        query_block_size=query_block_size,
        key_block_size=key_block_size,
        key_length=None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
        tail=None if tail is None else torch.tensor(tail),
        scale=head_dim**-0.5,
        return_lse=True,
    )


def attend(inputs, **changes):
    return block_sparse_eager.attend(**{**vars(inputs), **changes})


def reference(inputs, precision=torch.float64):
    """Row by row, with every key that the row sees written out; weights and values in the given precision."""
    wide = torch.float64 if precision == torch.float64 else torch.float32
    query, key, value = (x.to(wide) for x in (inputs.query, inputs.key, inputs.value))
    batch, heads = query.shape[:2]
    out, lse = torch.zeros(query.shape, dtype=wide), torch.full(query.shape[:3], -math.inf, dtype=wide)
    key_blocks = inputs.key_blocks.expand(batch, heads, -1, -1)
    counts = inputs.counts.expand(batch, heads, -1)
    for b, h, i in itertools.product(range(batch), range(heads), range(counts.shape[2])):
        length = key.shape[2] if inputs.key_length is None else min(int(inputs.key_length[b]), key.shape[2])
        listed = set(key_blocks[b, h, i, : counts[b, h, i]].tolist())
        keys, values, bias = [], [], []
        for block, start in enumerate(range(0, length, inputs.key_block_size)):
            tokens = slice(start, min(start + inputs.key_block_size, length))
            if block in listed:
                keys.append(key[b, h, tokens])
                values.append(value[b, h, tokens])
                bias += [0.0] * len(keys[-1])
            elif inputs.tail is not None and inputs.tail.expand(batch, heads)[b, h]:
                keys.append(key[b, h, tokens].mean(dim=0, keepdim=True))
                values.append(value[b, h, tokens].mean(dim=0, keepdim=True))
                bias.append(math.log(tokens.stop - tokens.start))
        if keys:
            rows = slice(i * inputs.query_block_size, (i + 1) * inputs.query_block_size)
            logits = query[b, h, rows] @ torch.cat(keys).T * inputs.scale + torch.tensor(bias, dtype=wide)
            weights = logits.softmax(dim=1)
            out[b, h, rows] = (weights.to(precision) @ torch.cat(values).to(precision)).to(wide)
            lse[b, h, rows] = logits.logsumexp(dim=1)
    return out, lse


def relative_error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def check(inputs):
    """Output and logsumexp are as close to float64 as the plain formula in the same precision is."""
    out, lse = attend(inputs)
    assert out.shape == inputs.query.shape
    assert out.dtype == inputs.query.dtype
    assert lse.dtype == torch.float32
    expected, expected_lse = reference(inputs)
    own_out, own_lse = reference(inputs, inputs.query.dtype)
    assert out.isfinite().all()
    assert relative_error(out, expected) <= 2 * relative_error(own_out.to(inputs.query.dtype), expected)
    exists = expected_lse > -math.inf
    assert torch.equal(lse == -math.inf, ~exists)
    # PyTorch's attention on the CPU has a fast exponential, and a faster one for half precision.
    fast_exponential = 2.0**-18 if inputs.query.dtype == torch.float32 else 2.0**-16
    allowed = 2 * relative_error(own_lse[exists], expected_lse[exists]) + fast_exponential
    assert relative_error(lse[exists], expected_lse[exists]) <= allowed


@pytest.mark.parametrize("tail", [None, [[True, True]], [[True, False], [False, True]]])
@pytest.mark.parametrize("lengths", [None, [105, 50], [16, 3]])
@pytest.mark.parametrize("shared_lists", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_option_together(tail, lengths, shared_lists, dtype):
    check(make_inputs(batch=2, tail=tail, lengths=lengths, shared_lists=shared_lists, dtype=dtype))


def test_memory_that_holds_nothing_yet_is_not_read(monkeypatch):
    """Not even where `torch.baddbmm` multiplies by a beta of 0, as on Apple's GPUs: 0 times NaN is NaN."""

    def as_on_mps(added, left, right, *, beta, alpha, out):
        return out.copy_(beta * added + alpha * (left @ right))

    monkeypatch.setattr(torch, "baddbmm", as_on_mps)
    check(make_inputs(num_queries=32, num_keys=64))


@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_head_dim(head_dim, dtype):
    check(make_inputs(num_queries=65, head_dim=head_dim, tail=[[True, False]], dtype=dtype))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    num_queries=st.integers(1, 70),
    num_keys=st.integers(1, 70),
    head_dim=st.integers(1, 48),
    query_block_size=st.integers(1, 40),
    key_block_size=st.integers(1, 40),
    share_that_exists=st.none() | st.floats(0, 1.2),
    tail=st.none() | st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(num_queries, num_keys, head_dim, query_block_size, key_block_size, share_that_exists, tail, seed):
    inputs = make_inputs(
        heads=1,
        num_queries=num_queries,
        num_keys=num_keys,
        head_dim=head_dim,
        query_block_size=query_block_size,
        key_block_size=key_block_size,
        lengths=None if share_that_exists is None else [round(share_that_exists * num_keys)],
        tail=None if tail is None else [[tail]],
        seed=seed,
    )
    out, lse = attend(inputs)
    expected, expected_lse = reference(inputs)
    # Sums of fewer than 128 numbers around one: a few units in the last place of fp32.
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_strides_do_not_matter():
    inputs = make_inputs(tail=[[True, False]])
    expected = attend(inputs)
    for layout in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x], dim=3)[:, :, :, 0],
        lambda x: torch.stack([x, x], dim=-1)[..., 1],
    ):
        strided = {name: layout(getattr(inputs, name)) for name in ("query", "key", "value")}
        assert not strided["key"].is_contiguous()
        # Not equal to the bit: the means of the tail may be summed in another order.
        for actual, wanted in zip(attend(inputs, **strided), expected):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_blocks_listed_is_dense_attention(dtype):
    inputs = make_inputs(num_queries=105, head_dim=64, dtype=dtype)
    inputs.key_blocks = torch.arange(7).expand(1, 1, 4, 7).to(torch.int32)
    inputs.counts = torch.full((1, 1, 4), 7, dtype=torch.int32)
    # In fp32 whatever the inputs are, and rounded once.
    dense = F.scaled_dot_product_attention(*(x.float() for x in (inputs.query, inputs.key, inputs.value))).to(dtype)
    assert torch.equal(attend(inputs)[0], dense)
    assert torch.equal(attend(inputs, tail=torch.tensor([[True]]))[0], dense)


def test_a_run_of_dense_query_blocks_among_sparse_ones():
    inputs = make_inputs(heads=1, num_queries=200, lengths=[90])
    inputs.counts[0, 0, 1:4] = inputs.counts[0, 0, 6] = 13
    inputs.key_blocks[0, 0, [1, 2, 3, 6]] = torch.randperm(13, dtype=torch.int32)
    check(inputs)


def test_one_listed_block_is_attention_to_that_block():
    inputs = make_inputs(heads=1, num_queries=64)
    inputs.counts[:] = 1
    inputs.key_blocks[0, 0, :, 0] = 2
    seen = slice(32, 48)
    dense = F.scaled_dot_product_attention(inputs.query, inputs.key[:, :, seen], inputs.value[:, :, seen])
    torch.testing.assert_close(attend(inputs)[0], dense)


def test_lists_that_do_not_exist_give_zeros():
    inputs = make_inputs(batch=2, heads=1, num_queries=64, lengths=[20, 0], tail=[[False], [True]])
    inputs.counts[:] = 2
    inputs.key_blocks[..., :2] = torch.tensor([3, 2], dtype=torch.int32)
    inputs.key_blocks[0, 0, 1, 0] = 1
    out, lse = attend(inputs)
    assert torch.equal(out[0, 0, :32], torch.zeros(32, 32))
    assert (lse[0, 0, :32] == -math.inf).all()
    assert lse[0, 0, 32:].isfinite().all()
    assert torch.equal(out[1], torch.zeros(1, 64, 32))
    assert (lse[1] == -math.inf).all()


def test_what_is_not_seen_is_not_read():
    inputs = make_inputs(heads=1, num_queries=64, lengths=[40])
    inputs.counts[:] = 2
    inputs.key_blocks[..., :2] = torch.tensor([0, 2], dtype=torch.int32)
    expected = attend(inputs)
    for x in (inputs.key, inputs.value):
        x[:, :, 16:32] = torch.nan
        x[:, :, 40:] = torch.nan
    for actual, wanted in zip(attend(inputs), expected):
        assert torch.equal(actual, wanted)


def test_the_logsumexp_is_left_out_unless_asked_for():
    inputs = make_inputs(tail=[[True, False]])
    out, lse = attend(inputs, return_lse=False)
    assert torch.equal(out, attend(inputs)[0])
    assert lse.numel() == 0


def test_large_logits_do_not_overflow():
    inputs = make_inputs(tail=[[True, True]])
    inputs.query *= 1000
    out, lse = attend(inputs)
    assert out.isfinite().all()
    assert lse.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor had that any operator returned."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.num_elements = max(self.num_elements, x.numel())
        return result


@pytest.mark.parametrize("max_scores", [1, 20_000, 60_000])
def test_memory_is_bounded(monkeypatch, max_scores):
    inputs = make_inputs(heads=1, num_queries=608, head_dim=8, key_block_size=16, tail=[[True]])
    # Query blocks that see everything are not gathered.
    inputs.counts.clamp_(max=37)
    expected = attend(inputs)
    monkeypatch.setattr(block_sparse_eager, "MAX_SCORES", max_scores)
    with LargestTensor() as largest:
        actual = attend(inputs)
    # One query block on its 37 listed blocks and 38 means, or else the inputs; 608 x 608 scores would be 369,664.
    columns = 37 * 16 + 38
    most = max(max_scores, inputs.query_block_size * columns, inputs.query.numel(), 2 * inputs.key_blocks.numel())
    assert largest.num_elements <= most < 608 * 608 / 4
    for result, wanted in zip(actual, expected):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)
