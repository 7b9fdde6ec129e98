"""What holds for every strategy, whatever its rule."""

from __future__ import annotations

import dataclasses
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from operators_of_mps import Lacking
from plain_rules import random_qkv
from torch.utils._python_dispatch import TorchDispatchMode

from diffsparse import (
    NABLA,
    SVG2,
    SVGEAR,
    SVOO,
    AdaCluster,
    Adaptive,
    AdaSpa,
    Dense,
    DraftAttention,
    FlexPrefill,
    Jenga,
    MInference,
    MMInference,
    PAROAttention,
    Radial,
    RainFusion,
    RainFusion2,
    S2Attention,
    SampleAttention,
    SlidingTile,
    SolAttention,
    SpargeAttention,
    SparseAttentionConfig,
    SparseD,
    SparseVDiT,
    SparseVideoGen,
    VMoBA,
    XAttention,
)
from diffsparse.eval.named_config import exported_strategies
from diffsparse.grid import TokenGrid
from diffsparse.kernels.block_sparse import check_lists
from diffsparse.pipelines.wan import WAN
from diffsparse.plan import AttentionPlan
from diffsparse.session import Session
from diffsparse.steps import Step
from diffsparse.strategies import planning_memory
from diffsparse.strategies.strategy import AttentionCall

SMALL = {"query_block_size": 16, "key_block_size": 16}
LISTED = [
    Adaptive(density=0.3, sampled_rows=16, tile=(2, 2, 4), **SMALL),
    SpargeAttention(mass=0.5, similarity=0.05, **SMALL),
    SlidingTile(tile=(2, 2, 4), window=(1, 2, 1), **SMALL),
    Radial(query_block_size=8, key_block_size=8),
    DraftAttention(density=0.3, patch=(2, 4), **SMALL),
    RainFusion2(density=0.3, window=(2, 4), **SMALL),
    SVG2(query_clusters=6, key_clusters=10, mass=0.5, iterations=2, **SMALL),
    SVGEAR(query_clusters=6, key_clusters=10, mass=0.5, iterations=2, **SMALL),
    SVOO(query_clusters=6, key_clusters=10, mass=0.2, least=0.0, most=1.0, sampled_rows=16, **SMALL),
    SolAttention(tau=0.8, **SMALL),
    XAttention(mass=0.5, stride=4, **SMALL),
    NABLA(mass=0.3, window=(1, 1, 3), patch=(2, 4), **SMALL),
    Jenga(density=0.2, mass=0.2, **SMALL),
    AdaSpa(density=0.3, recall=0.3, **SMALL),
    # So that keys are far from their centroids, for later stages to have some.
    AdaCluster(density=0.3, query_clusters=6, key_clusters=6, threshold=1.1, **SMALL),
    SparseD(density=0.3, **SMALL),
    S2Attention(local_blocks=2, stride=4, block_size=16),
    SampleAttention(mass=0.5, sampled_rows=16, block_size=16),
    MInference(density=0.3, sampled_rows=16, block_size=16),
    FlexPrefill(mass=0.5, sampled_rows=16, block_size=16),
    PAROAttention(density=0.3, sampled_blocks=2, **SMALL),
    RainFusion(density=0.3, sampled_rows=16, **SMALL),
    RainFusion(density=0.3, rule="two-way", sampled_rows=16, **SMALL),
    SparseVDiT(density=0.3, weight=0.1, relative=True, sampled_rows=16, **SMALL),
    SparseVideoGen(density=0.3, sampled_rows=16, **SMALL),
    VMoBA(box_chunk=(2, 3, 4), **SMALL),
    VMoBA(box_chunk=(2, 3, 4), select="top-k", top_k=(1, 2, 2), scope="head-global", routing="union", **SMALL),
    MMInference(density=0.3, sampled_rows=16, **SMALL),
]


def small(strategy: type) -> object:
    """One with its default options, but for small blocks."""
    sizes = SMALL | {"block_size": 16}
    options = {field.name for field in dataclasses.fields(strategy)}
    return strategy(**{name: size for name, size in sizes.items() if name in options})


