"""What stands in for the attention functions while a layer runs; whole models are in tests/enable."""

import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from enabled import SPARSE, report_of, run
from tiny_models import TINY
from torch._subclasses.fake_tensor import FakeTensorMode

from diffsparse import processors
from diffsparse.key_mask import KeyMask

WITHOUT_DIFFUSERS = """
import sys, types
import torch
from diffsparse import processors

module = sys.modules["own"] = types.ModuleType("own")
exec('''
import torch.nn.functional as F

def dispatch_attention_fn(query, key, value):
    assert query is None, "not by the session"
    return F.scaled_dot_product_attention(query, key, value)

class Processor:
    def __call__(self, attn, x):
        return dispatch_attention_fn(x, x, x)
''', vars(module))
attention = torch.nn.Module()
attention.processor = module.Processor()
assert "diffusers" not in sys.modules
assert processors.make_sparse(attention, torch.tensor(0))
print(attention.processor(attention, torch.ones(1, 8, 2, 16)).shape)
"""


def test_a_model_of_its_own_runs_where_diffusers_is_not_loaded_yet():
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_DIFFUSERS], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "[1, 8, 2, 16]" in result.stdout


def test_what_a_thread_runs_by_is_ours_while_another_enables():
    name = TINY["wan"].make().blocks[0].attn1.processor.__class__.__module__
    processors._shadow_globals(name)
    shadow = sys.modules[f"diffsparse._shadow.{name}"]
    seen = set()

    def watch(*_):
        seen.add((shadow.dispatch_attention_fn, shadow.F.scaled_dot_product_attention))
        return watch

    traced = sys.gettrace()
    sys.settrace(watch)
    try:
        processors._shadow_globals(name)
    finally:
        sys.settrace(traced)
    assert seen == {(processors.dispatch_attention_fn, processors.scaled_dot_product_attention)}


def test_a_function_of_another_module_keeps_the_names_of_its_own(monkeypatch):
    home, module = types.ModuleType("its_home"), types.ModuleType("another")
    exec("def attend(x): return F.scaled_dot_product_attention(x, x, x)", vars(home))
    home.F = module.F = F
    module.attend = home.attend
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert processors._shadow_globals(module.__name__).names["attend"] is home.attend


def test_padding_takes_its_arguments_by_name():
    assert processors.pad(input=torch.ones(1, 3), pad=(1, 0), value=2.0).tolist() == [[2, 1, 1, 1]]


@pytest.mark.parametrize("pad", [processors.pad, F.pad])
def test_a_key_mask_is_padded_as_the_tokens_of_its_keys(pad):
    for padded in (
        pad(KeyMask(torch.zeros(1, 2)), (1, 0), value=True),
        pad(KeyMask(torch.zeros(1, 2)), pad=(1, 0), value=1),
    ):
        assert padded.keys.tolist() == [[1, 0, 0]]


@pytest.fixture
def running(monkeypatch):
    """An enabled model, as if its first layer ran."""
    model = TINY["wan"].make()
    model.enable_sparse_attention(SPARSE)
    handle = model.get_submodule(TINY["wan"].layers[0]).processor._diffsparse_handle
    monkeypatch.setattr(processors._CURRENT, "handle", handle)
    return model


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.5}], ids=str)
@pytest.mark.parametrize("way", ["torch", "diffusers"])
def test_what_no_session_can_do_is_the_stock_function(options, way, running):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 30, 8, generator=generator) for _ in range(3))
    torch.manual_seed(0)
    stock = F.scaled_dot_product_attention(query, key, value, **options)
    torch.manual_seed(0)
    if way == "torch":
        output = processors.scaled_dot_product_attention(query, key, value, **options)
    else:
        tokens_first = (x.transpose(1, 2) for x in (query, key, value))
        output = processors.dispatch_attention_fn(*tokens_first, **options).transpose(1, 2)
    assert torch.equal(output, stock)
    assert report_of(running).dense_reasons == {"causal attention or dropout": 1}


