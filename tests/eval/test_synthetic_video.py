from __future__ import annotations

import re

import pytest
import torch

from diffsparse.eval.prompts import read_prompts
from diffsparse.eval.synthetic_video import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    KINDS,
    MOTIONS,
    TEXTURES,
    Scene,
    Shape,
    random_scene,
    render,
)

GRAMMAR = re.compile(
    r"an? (\w+) (?:(striped|dotted|checkered) )?(\w+) (moves [a-z ]+?|turns|pulses)"
    r"(?: in front of an? (\w+) (?:(striped|dotted|checkered) )?(\w+) that (moves [a-z ]+?|turns|pulses))?"
    r" over an? (\w+) (?:(striped|checkered|gradient|wavy) )?background"
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def plain(motion="moves right", **options):
    return Scene(Shape("white", "plain", options.pop("kind", "circle"), motion, **options), None, "blue", "plain")


def bright(video):
    """Where the white shape is [F, H, W]: the blue background has little red."""
    return video[0] > 0.5


def test_same_seed_gives_the_same_scene_and_video():
    a, b = random_scene(seeded(3)), random_scene(seeded(3))
    assert a == b
    assert torch.equal(render(a, 3, 24, 40), render(b, 3, 24, 40))
    assert a != random_scene(seeded(4))


def test_captions_follow_the_grammar_and_name_the_scene():
    for seed in range(200):
        scene = random_scene(seeded(seed))
        words = GRAMMAR.fullmatch(scene.caption)
        assert words, scene.caption
        assert words[1] == scene.front.color
        assert words[3] == scene.front.kind
        assert words[4] == scene.front.motion
        assert (words[5] is not None) == (scene.behind is not None)
        assert "a orange" not in scene.caption


def test_demo_prompts_are_sentences_of_the_grammar():
    prompts = read_prompts("demo")
    assert len(prompts) == len(set(prompts)) == 16
    for prompt in prompts:
        words = GRAMMAR.fullmatch(prompt)
        assert words, prompt
        assert {words[1], words[5]} <= {*COLORS, None}
        assert {words[3], words[7]} <= {*KINDS, None}
        assert {words[4], words[8]} <= {*MOTIONS, None}
        assert words[9] in {*COLORS, "gray"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texture", TEXTURES)
def test_every_shape_and_texture_is_finite_and_seen(kind, texture):
    shape = Shape("white", texture, kind, "turns")
    for pattern in BACKGROUNDS:
        video = render(Scene(shape, None, "blue", pattern, (0.01, 0.0)), 3, 33, 47)
        assert video.shape == (3, 3, 33, 47)
        assert video.min() >= 0
        assert video.max() <= 1
        share = bright(video).float().mean()
        assert 0.01 < share < 0.4


@pytest.mark.parametrize(("motion", "direction"), DIRECTIONS.items())
def test_a_shape_moves_where_its_caption_says(motion, direction):
    seen = bright(render(plain(motion, radius=0.15), 9, 64, 64))
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    middle = [torch.stack([x[frame].mean(), y[frame].mean()]) for frame in (seen[0], seen[-1])]
    moved = middle[1] - middle[0]
    expected = torch.tensor(direction, dtype=torch.float)
    # 8 frames at the default speed, in pixels; edges are one pixel wide
    torch.testing.assert_close(moved, 8 * 0.05 * 64 * expected / expected.norm(), atol=1.0, rtol=0)


def test_a_circle_has_the_area_of_a_circle():
    seen = bright(render(plain("turns", radius=0.25), 1, 128, 128)).sum()
    # the dark rim, 0.022 wide, lies inside the radius
    assert float(seen) == pytest.approx(torch.pi * (128 * (0.25 - 0.022)) ** 2, rel=0.05)


def test_pulsing_changes_the_size_and_turning_does_not():
    pulsing = bright(render(plain("pulses"), 13, 64, 64)).sum(dim=(1, 2)).float()
    turning = bright(render(plain("turns", kind="square"), 13, 64, 64)).sum(dim=(1, 2)).float()
    assert pulsing.max() > 1.5 * pulsing.min()
    assert turning.max() < 1.1 * turning.min()


def test_a_small_canvas_shows_the_same_picture():
    scene = random_scene(seeded(11))
    large = render(scene, 2, 128, 128)
    small = render(scene, 2, 64, 64)
    halved = torch.nn.functional.avg_pool2d(large.flatten(0, 1)[None], 2)[0].view_as(small)
    assert (halved - small).abs().mean() < 0.03


def test_zoom_shows_a_part_enlarged():
    scene = random_scene(seeded(12))
    part = render(scene, 2, 64, 64, zoom=2.0)
    torch.testing.assert_close(part, render(scene, 2, 128, 128)[:, :, 32:96, 32:96], atol=1e-4, rtol=0)


def test_the_front_shape_hides_the_one_behind():
    front = Shape("white", "plain", "square", "turns", radius=0.3, speed=0.0)
    behind = Shape("red", "plain", "circle", "turns", radius=0.2)
    alone = render(Scene(front, None, "blue", "plain"), 2, 48, 48)
    both = render(Scene(front, behind, "blue", "plain"), 2, 48, 48)
    torch.testing.assert_close(both, alone, atol=1e-6, rtol=0)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'hexagon'"):
        render(plain(kind="hexagon"), 1, 8, 8)
