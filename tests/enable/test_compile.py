"""torch.compile of enabled models: no graph more than stock, and nothing compiled in that changes."""

import pytest
import torch
from enabled import SPARSE, config, each_way_to_attention, report_of, run, run_steps, steps
from tiny_models import TINY, generate

import diffsparse


@pytest.fixture
def dynamo():
    """torch.compile without what earlier tests compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


def compile_blocks(model, backend="eager"):
    """Regional compilation, as a user asks for it."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend=backend)


@each_way_to_attention
def test_regional_compile_makes_as_many_graphs_as_stock(tiny, model, call, dynamo):
    # Tracing through to autograd checks shapes and strides as well; once is enough.
    backend = "aot_eager" if tiny is TINY["wan"] else "eager"
    # Dense first, then sparse, with plans kept and made again: nothing of that may end up in a graph.
    dense_first = config(dense_layers=(0,), replan_every=2)
    graphs, outputs = [], []
    for compiled in (tiny.make(), model):
        if compiled is model:
            model.enable_sparse_attention(dense_first)
        compile_blocks(compiled, backend)
        outputs.append(run_steps(compiled, call, 4))
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
        dynamo.reset()
        dynamo.utils.counters.clear()
    assert graphs[0] == graphs[1] > 0
    assert report_of(model).sparse_calls == 4 * (len(tiny.layers) - 1) * tiny.calls_per_layer

    eager = tiny.make()
    eager.enable_sparse_attention(dense_first)
    torch.testing.assert_close(outputs[1], run_steps(eager, call, 4))
    assert not torch.allclose(outputs[1], outputs[0])


def test_steps_and_layers_add_no_graphs_however_many(dynamo):
    model = TINY["wan"].make(num_layers=12)
    call = TINY["wan"].call(model, (1, 4, 4))
    model.enable_sparse_attention(config(replan_every=1, dense_layers=(3,)))
    compile_blocks(model)
    run_steps(model, call, 10)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert report_of(model).sparse_calls == 10 * 11


def test_enabling_and_disabling_after_compiling_takes_effect(dynamo):
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    compile_blocks(model)
    stock = run_steps(model, call)
    model.enable_sparse_attention(SPARSE)
    sparse = run_steps(model, call)
    assert report_of(model).sparse_calls == 3 * 3
    assert not torch.allclose(sparse, stock)
    model.disable_sparse_attention()
    assert torch.equal(run_steps(model, call), stock)


def test_a_pipeline_with_a_compiled_transformer_runs_sparse(pipeline, dynamo):
    stock = generate(pipeline)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    pipeline.enable_sparse_attention(SPARSE)
    assert not torch.allclose(generate(pipeline), stock)
    assert report_of(pipeline).sparse_calls == 3 * 2 * 2
    pipeline.disable_sparse_attention()
    torch.testing.assert_close(generate(pipeline), stock)


def compile_whole(model, way):
    if way == "torch.compile":
        return torch.compile(model, fullgraph=True, backend="eager")
    model.compile(fullgraph=True, backend="eager")
    return model


@pytest.mark.parametrize(
    ("way", "order"),
    [
        ("torch.compile", "enable, compile"),
        ("method", "compile, enable"),
        ("torch.compile", "compile, run, enable"),
    ],
)
def test_a_transformer_compiled_whole_sees_each_step_and_grid(way, order, dynamo):
    model = TINY["wan"].make(num_layers=1)
    videos = [steps(model, TINY["wan"].call(model, grid), 2) for grid in ((2, 3, 5), (2, 5, 3))]
    calls = [call for video in videos for call in video]
    early = config(dense_steps=0.1)
    stock = run(model, calls[0])
    model.enable_sparse_attention(early)
    expected = [run(model, call) for call in calls]
    model.disable_sparse_attention()

    whole = model
    for action in order.split(", "):
        if action == "compile":
            whole = compile_whole(model, way)
        elif action == "enable":
            diffsparse.enable_sparse_attention(whole, early)
        else:
            torch.testing.assert_close(run(whole, calls[0]), stock)
    for call, output in zip(calls, expected):
        torch.testing.assert_close(run(whole, call), output)
    report = report_of(whole)
    assert (report.sparse_calls, report.dense_reasons) == (2, {"early step": 2})
    diffsparse.disable_sparse_attention(whole)
    torch.testing.assert_close(run(whole, calls[0]), stock)


def test_a_compiled_function_around_the_transformer_is_refused_with_the_way_out(dynamo):
    model = TINY["wan"].make(num_layers=1)
    call = TINY["wan"].call(model, (1, 3, 5))
    model.enable_sparse_attention(SPARSE)
    around = torch.compile(lambda: run(model, call), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Compile the transformer itself"):
        around()


def test_attention_is_captured_in_no_cuda_graph():
    # A graph replays kernels alone: the plan of the call that was captured would be run for ever.
    assert torch.Tag.cudagraph_unsafe in torch.ops.diffsparse.attend.default.tags