@pytest.mark.parametrize("way", ["torch", "diffusers"])
def test_dense_queries_that_share_keys_do_so_as_in_stock(way, running):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 30, 8, generator=generator) for heads in (4, 2, 2))
    stock = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    if way == "torch":
        output = processors.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    else:
        tokens_first = (x.transpose(1, 2) for x in (query, key, value))
        output = processors.dispatch_attention_fn(*tokens_first, enable_gqa=True).transpose(1, 2)
    assert torch.equal(output, stock)
    assert report_of(running).dense_reasons == {"called outside its transformer": 1}


def test_queries_that_share_keys_stay_the_models_own_under_context_parallelism(running, monkeypatch):
    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", lambda query, *_, **__: query)
    query, key = torch.zeros(1, 30, 4, 8), torch.zeros(1, 30, 2, 8)
    ulysses = types.SimpleNamespace(context_parallel_config=types.SimpleNamespace(ring_degree=1, ulysses_degree=2))
    processors.dispatch_attention_fn(query, key, key, enable_gqa=True, parallel_config=ulysses)
    assert report_of(running).dense_reasons == {"grouped queries under context parallelism": 1}


def test_what_a_processor_asks_of_its_backend_alone_reaches_it(running, monkeypatch):
    asked, signature = [], inspect.signature(attention_dispatch.dispatch_attention_fn)

    def stand_in(*args, **kwargs):
        asked.append(signature.bind(*args, **kwargs).arguments.get("attention_kwargs"))
        return args[0]

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", stand_in)
    monkeypatch.setattr(processors, "_attend", lambda query, *others: query.transpose(1, 2))
    query = torch.ones(1, 30, 2, 8)
    processors.dispatch_attention_fn(query, query, query, attention_kwargs={"window_size": (4, 4)})
    assert asked == [{"window_size": (4, 4)}]
    (reason,) = report_of(running).dense_reasons
    assert reason.startswith("attention_kwargs")


@pytest.mark.parametrize("way", ["torch", "diffusers"])
def test_compiled_code_is_told_the_dtype_of_autocast(way, running):
    names = {"torch": "scaled_dot_product_attention", "diffusers": "dispatch_attention_fn"}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype=torch.bfloat16):
        query = torch.randn(1, 2, 30, 8)
        assert getattr(processors, names[way])(query, query, query).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["cogvideox", "pixart"])
def test_sparse_processors_that_come_back_after_disabling_can_be_enabled_again(name):
    tiny = TINY[name]
    model = tiny.make()
    call = tiny.call(model, tiny.grid)
    model.enable_sparse_attention(SPARSE)
    expected = run(model, call)
    # diffusers puts the processors aside, which are sparse now, and others in their place.
    model.fuse_qkv_projections()
    model.disable_sparse_attention()
    model.unfuse_qkv_projections()
    model.enable_sparse_attention(SPARSE)
    assert torch.equal(run(model, call), expected)
    report = report_of(model)
    assert (report.sparse_calls, report.unreached_layers) == (len(tiny.layers), {})
    model.disable_sparse_attention()
    assert [type(p) for p in model.attn_processors.values()] == [type(p) for p in tiny.make().attn_processors.values()]


def test_processors_that_another_model_was_given_run_dense_there():
    models = TINY["flux"].make(), TINY["flux"].make()
    call = TINY["flux"].call(models[0], (1, 7, 5))
    stock = run(models[1], call)
    models[0].enable_sparse_attention(SPARSE)
    sparse = run(models[0], call)
    models[1].set_attn_processor(models[0].attn_processors)
    assert torch.equal(run(models[1], call), stock)
    assert torch.equal(run(models[0], call), sparse)
    assert report_of(models[0]).sparse_calls == 2 * 4
    # It can be enabled as well.
    models[1].enable_sparse_attention(SPARSE)
    assert torch.equal(run(models[1], call), run(models[0], call))
    assert (report_of(models[0]).sparse_calls, report_of(models[1]).sparse_calls) == (3 * 4, 4)
