"""What each family says about its transformer, held against what really reaches the attention calls."""

import math
from contextlib import contextmanager

import diffusers
import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from tiny.model import Variant
from tiny_models import TINY

from diffsparse.pipelines.families import FAMILIES, find_family
from diffsparse.pipelines.family import Layout
from diffsparse.pipelines.left_alone import LEFT_ALONE


class Case:
    """A tiny model in one of its variants, a call of it, and what its family says of the two."""

    def __init__(self, name, variant=None):
        self.tiny = TINY[name]
        self.variant = self.tiny.variants[variant] if variant else Variant()
        self.model = self.tiny.make(**self.variant.config)
        self.call = self.tiny.call(self.model, self.tiny.grid, batch=2)
        self.call |= self.variant.call(self.call)

    @property
    def expected(self):
        before = self.tiny.text_before + self.variant.text_before
        after = self.tiny.text_after
        after = None if after is None or self.variant.ends else after + self.variant.text_after
        return Layout(*self.tiny.grid, before, after)

    def layout(self, **changes):
        return find_family(self.model).layout(self.model, self.call | changes)


NAMES = [(name, variant) for name, tiny in TINY.items() for variant in (None, *tiny.variants)]


@pytest.fixture(params=NAMES, ids=[" ".join(filter(None, names)) for names in NAMES])
def case(request):
    return Case(*request.param)


@contextmanager
def recorded_attention(model, monkeypatch):
    """(module name, query [B, H, Sq, D], key [B, H, Sk, D]) of every softmax attention while the model runs."""
    calls, running, hooks = [], [], []
    stock = F.scaled_dot_product_attention

    def record(query, key, *args, **kwargs):
        calls.append((running[-1] if running else "", query.detach().clone(), key.detach().clone()))
        return stock(query, key, *args, **kwargs)

    for name, module in model.named_modules():
        if hasattr(module, "processor"):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", record)
        yield calls
    for hook in hooks:
        hook.remove()


def attention_of(case, monkeypatch, **changes):
    with recorded_attention(case.model, monkeypatch) as calls, torch.no_grad():
        case.model(**(case.call | changes))
    return [each for each in calls if not is_of_text_alone(case.model, case.tiny, each[1])]


def is_of_text_alone(model, tiny, query):
    return find_family(model).text_attends_alone and query.shape[2] < math.prod(tiny.grid)


def first_key(case, monkeypatch, least=0, **changes):
    """The keys of the first self-attention layer of at least so many tokens: [S, H * D] of the first batch row."""
    calls = attention_of(case, monkeypatch, **changes)
    key = next(key for name, _, key in calls if name in case.tiny.layers and key.shape[2] >= least)
    return key[0].transpose(0, 1).flatten(1)


def changed_rows(before, after):
    return (before != after).any(-1).nonzero().flatten().tolist()


def test_layout_names_the_grid_and_the_text(case):
    assert case.layout() == case.expected


def test_layout_counts_the_tokens_that_every_layer_attends_to(case, monkeypatch):
    frames, height, width, before, after = case.layout()
    calls = attention_of(case, monkeypatch)
    lengths = {(q.shape[2], k.shape[2]) for name, q, k in calls if name in case.tiny.layers}
    ends = (case.variant.ends or case.tiny.text_lengths) if after is None else (after,)
    video = frames * height * width
    keys = {video + before + end for end in ends}
    expected = {(video if case.tiny.grid_queries else each, each) for each in keys}
    # Some layers see the grid without its text.
    assert expected <= lengths <= expected | {(video, video)}


def test_layers_are_the_self_attention_modules_in_the_order_they_run(case, monkeypatch):
    assert find_family(case.model).layer_names(case.model) == case.tiny.layers
    ran = [name for name, _, _ in attention_of(case, monkeypatch) if name in case.tiny.layers]
    assert ran == [name for name in case.tiny.layers for _ in range(case.tiny.calls_per_layer)]


def test_no_other_attention_sees_the_whole_sequence(case, monkeypatch):
    tokens = attention_of(case, monkeypatch)
    lengths = {k.shape[2] for name, _, k in tokens if name in case.tiny.layers}
    others = [(q.shape[2], k.shape[2]) for name, q, k in tokens if name not in case.tiny.layers]
    assert all(queries not in lengths or keys not in lengths for queries, keys in others)


