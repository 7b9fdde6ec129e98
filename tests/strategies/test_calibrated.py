from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from strategies.test_strategies import NoWaiting
from tiny_models import TINY, generate, tiny_wan_pipeline

import diffsparse
from diffsparse import Calibrated, SparseAttentionConfig
from diffsparse.calibration import Calibration, Entry, HeadPlan
from diffsparse.config import as_config
from diffsparse.grid import TokenGrid
from diffsparse.kernels.block_sparse import check_lists
from diffsparse.packed_bits import pack_bits
from diffsparse.plan_file import save_plans
from diffsparse.strategies.strategy import AttentionCall

GRID = TokenGrid(2, 3, 5)  # what `generate` of a tiny pipeline makes
SIZE = 4
BLOCKS = 8
SETTINGS = {"dense_steps": 0.0, "dense_layers": (), "min_tokens": 0, "replan_every": 1, "quantization": None}
HEAD = HeadPlan(block_map=0, order=0, key_order=0, tail=0, head_class=-1, skipped=0)
BACKWARDS = torch.arange(GRID.num_tokens - 1, -1, -1)


def diagonal_and(*blocks):
    """The block map in which each block sees itself and these."""
    visible = torch.eye(BLOCKS).bool()
    visible[:, list(blocks)] = True
    return visible


MAPS = torch.stack([diagonal_and(0), diagonal_and(3, 5), torch.ones(BLOCKS, BLOCKS).bool()])


def calibration(*entries, **changes):
    return dataclasses.replace(
        Calibration(
            model="WanTransformer3DModel",
            num_layers=2,
            num_heads=2,
            grid=GRID,
            query_block_size=SIZE,
            key_block_size=SIZE,
            strategy="Example()",
            num_prompts=1,
            num_steps=10,
            settings=SETTINGS,
            library_version="0.1.0",
            maps=pack_bits(MAPS),
            orders=("own", BACKWARDS.int(), "height width frame"),
            entries=entries or (Entry(0, 0, "native", (HEAD, HEAD)),),
        ),
        **changes,
    )


def served(made, call):
    qkv = [torch.randn(1, 2, call.grid.num_tokens, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    return qkv, Calibrated("plan.safetensors", made).plan(*qkv, call)


def test_a_plan_computes_what_its_maps_and_orders_say():
    heads = (HeadPlan(1, 1, 2, 0, 1, 0), HeadPlan(0, 0, 0, 0, 2, 0))
    (query, key, value), plan = served(calibration(Entry(0, 0, "native", heads)), AttentionCall(GRID))
    check_lists(plan.mask.lists(), plan.mask.counts, BLOCKS)
    output = plan.attend(query, key, value)
    places = torch.arange(GRID.num_tokens).view(2, 3, 5).permute(1, 2, 0).flatten()
    for head, (of_query, of_key) in enumerate([(BACKWARDS, places), (None, None)]):
        order = torch.arange(GRID.num_tokens)
        of_query, of_key = (order if of is None else of for of in (of_query, of_key))
        query_block, key_block = (of.argsort() // SIZE for of in (of_query, of_key))
        seen = MAPS[1 - head][query_block][:, key_block]
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:, head].double(), key[:, head].double(), value[:, head].double(), seen
        )
        torch.testing.assert_close(output[:, head].double(), expected, atol=1e-5, rtol=1e-5)
    assert plan.classes.tolist() == [1, 2]


def test_heads_without_anything_special_need_no_tensors_for_it():
    _, plan = served(calibration(), AttentionCall(GRID))
    assert (plan.permutation, plan.key_permutation, plan.tail, plan.skipped, plan.classes) == (None,) * 5
    assert plan.mask.counts.shape[1] == 1, "a map that all heads share is there once"


def test_tail_and_skipped_heads_come_back():
    heads = (HeadPlan(0, 0, 0, 1, -1, 0), HeadPlan(0, 0, 0, 0, -1, 1))
    _, plan = served(calibration(Entry(0, 0, "int8", heads)), AttentionCall(GRID))
    assert (plan.tail.tolist(), plan.skipped.tolist(), plan.precision) == ([[True, False]], [False, True], "int8")


def density_at(made, step, num_steps=10, layer=0):
    _, plan = served(made, AttentionCall(GRID, layer, 2, step, num_steps))
    return None if plan is None else (round(BLOCKS * BLOCKS * plan.mask.density.mean().item()), plan.lasts)


def test_the_latest_plan_at_or_before_a_step_serves_it():
    first, second = int(MAPS[0].sum()), int(MAPS[1].sum())
    other = HEAD._replace(block_map=1)
    made = calibration(
        Entry(0, 2, "native", (HEAD, HEAD)), Entry(0, 5, None, ()), Entry(0, 6, "native", (other, other))
    )
    assert [density_at(made, step) for step in (0, 2, 4, 5, 6, 9)] == [
        *[(first, False)] * 3,
        None,
        *[(second, True)] * 2,
    ]
    assert density_at(made, 3, layer=1) is None, "a layer without entries is dense"
    # 12 of 20 steps are as far as 6 of 10; without a number of steps they count as they are.
    assert [density_at(made, step, 20)[0] for step in (9, 12, 13)] == [first, second, second]
    assert [density_at(made, step, None)[0] for step in (4, 6)] == [first, second]


def test_planning_waits_for_no_value():
    strategy = Calibrated("plan.safetensors", calibration(Entry(0, 0, "native", (HEAD, HEAD._replace(order=1)))))
    qkv = [torch.zeros(1, 2, GRID.num_tokens, 8)] * 3
    strategy.plan(*qkv, AttentionCall(GRID))
    with NoWaiting():
        strategy.plan(*qkv, AttentionCall(GRID))


@pytest.mark.parametrize(
    ("changes", "call", "message"),
    [
        ({"model": "Other"}, AttentionCall(GRID, model="Wan", num_layers=2), "for Other with 2.*this is Wan with 2"),
        ({}, AttentionCall(GRID, model="WanTransformer3DModel", num_layers=3), "with 2 self.*with 3"),
        ({"num_heads": 3}, AttentionCall(GRID), "for 3 heads, but this model has 2"),
        ({}, AttentionCall(TokenGrid(2, 5, 3)), "height=3, width=5.*height=5, width=3"),
        ({}, AttentionCall(TokenGrid(2, 3, 5, 1)), "text_before=0.*text_before=1"),
    ],
)
def test_what_the_plans_are_not_for_is_refused(changes, call, message):
    with pytest.raises(ValueError, match=message):
        served(calibration(**changes), call)


@pytest.fixture
def file(tmp_path):
    save_plans(tmp_path / "plan.safetensors", calibration())
    return tmp_path / "plan.safetensors"


def is_stock(model):
    processors = [type(module.processor).__module__ for module in model.modules() if hasattr(module, "processor")]
    return not diffsparse.is_sparse_attention_enabled(model) and all("diffusers" in name for name in processors)


@pytest.mark.parametrize("name", [str, lambda path: path])
def test_a_file_is_a_config(file, name):
    config = as_config(name(file))
    assert isinstance(config.strategy, Calibrated)
    assert config == SparseAttentionConfig(config.strategy, **SETTINGS)
    assert str(file) in repr(config)
    assert len(repr(config)) < 300


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"replan_every": 0}, "`replan_every`"), ({"dense_layers": ("a",)}, "`dense_layers`")],
)
def test_wrong_settings_in_a_file_are_refused(tmp_path, settings, message):
    save_plans(tmp_path / "plan.safetensors", calibration(settings=SETTINGS | settings))
    with pytest.raises(ValueError, match=f"plan.safetensors cannot be used: {message}"):
        as_config(tmp_path / "plan.safetensors")


