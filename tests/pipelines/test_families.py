"""What each family says about its transformer, held against what really reaches the attention calls."""

import fnmatch
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CHANNELS, TINY, TinyModel, image_ids, tiny_grid

from diffsparse.pipelines.families import FAMILIES, find_family
from diffsparse.pipelines.family import Layout


class Variant:
    """A checkpoint that shares its family's class: what its config and its calls add."""

    def __init__(self, family, config=None, call=None, grid=None):
        self.tiny: TinyModel = TINY[family]
        self.model = self.tiny.make(**(config or {}))
        self.grid = grid or tiny_grid(family)
        self.call = self.tiny.call(self.model, self.grid, batch=2)
        self.call |= call(self.call) if call else {}
        self.extra_after = self.call["hidden_states"].shape[1] - 35 if family == "flux" else 0

    @property
    def expected(self):
        return Layout(*self.grid, self.tiny.text_before, self.tiny.text_after + self.extra_after)

    def layout(self, **changes):
        return find_family(self.model).layout(self.model, self.call | changes)


def clean_first_frame(call):
    # Wan 2.2 5B: one timestep for each token.
    return {"timestep": torch.full((2, 3 * 7 * 5), 500)}


def kontext(call):
    references = torch.cat([image_ids(4, 3, image=1), image_ids(2, 2, image=1)])
    return {
        "hidden_states": torch.cat([call["hidden_states"], torch.randn(2, 16, CHANNELS)], dim=1),
        "img_ids": torch.cat([call["img_ids"], references]),
    }


VARIANTS = {
    "wan": lambda: Variant("wan"),
    "wan image to video": lambda: Variant("wan", {"in_channels": 9, "out_channels": 4}),
    "wan clean first frame": lambda: Variant("wan", call=clean_first_frame),
    "wan patches in time": lambda: Variant("wan", {"patch_size": (2, 2, 4)}),
    "hunyuan_video": lambda: Variant("hunyuan_video"),
    "hunyuan_video no guidance": lambda: Variant("hunyuan_video", {"guidance_embeds": False}),
    "hunyuan_video latent_concat": lambda: Variant(
        "hunyuan_video", {"image_condition_type": "latent_concat", "in_channels": 9}
    ),
    "hunyuan_video token_replace": lambda: Variant("hunyuan_video", {"image_condition_type": "token_replace"}),
    "hunyuan_video patches in time": lambda: Variant("hunyuan_video", {"patch_size_t": 2}),
    "cogvideox": lambda: Variant("cogvideox"),
    "cogvideox 1.5": lambda: Variant(
        "cogvideox", {"patch_size_t": 2, "patch_bias": False, "use_rotary_positional_embeddings": True}
    ),
    "cogvideox image to video": lambda: Variant("cogvideox", {"in_channels": 8}),
    "ltx": lambda: Variant("ltx"),
    "flux": lambda: Variant("flux"),
    "flux kontext": lambda: Variant("flux", call=kontext),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]()


@contextmanager
def recorded_attention(model, monkeypatch):
    """(module name, query [B, H, Sq, D], number of keys) of every softmax attention while the model runs."""
    calls, running, hooks = [], [], []
    stock = F.scaled_dot_product_attention

    def record(query, key, *args, **kwargs):
        calls.append((running[-1], query.detach().clone(), key.shape[2]))
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


def attention_of(variant, monkeypatch, **changes):
    with recorded_attention(variant.model, monkeypatch) as calls, torch.no_grad():
        variant.model(**(variant.call | changes))
    return calls


def first_query(variant, monkeypatch, **changes):
    """What the first self-attention layer is given: [S, H * D] of the first batch row."""
    calls = attention_of(variant, monkeypatch, **changes)
    query = next(query for name, query, _ in calls if name == variant.tiny.layers[0])
    return query[0].transpose(0, 1).flatten(1)


def changed_rows(before, after):
    return (before != after).any(-1).nonzero().flatten().tolist()


def layer_names(model):
    patterns = find_family(model).layers
    return tuple(
        name for name, _ in model.named_modules() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )


def test_layout_names_the_grid_and_the_text(variant):
    assert variant.layout() == variant.expected


def test_layout_counts_the_tokens_that_every_layer_attends_to(variant, monkeypatch):
    frames, height, width, before, after = variant.layout()
    calls = attention_of(variant, monkeypatch)
    lengths = {(q.shape[2], keys) for name, q, keys in calls if name in variant.tiny.layers}
    tokens = frames * height * width + before + after
    assert lengths == {(tokens, tokens)}


def test_layers_are_the_self_attention_modules_in_the_order_they_run(variant, monkeypatch):
    assert layer_names(variant.model) == variant.tiny.layers
    ran = [name for name, _, _ in attention_of(variant, monkeypatch) if name in variant.tiny.layers]
    assert tuple(ran) == variant.tiny.layers