def test_a_change_in_one_patch_changes_the_token_the_layout_says(case, monkeypatch):
    layout = case.layout()
    frame, row, column = (size - 1 for size in case.tiny.grid)
    row -= 2
    place_in_grid = (frame * layout.height + row) * layout.width + column
    latents = case.call[case.tiny.latents].clone()
    if case.tiny.latent_axes == "bsc":
        latents[:, place_in_grid] += 1
    else:
        video = latents if "f" in case.tiny.latent_axes else latents.unsqueeze(case.tiny.latent_axes.index("h"))
        axes = case.tiny.latent_axes if "f" in case.tiny.latent_axes else case.tiny.latent_axes.replace("h", "fh")
        video = video.permute([axes.index(axis) for axis in "bcfhw"])
        patch = (full // tokens for full, tokens in zip(video.shape[2:], case.tiny.grid))
        place = (slice(i * p, (i + 1) * p) for i, p in zip((frame, row, column), patch))
        video[(slice(None), slice(None), *place)] += 1
    before = first_key(case, monkeypatch)
    after = first_key(case, monkeypatch, **{case.tiny.latents: latents})
    text_before = layout.text_before if len(before) > math.prod(case.tiny.grid) else 0
    assert changed_rows(before, after) == [text_before + place_in_grid]


def test_a_change_of_the_text_changes_the_tokens_of_the_prompt(case, monkeypatch):
    if case.tiny.text is None:
        return
    text = case.call[case.tiny.text]
    other = torch.randn(text.shape, generator=torch.Generator().manual_seed(1))
    least = math.prod(case.tiny.grid) + bool(case.tiny.prompt)
    before = first_key(case, monkeypatch, least)
    after = first_key(case, monkeypatch, least, **{case.tiny.text: other})
    prompt = case.variant.prompt or case.tiny.prompt
    assert changed_rows(before, after) == sorted(place % len(before) for place in prompt)


def test_reference_images_stand_after_the_grid(monkeypatch):
    case = Case("flux", "kontext")
    layout = case.layout()
    latents = case.call["hidden_states"].clone()
    latents[:, 35:] += 1
    before = first_key(case, monkeypatch)
    after = first_key(case, monkeypatch, hidden_states=latents)
    assert changed_rows(before, after) == list(range(len(before) - layout.text_after, len(before)))


@pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)
def test_layout_is_none_where_the_call_does_not_say(tiny):
    model = tiny.make()
    call = tiny.call(model, tiny.grid)
    layout = find_family(model).layout
    assert layout(model, {}) is None
    assert layout(model, dict.fromkeys(call)) is None
    assert layout(model, call | {tiny.latents: torch.zeros(2, 3)}) is None


@pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)
def test_the_mask_hides_padded_text_only_where_the_family_says(tiny, monkeypatch):
    model = tiny.make()
    call = tiny.call(model, tiny.grid, batch=2)
    video = math.prod(tiny.grid)
    every_mask = []
    stock = F.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, *args, **kwargs):
        every_mask.append(attn_mask)
        return stock(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    with recorded_attention(model, monkeypatch) as calls, torch.no_grad():
        model(**call)
    masks = [
        mask
        for (name, query, _), mask in zip(calls, every_mask, strict=True)
        if name in tiny.layers and not is_of_text_alone(model, tiny, query)
    ]
    assert len(masks) == len(tiny.layers) * tiny.calls_per_layer
    masked = tiny.text_lengths is not None and tiny.text_after is not None
    assert find_family(model).padding_mask or not masked
    if not masked:
        # One of all pairs comes in any case, and hides none here.
        assert all(mask.all() if find_family(model).masks_pairs else mask is None for mask in masks)
        return
    before = tiny.text_before + video
    if find_family(model).spreads_mask:
        keys = [mask[:, :, :1] for mask in masks]
        assert all(torch.equal(mask, k & k.mT) for mask, k in zip(masks, keys))
        masks = keys
    for mask in masks:
        assert mask.dtype == torch.bool
        assert mask.shape == (2, 1, 1, before + tiny.text_after)
        assert mask.sum(-1).flatten().tolist() == [before + length for length in tiny.text_lengths]
        assert (mask.int().diff() <= 0).all()


def test_every_class_is_tested_and_named_once():
    names = [name for family in FAMILIES for name in family.transformers]
    assert len(set(names)) == len(names)
    assert set(names) == {type(tiny.make()).__name__ for tiny in TINY.values()}


def test_what_is_left_alone_is_of_no_family():
    known = {name for family in FAMILIES for name in family.transformers}
    assert set(LEFT_ALONE) & known == set()


@pytest.mark.skipif(Version(diffusers.__version__) < Version("0.42"), reason="some are in diffusers since 0.42")
def test_what_is_left_alone_is_a_transformer_of_diffusers():
    # In the list of names that diffusers can import, whether this release has all of them or not.
    assert [name for name in LEFT_ALONE if not isinstance(getattr(diffusers, name), type)] == []


def test_a_class_of_the_same_name_or_a_subclass_is_found_and_others_are_not():
    wan = type(TINY["wan"].make())
    subclass = type("MyWan", (wan,), {})
    assert find_family(object.__new__(subclass)).name == "wan"
    assert find_family(torch.nn.Linear(1, 1)) is None
