from __future__ import annotations

import pytest
import torch

from diffsparse.eval.with_tail import with_tail
from diffsparse.grid import TokenGrid
from diffsparse.strategies.adaptive import Adaptive
from diffsparse.strategies.dense import Dense
from diffsparse.strategies.s2_attention import S2Attention
from diffsparse.strategies.strategy import AttentionCall

GRID = TokenGrid(3, 5, 7)
STATIC = S2Attention(local_blocks=1, stride=3, block_size=16)


def random_qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, GRID.num_tokens, 24, generator=generator) for _ in range(3)]


def test_skipped_blocks_enter_as_their_mean():
    query, key, value = random_qkv()
    plan = with_tail(STATIC, tail=True).plan(query, key, value, AttentionCall(GRID))
    visible = plan.mask.visible()[0]  # [H, Q, K]
    output = plan.attend(query, key, value)
    for head, row in ((0, 0), (1, 50), (0, 104)):
        keys, values, logs = [], [], []
        for block, is_seen in enumerate(visible[head, row // 16]):
            tokens = slice(16 * block, 16 * block + 16)
            some = [x[0, head, tokens].double() for x in (key, value)]
            length = len(some[0])
            keys.append(some[0] if is_seen else some[0].mean(0, keepdim=True))
            values.append(some[1] if is_seen else some[1].mean(0, keepdim=True))
            logs.append(torch.zeros(length) if is_seen else torch.tensor([float(length)]).log())
        scores = torch.cat(keys) @ query[0, head, row].double() * 24**-0.5 + torch.cat(logs)
        expected = scores.softmax(0) @ torch.cat(values)
        torch.testing.assert_close(output[0, head, row].double(), expected, atol=1e-5, rtol=1e-5)


def test_an_option_of_its_own_is_used():
    assert with_tail(Adaptive(), tail=False) == Adaptive(tail=False)
    assert with_tail(Adaptive(tail=False), tail=True) == Adaptive(tail=True)


def test_without_tail_it_is_the_strategy_itself():
    assert with_tail(STATIC, tail=False) is STATIC


@pytest.mark.parametrize("tail", [False, True])
def test_a_layer_left_dense_stays_dense(tail):
    assert with_tail(Dense(), tail).plan(*random_qkv(), AttentionCall(GRID)) is None
