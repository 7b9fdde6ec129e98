from __future__ import annotations

import comfy_standins as standins
import pytest
import torch


def compiled(whole, kind=standins.WanModel):
    """A model as nodes compile it, whole or block by block: nothing guards its transformer options."""
    model = standins.patcher(kind)
    options = {"guard_filter_fn": lambda guards: ["transformer_options" not in guard.name for guard in guards]}
    if whole:
        model.diffusion_model.compile(backend="eager", options=options)
    else:
        for layer, block in enumerate(model.diffusion_model.blocks):
            model.diffusion_model.blocks[layer] = torch.compile(block, backend="eager", options=options)
    model.model_options["torch_compile_kwargs"] = {"options": options}
    return model


def said_to_be_compiled(kind=standins.WanModel):
    """A model of which its options alone say that a node compiles it."""
    model = standins.patcher(kind)
    model.model_options["torch_compile_kwargs"] = {}
    return model


def resets(monkeypatch):
    """What grows by one each time that all compiled code is dropped."""
    seen: list = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: seen.append(None))
    return seen


def sampled_once(monkeypatch, kind=standins.WanModel):
    """A model that is said to be compiled, the same sparse after a run, and `resets`."""
    seen, model = resets(monkeypatch), said_to_be_compiled(kind)
    sparse = standins.patched(model)
    standins.sample(sparse)
    return model, sparse, seen


@pytest.mark.parametrize("kind", [standins.WanModel, standins.AsymmDiTJoint])
@pytest.mark.parametrize("whole", [False, True])
def test_what_was_compiled_before_does_not_run_in_the_place_of_sparse_attention(whole, kind):
    torch.compiler.reset()
    eager = standins.sample(standins.patched(standins.patcher(kind)))
    model = compiled(whole, kind)
    standins.sample(model)
    sparse = standins.patched(model)
    torch.testing.assert_close(standins.sample(sparse), eager)
    (report,) = sparse.get_attachment("diffsparse").report().transformers
    assert (report.sparse_calls, report.dense_reasons) == (8, {"early step": 2})


def test_a_model_is_compiled_anew_once(monkeypatch):
    seen = resets(monkeypatch)
    model = said_to_be_compiled()
    for density in (0.3, 0.3, 0.6):
        standins.sample(standins.patched(model, density=density))
    assert len(seen) == 1


def test_blocks_that_no_longer_come_have_it_compiled_anew_and_this_is_said(monkeypatch, caplog):
    model, sparse, seen = sampled_once(monkeypatch)
    # As code does that was compiled for another size without DiffSparse.
    model.diffusion_model.blocks[1].self_attn.forward = lambda x, *args, **kwargs: x
    standins.sample(sparse)
    assert "torch.compile has run code that it made without DiffSparse" in caplog.text
    assert "another node has replaced the attention of some blocks" not in caplog.text
    assert len(seen) == 1
    standins.sample(sparse)
    assert len(seen) == 2
    # It was not that, so another node hides them. Nothing is compiled again for it.
    assert "another node has replaced the attention of some blocks" in caplog.text
    standins.sample(sparse)
    assert len(seen) == 2


def test_a_model_whose_calls_are_seen_but_none_of_its_blocks_is_compiled_anew_too(monkeypatch, caplog):
    model, sparse, seen = sampled_once(monkeypatch, standins.AsymmDiTJoint)
    # Compiled code calls no hooks that it did not see.
    monkeypatch.setattr(model.diffusion_model, "run_block", lambda block, *args: block.forward(*args))
    standins.sample(sparse)
    assert "torch.compile has run code that it made without DiffSparse" in caplog.text
    standins.sample(sparse)
    assert len(seen) == 2


def test_a_run_that_ends_before_any_block_has_nothing_compiled_again(monkeypatch, caplog):
    model, sparse, seen = sampled_once(monkeypatch)
    with monkeypatch.context() as until:
        until.setattr(model.diffusion_model, "run_block", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            standins.sample(sparse)
    standins.sample(sparse)
    assert len(seen) == 1
    assert "torch.compile" not in caplog.text


def stop(*args, **kwargs):
    raise RuntimeError("stopped")


def test_a_model_that_no_node_compiles_leaves_compiled_what_is(monkeypatch):
    seen = resets(monkeypatch)
    standins.sample(standins.patched(standins.patcher()))
    assert not seen