OTHERS = set(exported_strategies().values()) - {Dense, *map(type, LISTED)}
STRATEGIES = [*LISTED, *map(small, sorted(OTHERS, key=lambda strategy: strategy.__name__))]
GRIDS = [TokenGrid(5, 6, 8), TokenGrid(3, 5, 7, 2, 9), TokenGrid(1, 9, 11, text_before=20), TokenGrid(1, 1, 1)]

pytestmark = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_query_block_sees_a_key_block_and_the_output_is_finite(strategy, grid):
    query, key, value = random_qkv(grid, batch=2)
    for layer, step in ((0, 3), (1, 7), (2, 15)):
        plan = strategy.plan(query, key, value, AttentionCall(grid, layer, 3, step, 20))
        assert isinstance(plan, AttentionPlan)
        check_lists(plan.mask.lists(), plan.mask.counts, plan.mask.num_key_blocks)
        output = plan.attend(query, key, value)
        assert output.shape == query.shape
        assert output.isfinite().all()


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)),
    text=st.tuples(st.sampled_from([0, 1, 20]), st.sampled_from([0, 1, 40])),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 4)),
    block_sizes=st.tuples(*[st.sampled_from([1, 8, 16, 100])] * 2),
    num_padded=st.integers(0, 40),
    layer=st.integers(0, 2),
)
def test_a_plan_is_one_whatever_the_grid(strategy, sizes, text, shape, block_sizes, num_padded, layer):
    """Lists of blocks that exist, orders of all tokens with the text that may be padded last, and text exact."""
    grid, (batch, heads) = TokenGrid(*sizes, *text), shape
    options = {field.name for field in dataclasses.fields(strategy)} & {"query_block_size", "key_block_size"}
    # A stride of tokens has to divide them.
    if not isinstance(strategy, XAttention):
        strategy = dataclasses.replace(strategy, **dict(zip(sorted(options, reverse=True), block_sizes)))
    length = None
    if num_padded > 0:
        length = torch.full((batch,), grid.num_tokens, dtype=torch.int32)
        length[0] -= min(num_padded, grid.text_after)
    query, key, value = random_qkv(grid, batch, heads)
    plan = strategy.plan(query, key, value, AttentionCall(grid, layer, 3, 5, 20, 0.3, length))
    check_lists(plan.mask.lists(), plan.mask.counts, plan.mask.num_key_blocks)
    tokens = torch.arange(grid.num_tokens)
    for permutation in (plan.permutation, plan.key_permutation):
        if permutation is not None:
            assert len(permutation.order) in (1, heads)
            assert (permutation.order.sort(-1).values == tokens).all()
            last = grid.num_tokens - grid.text_after
            assert (permutation.order[:, last:] == tokens[last:]).all()
    is_text = (tokens < grid.text_before) | (tokens >= grid.num_tokens - grid.text_after)
    check_text(plan, grid, is_text, batch, heads)
    assert plan.attend(query, key, value, key_length=length).isfinite().all()


@pytest.mark.parametrize("num_padded", [0, 5])
def test_the_video_alone_attends_as_it_does_among_the_text(strategy, num_padded):
    grid = TokenGrid(3, 5, 7, text_after=11)
    length = torch.full((2,), grid.num_tokens - num_padded, dtype=torch.int32) if num_padded else None
    query, key, value = random_qkv(grid, batch=2)
    plan = strategy.plan(query, key, value, AttentionCall(grid, 1, 3, 5, 20, key_length=length))
    joint = plan.attend(query, key, value, key_length=length)
    num = grid.num_video_tokens
    alone = plan.of_first_queries(num).attend(query[:, :, :num], key, value, key_length=length)
    torch.testing.assert_close(alone, joint[:, :, :num])


