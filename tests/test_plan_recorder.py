from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from enabled import report_of, run
from strategies.test_strategies import GRIDS, STRATEGIES, random_qkv
from tiny_models import TINY, generate, tiny_wan_pipeline

from diffsparse import Adaptive, Calibrated, Dense, SparseAttentionConfig
from diffsparse.block_mask import BlockMask, num_blocks
from diffsparse.grid import TokenGrid
from diffsparse.packed_bits import unpack_bits
from diffsparse.permutation import Permutation, axis_order
from diffsparse.plan import AttentionPlan
from diffsparse.plan_file import load_plans
from diffsparse.plan_recorder import PlanRecorder
from diffsparse.strategies.strategy import AttentionCall

GRID = TokenGrid(2, 3, 4)
BLOCKS = 6
QKV = [torch.zeros(1, 1, GRID.num_tokens, 8)] * 3
BACKWARDS = torch.arange(GRID.num_tokens - 1, -1, -1)


@dataclasses.dataclass
class Given:
    """Plans what it is told, one after the other."""

    plans: list

    def plan(self, query, key, value, call):
        return self.plans.pop(0)


def plan_of(*visible, order=None, size=4, **more):
    """A plan of block maps, lists of the key blocks of each row, one a head."""
    blocks_of_grid = num_blocks(GRID.num_tokens, size)
    maps = torch.zeros(1, len(visible), blocks_of_grid, blocks_of_grid, dtype=torch.bool)
    for head, rows in enumerate(visible):
        for row, blocks in enumerate(rows):
            maps[0, head, row, blocks] = True
    permutation = None if order is None else Permutation(order[None])
    return AttentionPlan(permutation, BlockMask.from_visible(maps, GRID.num_tokens, size, size), **more)


def every_row(*blocks):
    return [list(blocks)] * BLOCKS


def recorded(*prompts, places=((0, 0),), heads=1, grid=GRID):
    """The calibration of prompts, each a list of what is planned at these layers and steps."""
    recorder = PlanRecorder(Given([plan for prompt in prompts for plan in prompt]))
    qkv = [torch.zeros(1, heads, grid.num_tokens, 8)] * 3
    for _ in prompts:
        for layer, step in places:
            recorder.plan(*qkv, AttentionCall(grid, layer, 2, step, 10, model="Example"))
        recorder.end_prompt()
    return recorder.calibration(SparseAttentionConfig())


def rows_of(made, entry=0, head=0):
    visible = unpack_bits(made.maps[made.entries[entry].heads[head].block_map], BLOCKS)
    return [row.nonzero().flatten().tolist() for row in visible]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_a_plan_of_any_strategy_comes_back_from_a_file_as_it_was(strategy, grid, tmp_path):
    qkv = random_qkv(grid)
    call = AttentionCall(grid, 1, 3, 5, 20, model="Example")
    recorder = PlanRecorder(strategy)
    plan = recorder.plan(*qkv, call)
    recorder.end_prompt()
    recorder.save(tmp_path / "a.safetensors", SparseAttentionConfig(strategy))
    served = Calibrated("a.safetensors", load_plans(tmp_path / "a.safetensors")).plan(*qkv, call)
    assert torch.equal(served.mask.visible().expand(1, 3, -1, -1), plan.mask.visible().expand(1, 3, -1, -1))
    assert torch.equal(served.attend(*qkv), plan.attend(*qkv))
    assert served.precision == plan.precision
    if plan.classes is not None:
        assert torch.equal(served.classes, plan.classes)


def test_what_most_prompts_see_is_kept_as_many_blocks_a_row_as_before():
    made = recorded([plan_of(every_row(0, 1))], [plan_of(every_row(1, 2))], [plan_of(every_row(2, 3))])
    assert rows_of(made) == every_row(1, 2)


def test_the_union_of_prompts_is_not_kept_and_ties_go_to_the_first():
    made = recorded([plan_of(every_row(3, 4))], [plan_of(every_row(0, 1))])
    assert rows_of(made) == every_row(3, 4)
    assert made.num_prompts == 2


def test_rows_of_different_length_meet_in_the_middle():
    made = recorded([plan_of(every_row(0))], [plan_of(every_row(0, 1, 2, 4, 5))])
    assert [len(row) for row in rows_of(made)] == [3] * BLOCKS
    assert all(0 in row for row in rows_of(made))


def test_maps_of_different_orders_are_not_mixed():
    token_major = axis_order(GRID, ("height", "width", "frame"))
    first = plan_of(every_row(0), order=BACKWARDS)
    second, third = (plan_of(every_row(5), order=token_major) for _ in range(2))
    made = recorded([first], [second], [third])
    assert rows_of(made) == every_row(5)
    assert made.orders == ("height width frame",)
    made = recorded([first], [second])
    assert rows_of(made) == every_row(0)
    assert torch.equal(made.orders[0].long(), BACKWARDS)


def test_equal_maps_and_orders_are_kept_once():
    plans = [plan_of(every_row(0), every_row(0), order=BACKWARDS) for _ in range(2)]
    made = recorded(plans, places=((0, 4), (1, 4)), heads=2)
    assert (len(made.maps), len(made.orders), len(made.entries)) == (1, 1, 2)


def test_a_plan_that_does_not_change_is_one_entry():
    a, b, c = plan_of(every_row(0)), plan_of(every_row(0)), plan_of(every_row(1))
    made = recorded([a, b, None, c], places=((0, 2), (0, 4), (0, 6), (0, 8)))
    assert [(entry.from_step, entry.precision) for entry in made.entries] == [(2, "native"), (6, None), (8, "native")]


