"""Models and sizes that nobody thought of: they run, sparse or dense, and the report says which and why."""

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as functional
from enabled import FULL, SPARSE, config, report_of, run
from tiny_models import TINY

import diffsparse
from diffsparse import DenseFallback

REFUSED = "its processor cannot be made sparse"


class UnknownTransformer(torch.nn.Module):
    """A transformer of no family, and without attention processors."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, hidden_states):
        return self.linear(hidden_states)


class Pipeline:
    """Whatever has components."""

    def __init__(self, components):
        self.components = components


def test_a_pipeline_with_two_unknown_transformers_stays_dense_and_says_so_of_each(caplog):
    parts = {"transformer": UnknownTransformer(), "transformer_2": UnknownTransformer()}
    pipeline = Pipeline(parts)
    stock = parts["transformer"](torch.ones(1, 4))
    diffsparse.enable_sparse_attention(pipeline, config(strict=True))
    assert len([r for r in caplog.records if "of no model family" in r.getMessage()]) == 2
    assert torch.equal(parts["transformer"](torch.ones(1, 4)), stock)
    for report in diffsparse.sparse_attention_report(pipeline).transformers:
        assert (report.family, report.num_layers, report.sparse_calls, report.dense_calls) == (None, 0, 0, 0)
    diffsparse.disable_sparse_attention(pipeline)


def projections(attn, hidden_states, rotary_emb):
    """Query, key and value [B, S, H, D] as Wan's own processor makes them, but for its rotary embedding."""
    norms = (attn.norm_q, attn.norm_k, torch.nn.Identity())
    layers = (attn.to_q, attn.to_k, attn.to_v)
    return (norm(layer(hidden_states)).unflatten(2, (attn.heads, -1)) for norm, layer in zip(norms, layers))


def result(attn, hidden_states):
    return attn.to_out[1](attn.to_out[0](hidden_states.flatten(2)))


class ByAlias:
    """Calls torch's attention by another name of its module than diffusers uses."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        heads_first = (x.transpose(1, 2) for x in projections(attn, hidden_states, rotary_emb))
        return result(attn, functional.scaled_dot_product_attention(*heads_first).transpose(1, 2))


class ByPath:
    """Calls torch's attention by a path that is not looked at."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        heads_first = (x.transpose(1, 2) for x in projections(attn, hidden_states, rotary_emb))
        return result(attn, torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2))


class ByHand:
    """Calls no attention function at all."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query, key, value = (x.transpose(1, 2) for x in projections(attn, hidden_states, rotary_emb))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return result(attn, (scores.softmax(-1) @ value).transpose(1, 2))


def from_nowhere():
    """A class whose module Python does not know, as a notebook or a plugin may make it."""
    names = {"F": functional, "projections": projections, "result": result, "__name__": "a_module_of_nowhere"}
    exec(
        "class FromNowhere:\n"
        "    def __call__(self, attn, hidden_states, encoder=None, attention_mask=None, rotary_emb=None):\n"
        "        heads_first = (x.transpose(1, 2) for x in projections(attn, hidden_states, rotary_emb))\n"
        "        return result(attn, F.scaled_dot_product_attention(*heads_first).transpose(1, 2))\n",
        names,
    )
    return names["FromNowhere"]()


@dataclasses.dataclass(frozen=True)
class Frozen(ByAlias):
    """Cannot be changed, nor copied."""

    name: str = "frozen"

    def __copy__(self):
        raise TypeError("there is one of it")


@dataclasses.dataclass(slots=True)
class Slotted:
    """What it holds is not in its `__dict__`."""

    name: str = "slotted"
    __call__ = ByAlias.__call__


PROCESSORS = [
    (ByAlias, True),
    (Frozen, True),
    (Slotted, False),
    (ByPath, False),
    (ByHand, False),
    (from_nowhere, False),
]


@pytest.mark.parametrize(("make", "sparse"), PROCESSORS)
def test_a_processor_of_the_users_own_runs_sparse_or_is_reported(make, sparse):
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    model.blocks[1].attn1.set_processor(make())
    stock = run(model, call)
    model.enable_sparse_attention(FULL)
    torch.testing.assert_close(run(model, call), stock)
    report = report_of(model)
    assert report.sparse_calls == (3 if sparse else 2)
    assert report.unreached_layers == ({} if sparse else {REFUSED: 1})
    model.disable_sparse_attention()
    assert type(model.blocks[1].attn1.processor) is type(make()) or make is from_nowhere
    assert getattr(model.blocks[1].attn1.processor, "name", None) == getattr(make(), "name", None)
    assert torch.equal(run(model, call), stock)
    if not sparse:
        model.enable_sparse_attention(config(strict=True))
        with pytest.raises(DenseFallback, match=REFUSED):
            run(model, call)


def test_a_processor_may_use_what_its_module_got_after_another_was_enabled(monkeypatch):
    # As in a notebook, whose names grow.
    module = types.ModuleType("a_growing_module")
    module.F = functional
    monkeypatch.setitem(sys.modules, module.__name__, module)
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    for number in (1, 2):
        exec(
            f"def attend{number}(*args, scale=None): return F.scaled_dot_product_attention(*args, scale=scale)\n"
            f"class Processor{number}:\n"
            "    def __call__(self, attn, hidden_states, encoder=None, attention_mask=None, rotary_emb=None):\n"
            "        x = attn.to_q(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)\n"
            "        F.scaled_dot_product_attention(x, x, x)\n"
            f"        return attn.to_out[0](attend{number}(x, x, x).transpose(1, 2).flatten(2))\n",
            vars(module),
        )
        model.blocks[0].attn1.set_processor(getattr(module, f"Processor{number}")())
        stock = run(model, call)
        model.enable_sparse_attention(FULL)
        torch.testing.assert_close(run(model, call), stock)
        # Three layers, and the function of the module that attends once more for the first.
        assert report_of(model).sparse_calls == 3 + 1
        model.disable_sparse_attention()


@pytest.mark.parametrize("grid", [(1, 7, 5), (3, 1, 5), (3, 5, 1), (1, 1, 5), (1, 1, 1)])
@pytest.mark.parametrize("name", ["wan", "hunyuan_video15", "cogvideox", "mochi"])
def test_one_frame_one_row_or_one_token_runs_sparse(name, grid):
    model = TINY[name].make()
    call = TINY[name].call(model, grid)
    stock = run(model, call)
    for chosen in (FULL, SPARSE):
        model.enable_sparse_attention(chosen)
        output = run(model, call)
        assert output.isfinite().all()
        if chosen is FULL:
            torch.testing.assert_close(output, stock)
        assert report_of(model).dense_calls == 0
        model.disable_sparse_attention()


@pytest.mark.parametrize("name", [name for name in TINY if TINY[name].drops_unfilled_patches])
def test_latents_that_fill_no_whole_number_of_patches_run_sparse(name):
    model = TINY[name].make()
    call = TINY[name].call(model, TINY[name].grid)
    call[TINY[name].latents] = functional.pad(call[TINY[name].latents], (0, 1, 0, 1))
    stock = run(model, call)
    model.enable_sparse_attention(FULL)
    torch.testing.assert_close(run(model, call), stock)
    assert report_of(model).dense_calls == 0