def test_a_session_plans_whatever_the_default_device_is(strategy):
    # A grid of no other test, so that nothing of it is kept.
    qkv = random_qkv(TokenGrid(3, 4, 11))
    session = Session("model", WAN, ("layer",), SparseAttentionConfig(strategy, dense_steps=0.0, min_tokens=0))
    session.begin(Step(0, 20, 0, is_first_of_generation=True), (3, 4, 11, 0, 0))
    with torch.device("meta"):
        output = session.attend(0, *qkv, None, None)
    assert output.isfinite().all()


def test_planning_takes_no_operator_that_apples_gpus_lack(strategy):
    grid = TokenGrid(3, 5, 7, 2, 9)
    query, key, value = random_qkv(grid, batch=2)
    length = torch.tensor([grid.num_tokens, grid.num_tokens - 4], dtype=torch.int32)
    with Lacking() as lacking:
        plan = strategy.plan(query, key, value, AttentionCall(grid, 1, 3, 5, 20, 0.3, length))
        plan.mask.lists()
    # What k-means leaves to the CPU.
    assert lacking.names <= {"segment_reduce"}


def test_some_key_block_is_left_out(strategy):
    """Or the other tests would say nothing: what sees everything passes them all."""
    grid = TokenGrid(3, 5, 7, 2, 9)
    query, key, value = random_qkv(grid)
    calls = [AttentionCall(grid, layer, 3, step=5, num_steps=20) for layer in range(3)]
    assert min(strategy.plan(query, key, value, call).mask.density.min() for call in calls) < 1


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.num_tokens > grid.num_video_tokens], ids=str)
def test_text_is_exact(strategy, grid):
    """Every text query sees every key; every query sees every text key, unless its head is skipped."""
    query, key, value = random_qkv(grid)
    text = torch.ones(grid.num_tokens, dtype=torch.bool)
    text[grid.text_before : grid.text_before + grid.num_video_tokens] = False
    for layer in range(3):
        check_text(strategy.plan(query, key, value, AttentionCall(grid, layer, 3, 5, 20)), grid, text)


def check_text(plan: AttentionPlan, grid: TokenGrid, text: torch.Tensor, batch: int = 1, heads: int = 3) -> None:
    """`text` [S] says which tokens are text."""
    visible = plan.mask.visible().expand(batch, heads, -1, -1)
    for head in range(heads):
        if plan.skipped is not None and plan.skipped[head]:
            continue
        blocks_of_query = block_of_token(plan.permutation, head, grid, plan.mask.query_block_size)
        keys = plan.permutation if plan.key_permutation is None else plan.key_permutation
        blocks_of_key = block_of_token(keys, head, grid, plan.mask.key_block_size)
        assert visible[:, head, blocks_of_query[text]].all()
        assert visible[:, head][..., blocks_of_key[text]].all()


def block_of_token(permutation, head: int, grid: TokenGrid, block_size: int) -> torch.Tensor:
    if permutation is None:
        return torch.arange(grid.num_tokens) // block_size
    inverse = permutation.order.argsort(-1)
    return inverse[head % len(inverse)] // block_size


def test_keys_that_do_not_exist_change_nothing(strategy):
    grid = TokenGrid(5, 6, 8, text_after=13)
    query, key, value = random_qkv(grid, batch=2)
    length = torch.tensor([grid.num_tokens - 10, grid.num_tokens], dtype=torch.int32)
    call = AttentionCall(grid, step=5, num_steps=20, key_length=length)
    before = strategy.plan(query, key, value, call).attend(query, key, value, key_length=length)
    for x in (key, value):
        x[0, :, -10:] = 1000.0
    after = strategy.plan(query, key, value, call).attend(query, key, value, key_length=length)
    assert torch.equal(before, after)


@pytest.mark.parametrize("grid", [GRIDS[1], TokenGrid(5, 6, 8, 2, 9)], ids=str)
def test_a_fourth_of_the_scale_is_a_fourth_of_the_query(strategy, grid):
    """Both are exact in binary, so that all that follows from them is the same."""
    query, key, value = random_qkv(grid)
    query *= 6
    call = AttentionCall(grid, step=5, num_steps=20)
    by_scale = strategy.plan(query, key, value, dataclasses.replace(call, scale=24**-0.5 / 4))
    by_query = strategy.plan(query / 4, key, value, call)
    assert torch.equal(by_scale.mask.visible(), by_query.mask.visible())
    assert torch.equal(by_scale.attend(query / 4, key, value), by_query.attend(query / 4, key, value))