def test_another_model_is_refused_before_anything_is_attached(file):
    for model in (TINY["wan"].make(num_layers=3), TINY["cogvideox"].make()):
        with pytest.raises(ValueError, match=f"WanTransformer3DModel with 2 .* but this is {type(model).__name__}"):
            diffsparse.enable_sparse_attention(model, str(file))
        assert is_stock(model)


def test_a_subclass_takes_the_plans_of_its_base(file):
    # As `fully_shard` of FSDP makes one of the transformer that it is given.
    pipe = tiny_wan_pipeline()
    pipe.enable_sparse_attention(file)
    expected = generate(pipe)
    pipe.disable_sparse_attention()
    pipe.transformer.__class__ = type("FSDPWanTransformer3DModel", (type(pipe.transformer),), {})
    pipe.enable_sparse_attention(file)
    assert torch.equal(generate(pipe), expected)


def test_a_broken_file_leaves_the_pipeline_alone(file):
    file.write_bytes(file.read_bytes()[:-5])
    pipe = tiny_wan_pipeline()
    with pytest.raises(ValueError, match="cannot be read"):
        pipe.enable_sparse_attention(file)
    assert is_stock(pipe.transformer)


@pytest.mark.parametrize(
    ("changes", "grid", "message"),
    [
        (
            {"num_heads": 4, "entries": (Entry(0, 0, "native", (HEAD,) * 4),)},
            (2, 3, 5),
            "4 heads, but this model has 2",
        ),
        ({}, (2, 5, 3), "height=3, width=5.*height=5, width=3"),
    ],
    ids=["heads", "grid"],
)
def test_another_grid_or_head_count_is_refused_at_the_first_call(tmp_path, changes, grid, message):
    """Also where the first steps are dense: nobody waits for minutes to be told."""
    save_plans(tmp_path / "plan.safetensors", calibration(**changes, settings=SETTINGS | {"dense_steps": 0.9}))
    pipe = tiny_wan_pipeline()
    pipe.enable_sparse_attention(tmp_path / "plan.safetensors")
    with pytest.raises(ValueError, match=message) as refused:
        generate(pipe, grid=grid)
    assert "plan.safetensors" in str(refused.value)
    pipe.disable_sparse_attention()
    assert is_stock(pipe.transformer)
    assert torch.equal(generate(pipe), generate(tiny_wan_pipeline()))


def test_layers_of_the_file_run_sparse_and_others_dense(file):
    pipe = tiny_wan_pipeline()
    pipe.enable_sparse_attention(str(file))
    generate(pipe)
    (report,) = pipe.sparse_attention_report().transformers
    assert (report.sparse_calls, report.dense_calls) == (6, 6)
    assert report.dense_reasons == {"the strategy keeps it dense": 6}
    assert report.head_densities == [[MAPS[0].float().mean().item()] * 2, [1.0, 1.0]]


def test_nothing_keeps_the_plans_alive(file):
    config = as_config(file)
    alive = weakref.ref(config.strategy)
    pipe = tiny_wan_pipeline()
    pipe.enable_sparse_attention(config)
    generate(pipe)
    pipe.disable_sparse_attention()
    del config
    gc.collect()
    assert alive() is None