def test_no_other_attention_sees_the_whole_sequence(variant, monkeypatch):
    tokens = attention_of(variant, monkeypatch)
    lengths = {q.shape[2] for name, q, _ in tokens if name in variant.tiny.layers}
    others = [(q.shape[2], keys) for name, q, keys in tokens if name not in variant.tiny.layers]
    assert all(queries not in lengths or keys not in lengths for queries, keys in others)


def test_a_change_in_one_patch_changes_the_token_the_layout_says(variant, monkeypatch):
    layout = variant.layout()
    frame, row, column = (size - 1 for size in variant.grid)
    row -= 2
    token = layout.text_before + (frame * layout.height + row) * layout.width + column
    latents = variant.call["hidden_states"].clone()
    if latents.ndim == 3:  # packed: [B, S, C]
        latents[:, token - layout.text_before] += 1
    else:
        frames_first = type(variant.model).__name__.startswith("CogVideoX")
        video = latents.transpose(1, 2) if frames_first else latents  # [B, C, frames, height, width]
        patch = (full // tokens for full, tokens in zip(video.shape[2:], variant.grid))
        place = (slice(i * p, (i + 1) * p) for i, p in zip((frame, row, column), patch))
        video[(slice(None), slice(None), *place)] += 1
    before = first_query(variant, monkeypatch)
    after = first_query(variant, monkeypatch, hidden_states=latents)
    assert changed_rows(before, after) == [token]


def test_a_change_of_the_text_changes_the_tokens_the_layout_says(variant, monkeypatch):
    layout = variant.layout()
    text = variant.call["encoder_hidden_states"]
    other = torch.randn(text.shape, generator=torch.Generator().manual_seed(1))
    before = first_query(variant, monkeypatch)
    after = first_query(variant, monkeypatch, encoder_hidden_states=other)
    start_of_after = len(before) - layout.text_after
    expected = [*range(layout.text_before), *range(start_of_after, start_of_after + variant.tiny.text_after)]
    assert changed_rows(before, after) == expected


def test_reference_images_stand_after_the_grid(monkeypatch):
    variant = VARIANTS["flux kontext"]()
    layout = variant.layout()
    assert layout.text_after == 4 * 3 + 2 * 2
    latents = variant.call["hidden_states"].clone()
    latents[:, 35:] += 1
    before = first_query(variant, monkeypatch)
    after = first_query(variant, monkeypatch, hidden_states=latents)
    assert changed_rows(before, after) == list(range(len(before) - layout.text_after, len(before)))


@pytest.mark.parametrize("family", TINY)
def test_layout_is_none_where_the_call_does_not_say(family):
    model = TINY[family].make()
    call = TINY[family].call(model, tiny_grid(family))
    layout = find_family(model).layout
    assert layout(model, {}) is None
    assert layout(model, dict.fromkeys(call)) is None
    assert layout(model, call | {"hidden_states": torch.zeros(2, 3)}) is None


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox"])
def test_latents_that_do_not_fill_their_last_patches_lose_them(family, monkeypatch):
    variant = Variant(family)
    latents = variant.call["hidden_states"]
    variant.call["hidden_states"] = F.pad(latents, (0, 1, 0, 1))
    assert variant.layout() == variant.expected
    with recorded_attention(variant.model, monkeypatch) as calls, torch.no_grad():
        variant.model(**variant.call)
    tokens = 3 * 7 * 5 + variant.tiny.text_before + variant.tiny.text_after
    assert {q.shape[2] for name, q, _ in calls if name in variant.tiny.layers} == {tokens}


@pytest.mark.parametrize("family", TINY)
def test_the_mask_hides_padded_text_only_where_the_family_says(family, monkeypatch):
    model = TINY[family].make()
    call = TINY[family].call(model, tiny_grid(family), batch=2)
    masks = []
    stock = F.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, **kwargs):
        if query.shape[2] == key.shape[2] and query.shape[2] > 10:
            masks.append(attn_mask)
        return stock(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    with torch.no_grad():
        model(**call)
    assert len(masks) == len(TINY[family].layers)
    if not find_family(model).padding_mask:
        assert masks == [None] * len(masks)
        return
    video = 3 * 7 * 5
    for mask in masks:
        assert mask.dtype == torch.bool
        assert mask.shape == (2, 1, 1, video + 7)
        assert mask.sum(-1).flatten().tolist() == [video + 4, video + 3]
        assert (mask.int().diff() <= 0).all()


def test_every_family_is_tested_and_named_once():
    assert {family.name for family in FAMILIES} == set(TINY)
    names = [name for family in FAMILIES for name in family.transformers]
    assert len(set(names)) == len(names)


def test_a_class_of_the_same_name_or_a_subclass_is_found_and_others_are_not():
    wan = type(TINY["wan"].make())
    subclass = type("MyWan", (wan,), {})
    assert find_family(object.__new__(subclass)).name == "wan"
    assert find_family(torch.nn.Linear(1, 1)) is None
