from __future__ import annotations

import argparse
import itertools
import math
import shutil

import pytest
import torch

from diffsparse.kernels import block_sparse_eager, block_sparse_flex
from diffsparse.kernels.block_sparse import block_sparse_attention, pick_backend


def make_inputs(*, lengths=None, tail=None, queries=105, keys=105, dtype=torch.float32, shared_lists=False):
    """Random, laid out as projections leave them, lists of random length with nonsense after their counts."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((2, tokens, 2, 24), generator=generator).to(dtype).transpose(1, 2)
        for tokens in (queries, keys, keys)
    )
    for b, length in enumerate(lengths or ()):
        key[b, :, length:] = value[b, :, length:] = math.nan
    rows, columns = -(-queries // 32), -(-keys // 16)
    leading = (1, 1) if shared_lists else (2, 2)
    counts = torch.randint(1, columns + 1, (*leading, rows), generator=generator, dtype=torch.int32)
    key_blocks = torch.rand((*leading, rows, columns), generator=generator).argsort(-1).to(torch.int32)
    key_blocks[torch.arange(columns) >= counts[..., None]] = -7
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_blocks": key_blocks,
        "counts": counts,
        "query_block_size": 32,
        "key_block_size": 16,
        "key_length": None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
        "tail": None if tail is None else torch.tensor(tail),
        "scale": 0.3,
        "return_lse": True,
    }


def as_documented(query, key, value, block_mask, score, scale, return_lse):
    """What flex_attention is to compute, one query at a time: masks count in partial blocks only, scores in all."""
    assert not any(blocks.requires_grad for blocks in (query, key, value))
    query_block, key_block = block_mask.BLOCK_SIZE
    # A GPU's kernel takes the strides of one for both.
    assert block_mask.kv_indices.stride() == block_mask.full_kv_indices.stride()
    out, lse = torch.zeros_like(query), torch.full(query.shape[:3], -math.inf)
    for b, h, q in itertools.product(*map(range, query.shape[:3])):
        row = b, h, q // query_block
        columns, is_seen = [], []
        for counts, blocks, is_whole in (
            (block_mask.kv_num_blocks, block_mask.kv_indices, False),
            (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True),
        ):
            for block in blocks[row][: counts[row]].tolist():
                tokens = torch.arange(block * key_block, min((block + 1) * key_block, key.shape[2]))
                columns += tokens.tolist()
                is_seen += (block_mask.mask_mod(*map(torch.tensor, (b, h, q)), tokens) | is_whole).tolist()
        assert len(set(columns)) == len(columns)
        logits = key[b, h, columns].float() @ query[b, h, q].float() * scale
        if score is not None:
            logits = score(logits, *map(torch.tensor, (b, h, q)), torch.tensor(columns, dtype=torch.long))
        logits[~torch.tensor(is_seen, dtype=torch.bool)] = -math.inf
        if any(is_seen):
            # What is hidden has a weight of 0, which its value is multiplied by.
            out[b, h, q] = (logits.softmax(-1) @ value[b, h, columns].float()).to(out.dtype)
            lse[b, h, q] = logits.logsumexp(-1)
    return out, lse if return_lse else None


def check(inputs):
    """As close to the specification as the roundings allow: of means and of the output, or of fp32 sums."""
    out, lse = block_sparse_flex.attend(**inputs)
    expected, expected_lse = block_sparse_eager.attend(**inputs)
    assert (out.dtype, out.shape, out.is_contiguous()) == (expected.dtype, expected.shape, True)
    roundoff = max(torch.finfo(out.dtype).eps / 2, 2.0**-20)
    assert (out.float() - expected.float()).norm() <= 2 * roundoff * expected.float().norm()
    assert (lse.dtype, lse.shape) == (torch.float32, expected_lse.shape)
    seen = expected_lse > -math.inf
    assert torch.equal(lse > -math.inf, seen)
    assert (lse - expected_lse)[seen].norm() <= 2 * roundoff * expected_lse[seen].norm()


@pytest.mark.parametrize("tail", [None, [[True, True]], [[True, False], [False, True]]])
@pytest.mark.parametrize("lengths", [None, [105, 50], [16, 0]])
def test_its_block_mask_is_that_of_the_specification(monkeypatch, tail, lengths):
    monkeypatch.setattr(block_sparse_flex, "_compiled", as_documented)
    check(make_inputs(tail=tail, lengths=lengths))


@pytest.mark.parametrize(
    "changes",
    [{"queries": 41}, {"keys": 41}, {"keys": 97}, {"keys": 256}, {"shared_lists": True}, {"dtype": torch.bfloat16}],
    ids=str,
)
def test_other_numbers_of_keys_lists_and_dtypes(monkeypatch, changes):
    monkeypatch.setattr(block_sparse_flex, "_compiled", as_documented)
    check(make_inputs(tail=[[True, False]], **changes))


@pytest.mark.parametrize(
    ("sizes", "tiles"), [((128, 128), None), ((128, 64), {"BLOCK_N": 64}), ((32, 16), {"BLOCK_M": 32, "BLOCK_N": 16})]
)
def test_tiles_fit_into_blocks_that_are_smaller_than_pytorchs(monkeypatch, sizes, tiles):
    seen = []

    def attention(query, *inputs, kernel_options, **options):
        seen.append(kernel_options)
        return query, argparse.Namespace(lse=None)

    monkeypatch.setattr(block_sparse_flex, "flex_attention", attention)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    mask = argparse.Namespace(BLOCK_SIZE=sizes)
    block_sparse_flex._compiled._torchdynamo_orig_callable(torch.zeros(1), None, None, mask, None, 1.0, False)
    assert seen == [tiles]


@pytest.mark.skipif(
    shutil.which("g++") is None or not torch.cpu._is_avx2_supported(), reason="flex_attention does not compile here"
)
def test_compiled_it_gives_the_same():
    """On a CPU, where it has no logsumexp."""
    inputs = make_inputs(lengths=[105, 50], tail=[[True, False]]) | {"return_lse": False}
    out, lse = block_sparse_flex.attend(**inputs)
    expected, _ = block_sparse_eager.attend(**inputs)
    assert (out - expected).norm() <= 2.0**-20 * expected.norm()
    assert lse.shape == (0,)


def test_uncompiled_it_raises():
    # Uncompiled, flex_attention computes S x S scores and reads no lists.
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="'flex' needs"):
        block_sparse_flex.attend(**make_inputs())


def test_what_it_cannot_take_has_a_reason():
    query = torch.zeros(1, 1, 64, 64)
    assert "on a CPU flex_attention has no logsumexp" in block_sparse_flex.why_not(query, 64, 64)
    assert "needs a CUDA GPU, not meta" in block_sparse_flex.why_not(query.to("meta"), 64, 64)


def test_it_is_never_taken_unless_named(monkeypatch):
    monkeypatch.setattr(block_sparse_flex, "why_not", lambda *arguments: None)
    query = torch.zeros(1, 1, 64, 64)
    assert pick_backend("flex", query, 64, 64) is block_sparse_flex
    assert pick_backend(None, query, 64, 64) is not block_sparse_flex


def test_named_where_it_cannot_run_it_is_an_error():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="`backend` 'flex' cannot run here: flex: on a CPU"):
        block_sparse_attention(**inputs, backend="flex")
