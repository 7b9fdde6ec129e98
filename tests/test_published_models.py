from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_models import TINY

from diffsparse.call_flops import CallFlops
from diffsparse.pipelines.families import find_family
from diffsparse.published_models import PUBLISHED, make_call, published_transformer

# Parameters as published, in 10^9; then width, height, frames and the grid with its text, by the models' own papers
# and pipelines: 8 x 8 x 4 pixels a latent, 2 x 2 latents a token; CogVideoX 1.5 pads 21 frames to 22 and takes two.
EXPECTED = {
    "wan": (14.3, (1280, 720, 81), (21, 45, 80, 0, 0)),
    "wan-1.3b": (1.42, (832, 480, 81), (21, 30, 52, 0, 0)),
    "hunyuan_video": (12.8, (1280, 720, 129), (33, 45, 80, 0, 256)),
    "cogvideox": (5.6, (1360, 768, 81), (11, 48, 85, 226, 0)),
    "ltx": (1.92, (704, 512, 161), (21, 16, 22, 0, 0)),
    "flux": (11.9, (1024, 1024, 1), (1, 64, 64, 512, 0)),
    "qwen_image": (20.4, (1328, 1024, 1), (1, 64, 83, 512, 0)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_sizes(name):
    billions, (width, height, frames), layout = EXPECTED[name]
    model = published_transformer(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    assert find_family(model).layout(model, make_call(model, height, width, frames)) == layout


@pytest.mark.parametrize("name", PUBLISHED)
def test_calls_are_those_that_the_model_takes(name):
    class_name, config = PUBLISHED[name]
    few = dict.fromkeys({"num_layers", "num_single_layers"} & set(published_transformer(name).config), 1)
    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**config | few)
    layers = find_family(model).layer_names(model)
    assert 1 <= len(layers) <= 2
    call = make_call(model, 256, 256, 17 if EXPECTED[name][1][2] > 1 else 1)
    (_, _, tokens, dim), _ = CallFlops.of(model, layers, call).attention[0]
    frames, height, width, before, after = find_family(model).layout(model, call)
    assert (tokens, dim) == (before + frames * height * width + after, 64 if name in ("cogvideox", "ltx") else 128)


def test_the_vae_of_wan_22_5b_makes_fewer_tokens():
    model = TINY["wan"].make(in_channels=48)
    assert make_call(model, 704, 1280, 121)["hidden_states"].shape == (1, 48, 31, 44, 80)


def test_a_vae_that_is_named_goes_before_the_published_one():
    call = make_call(TINY["wan"].make(), 32, 64, 5, vae=(2, 16))
    assert call["hidden_states"].shape[2:] == (3, 2, 4)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("wan", (721, 1280, 81), "`height` of WanTransformer3DModel must be a positive multiple of 16 pixels, got 721"),
        ("wan", (720, 0, 81), "`width` of WanTransformer3DModel must be a positive multiple of 16 pixels, got 0"),
        ("wan", (720, 1280, 80), "must be 1 more than a multiple of 4, got 80. Say 77."),
        ("wan", (720, 1280, 0), "must be 1 more than a multiple of 4, got 0. Say 1."),
        ("flux", (720, 1280, 81), "FluxTransformer2DModel makes images: `num_frames` must be 1, got 81"),
        ("mochi", (480, 832, 81), "a call of MochiTransformer3DModel are not known"),
    ],
)
def test_sizes_that_cannot_be_are_errors(name, size, message):
    with pytest.raises(ValueError, match=message):
        make_call(TINY[name].make(), *size)


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"must be one of wan, wan-1\.3b, .*, got 'wan3'"):
        published_transformer("wan3")