def test_the_same_inputs_give_the_same_plan(strategy):
    grid = GRIDS[0]
    qkv = random_qkv(grid)
    first, second = (strategy.plan(*qkv, AttentionCall(grid, step=5, num_steps=20)) for _ in range(2))
    assert are_the_same(first, second)
    assert torch.equal(first.attend(*qkv), second.attend(*qkv))


def test_a_few_heads_or_rows_at_a_time_give_the_same_plan(strategy, monkeypatch):
    grid = TokenGrid(5, 6, 8, text_after=3)
    query, key, value = random_qkv(grid, batch=2)
    call = AttentionCall(grid, step=5, num_steps=20)
    together = strategy.plan(3 * query, key, value, call)
    monkeypatch.setattr(planning_memory, "PLANNING_BYTES", 1)
    apart = strategy.plan(3 * query, key, value, call)
    assert are_the_same(together, apart)


def are_the_same(*plans: AttentionPlan) -> bool:
    """Whether two plans say the same of each head."""
    given = []
    for plan in plans:
        orders = [each if each is None else each.order for each in (plan.permutation, plan.key_permutation)]
        given.append([plan.mask.visible(), *orders, plan.tail, plan.classes, plan.skipped])
    return all(one is other or torch.equal(one, other) for one, other in zip(*given))


def test_half_precision_is_kept(strategy):
    qkv = [x.bfloat16() for x in random_qkv(GRIDS[0])]
    output = strategy.plan(*qkv, AttentionCall(GRIDS[0], step=5, num_steps=20)).attend(*qkv)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: reading a value, or a shape that depends on values."""

    WAITING = (
        "_local_scalar_dense",
        "equal",
        "nonzero",
        "masked_select",
        "unique",
        "_unique2",
        "unique_dim",
        "bincount",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        assert name not in self.WAITING, f"{name} waits for values"
        assert not by_mask, "an index of bools waits for values"
        return function(*args, **(kwargs or {}))


def test_planning_waits_for_no_value(strategy):
    """What depends on the grid alone may wait, once: the first plan of a grid is not watched."""
    grid = TokenGrid(5, 6, 8, text_after=3)
    call = AttentionCall(grid, step=5, num_steps=20)
    strategy.plan(*random_qkv(grid), call)
    with NoWaiting():
        strategy.plan(*random_qkv(grid, seed=1), call)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor made had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_tensor_grows_with_the_square_of_the_tokens(strategy):
    """Between 2,048 and 8,192 tokens an S x S tensor grows 16 times; what grows by blocks starts far below it."""
    for grid in (TokenGrid(8, 16, 16), TokenGrid(8, 32, 32)):
        qkv = random_qkv(grid, heads=2)
        with LargestTensor() as largest:
            strategy.plan(*qkv, AttentionCall(grid, step=5, num_steps=20))
        assert largest.elements < grid.num_tokens**2 / 4


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_the_default_dtype_changes_nothing(strategy, grid):
    """Whole numbers of tokens and their halves are exact in float32, and above 256 are not in bfloat16."""
    query, key, value = random_qkv(grid)
    outputs = []
    for dtype in (torch.bfloat16, torch.float32):
        forget_layouts()
        torch.set_default_dtype(dtype)
        try:
            plan = strategy.plan(query, key, value, AttentionCall(grid, 0, 3, 3, 20))
            outputs.append(plan.attend(query, key, value))
        finally:
            torch.set_default_dtype(torch.float32)
            forget_layouts()
    assert torch.equal(*outputs)


def forget_layouts():
    """Empty what strategies keep for a grid."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("diffsparse.strategies.", "diffsparse.heads")):
            for kept in vars(module).values():
                if hasattr(kept, "cache_clear"):
                    kept.cache_clear()