def test_rows_of_a_batch_vote_as_prompts_do():
    maps = torch.zeros(3, 1, BLOCKS, BLOCKS, dtype=torch.bool)
    for row, block in enumerate((4, 2, 2)):
        maps[row, :, :, block] = True
    mask = BlockMask.from_visible(maps, GRID.num_tokens, 4, 4)
    made = recorded([AttentionPlan(None, mask, tail=torch.tensor([[False], [True], [True]]))])
    assert rows_of(made) == every_row(2)
    assert made.entries[0].heads[0].tail == 1


def test_flags_and_classes_are_kept_by_head():
    plan = plan_of(
        every_row(0),
        every_row(1),
        tail=torch.tensor([[True, False]]),
        classes=torch.tensor([2, 0]),
        skipped=torch.tensor([False, True]),
    )
    heads = recorded([plan], heads=2).entries[0].heads
    assert [(head.tail, head.head_class, head.skipped) for head in heads] == [(1, 2, 0), (0, 0, 1)]


def test_the_experts_of_a_pipeline_share_a_file(tmp_path):
    """Each takes the plans of its own steps."""
    settings = {"dense_steps": 0.0, "min_tokens": 0, "replan_every": 2}
    strategy = Adaptive(density=0.3, query_block_size=8, key_block_size=8)
    pipe = tiny_wan_pipeline(two_experts=True)
    recorder = PlanRecorder(strategy)
    pipe.enable_sparse_attention(SparseAttentionConfig(recorder, **settings))
    expected = generate(pipe, steps=6, grid=(2, 6, 5))
    pipe.disable_sparse_attention()
    recorder.end_prompt()
    recorder.save(tmp_path / "a.safetensors", SparseAttentionConfig(strategy, **settings))
    pipe.enable_sparse_attention(tmp_path / "a.safetensors")
    assert torch.equal(generate(pipe, steps=6, grid=(2, 6, 5)), expected)
    reports = pipe.sparse_attention_report().transformers
    assert all(report.sparse_calls > 0 for report in reports)
    assert len(reports) == 2


@pytest.mark.parametrize("name", ["prx", "nucleus_image"])
def test_plans_of_the_queries_of_an_image_alone_come_back(name, tmp_path):
    tiny = TINY[name]
    model, settings = tiny.make(), {"dense_steps": 0.0, "min_tokens": 0}
    call = tiny.call(model, tiny.grid)
    strategy = Adaptive(density=0.3, query_block_size=16, key_block_size=16)
    model.enable_sparse_attention(SparseAttentionConfig(recorder := PlanRecorder(strategy), **settings))
    expected = run(model, call)
    recorder.end_prompt()
    recorder.save(tmp_path / "a.safetensors", SparseAttentionConfig(strategy, **settings))
    model.disable_sparse_attention()
    model.enable_sparse_attention(tmp_path / "a.safetensors")
    torch.testing.assert_close(run(model, call), expected)
    assert (report_of(model).sparse_calls, report_of(model).dense_calls) == (2, 0)


def test_a_prompt_counts_when_it_has_ended():
    recorder = PlanRecorder(Given([plan_of(every_row(0)), plan_of(every_row(1))]))
    recorder.plan(*QKV, AttentionCall(GRID))
    recorder.end_prompt()
    recorder.plan(*QKV, AttentionCall(GRID, layer=1))
    assert [entry.layer for entry in recorder.calibration(SparseAttentionConfig()).entries] == [0]


@pytest.mark.parametrize("plans", [[], [None]])
def test_nothing_planned_is_no_calibration(plans):
    recorder = PlanRecorder(Dense())
    if plans:
        recorder.plan(*QKV, AttentionCall(GRID))
    recorder.end_prompt()
    with pytest.raises(ValueError, match="no attention call was planned"):
        recorder.calibration(SparseAttentionConfig())


@pytest.mark.parametrize(
    ("second", "grid", "message"),
    [
        (plan_of(every_row(0)), TokenGrid(2, 3, 4, text_after=2), r"text_after=2.*text_after=0.*one prompt"),
        (plan_of([[0]] * 3, size=8), GRID, r"block_size=8.*block_size=4"),
    ],
    ids=["text", "block size"],
)
def test_plans_for_two_grids_or_block_sizes_are_refused(second, grid, message):
    recorder = PlanRecorder(Given([plan_of(every_row(0)), second]))
    recorder.plan(*QKV, AttentionCall(GRID))
    with pytest.raises(ValueError, match=message):
        recorder.plan(*[torch.zeros(1, 1, grid.num_tokens, 8)] * 3, AttentionCall(grid))


class _ListThatTakesItsTime(list):
    def append(self, item):
        time.sleep(0.02)
        super().append(item)


def test_threads_that_plan_at_once_keep_their_maps():
    class ByLayer:
        def plan(self, query, key, value, call):
            return plan_of(every_row(call.layer))

    recorder = PlanRecorder(ByLayer())
    recorder._maps.tensors = _ListThatTakesItsTime()
    with ThreadPoolExecutor(4) as pool:
        calls = [AttentionCall(GRID, layer, 4, 0, 10, model="Example") for layer in range(4)]
        list(pool.map(lambda call: recorder.plan(*QKV, call), calls))
    recorder.end_prompt()
    made = recorder.calibration(SparseAttentionConfig())
    for number, entry in enumerate(made.entries):
        assert rows_of(made, number) == every_row(entry.layer)
