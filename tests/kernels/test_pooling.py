from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffsparse.kernels import pooling
from diffsparse.kernels.pooling import block_means, block_token_counts, tail_logs


@pytest.mark.parametrize("num_tokens", [64, 65, 105, 7])
@pytest.mark.parametrize("lengths", [None, [105, 50, 1], [0, 16, 33]])
def test_a_mean_is_over_the_tokens_that_exist(num_tokens, lengths):
    x = torch.randn(3, 2, num_tokens, 5, generator=torch.Generator().manual_seed(0))
    key_length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    means, counts = block_means(x, 16, key_length)
    assert means.shape == (3, 2, -(-num_tokens // 16), 5)
    for b in range(3):
        end = num_tokens if lengths is None else min(lengths[b], num_tokens)
        for block in range(means.shape[2]):
            tokens = x[b, :, block * 16 : max(block * 16, min(end, block * 16 + 16))]
            expected = tokens.mean(dim=1) if tokens.shape[1] else torch.zeros(2, 5)
            torch.testing.assert_close(means[b, :, block], expected)
            assert counts.expand(3, -1)[b, block] == tokens.shape[1]


def test_what_lies_beyond_the_key_length_is_never_read():
    x = torch.ones(1, 1, 40, 4)
    x[:, :, 20:] = torch.nan
    means, counts = block_means(x, 16, torch.tensor([20], dtype=torch.int32))
    assert means.tolist() == [[[[1.0] * 4, [1.0] * 4, [0.0] * 4]]]
    assert counts.tolist() == [[16, 4, 0]]


def test_strided_input_gives_the_same_means():
    x = torch.randn(2, 40, 3, 8).transpose(1, 2)
    assert torch.equal(block_means(x, 16)[0], block_means(x.contiguous(), 16)[0])


def test_half_precision_is_summed_in_fp32():
    # In bfloat16 a sum of ones stops at 256.
    means, _ = block_means(torch.ones(1, 1, 1024, 2, dtype=torch.bfloat16), 1024)
    assert means.dtype == torch.float32
    assert means.tolist() == [[[[1.0, 1.0]]]]


def test_counts_without_a_key_length_are_one_row():
    assert block_token_counts(105, 32).tolist() == [[32, 32, 32, 9]]


@pytest.mark.parametrize(("num_blocks", "num_padded"), [(3, 16), (3, 4), (127, 128), (130, 256)])
@pytest.mark.parametrize("lengths", [None, (40, 17)])
def test_means_stand_for_the_tokens_of_blocks_that_are_not_listed(num_blocks, num_padded, lengths):
    num_keys = 16 * num_blocks - 5
    key_blocks = torch.rand(2, 3, 4, num_blocks).argsort(-1).int()
    counts = torch.randint(1, num_blocks + 1, (2, 3, 4)).int()
    key_length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    logs = tail_logs(key_blocks, counts, num_keys, 16, key_length, num_padded)
    for b, h, q in itertools.product(range(2), range(3), range(4)):
        tokens = [0] * num_padded
        for token in range(min(num_keys, 10**9 if lengths is None else lengths[b])):
            tokens[token // 16] += 1
        for block in key_blocks[b, h, q, : counts[b, h, q]].tolist():
            tokens[block] = 0
        torch.testing.assert_close(logs[b, h, q], torch.tensor(tokens).float().log2())


@pytest.mark.parametrize("own_orders", [False, True])
@pytest.mark.parametrize("lengths", [None, [50, 20]])
def test_blocks_of_an_order_are_those_of_the_tokens_in_it(own_orders, lengths):
    x = torch.randn(2, 3, 70, 8)
    order = torch.stack([torch.randperm(70) for _ in range(3 if own_orders else 1)])
    key_length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    in_order = torch.stack([x[:, h, order[h if own_orders else 0]] for h in range(3)], dim=1)
    for actual, expected in zip(block_means(x, 16, key_length, order), block_means(in_order, 16, key_length)):
        assert torch.equal(actual, expected)


def test_everything_is_made_on_the_device_of_the_input(monkeypatch):
    monkeypatch.setattr(pooling, "_means_kernels", lambda device: None)  # they are tried on a GPU
    # Fake tensors notice a CPU tensor among CUDA ones, on a machine that has no CUDA.
    with FakeTensorMode():
        x = torch.empty(1, 2, 100, 8, device="cuda")
        means, token_counts = block_means(x, 16)
    assert means.device == token_counts.device == x.device


def test_what_requires_gradients_is_planned_as_anything_else():
    x = torch.randn(1, 2, 37, 8)
    assert torch.equal(block_means(x.clone().requires_grad_(), 16)[0], block_means(x, 16)[0])
