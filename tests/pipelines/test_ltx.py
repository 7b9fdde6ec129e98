"""LTX says its sizes beside packed latents; with condition tokens, in the coordinates of all tokens."""

import diffusers
import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from enabled import FULL, Watched, config, report_of
from PIL import Image
from tiny.model import TEXT_TOKENS
from tiny_models import TINY
from tiny_pipelines import text, without_encoders

from diffsparse.grid import TokenGrid
from diffsparse.pipelines import ltx

SIZES = ("num_frames", "height", "width")
FRAME = 3 * 5
"""Tokens of a frame of 96 x 160 pixels."""


@pytest.fixture
def call():
    return TINY["ltx"].call(TINY["ltx"].make(), (3, 7, 5))


def test_a_pipeline_that_passes_coordinates_and_sizes_leaves_the_grid_unknown(call):
    call["video_coords"] = coords((3, 7, 5))
    # What the pipeline of long videos passes: ones as sizes.
    assert ltx.layout(None, call | dict.fromkeys(SIZES, 1)) is None
    # Sizes that happen to fit: the model goes by the coordinates.
    assert ltx.layout(None, call) is None


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_do_not_give_the_number_of_tokens_are_not_believed(call, name):
    assert ltx.layout(None, call | {name: call[name] + 1}) is None
    assert ltx.layout(None, {key: value for key, value in call.items() if key != name}) is None


def coords(grid, first_frame=0, fps=25):
    """Coordinates [1, 3, S] of latents as LTX makes them: 8 frames of the video to one, 32 x 32 pixels to one."""
    frames, rows, columns = (torch.arange(size, dtype=torch.float32) for size in grid)
    times = (first_frame + (8 * frames - 7).clamp_min(0)) / fps
    return torch.cartesian_prod(times, 32 * rows, 32 * columns).T[None]


def read(*parts, batch=1):
    """What the layout makes of a call with the coordinates of several latents, one after the other."""
    both = torch.cat(parts, dim=2).expand(batch, -1, -1).clone()
    found = ltx.layout(None, {"hidden_states": torch.zeros(batch, both.shape[2], 4), "video_coords": both})
    return found and tuple(found)


@pytest.mark.parametrize("grid", [(3, 7, 5), (1, 7, 5), (3, 1, 5), (3, 7, 1), (1, 1, 1)])
def test_the_grid_is_what_the_coordinates_end_with(grid):
    tokens = grid[1] * grid[2]
    video = coords(grid)
    image, clip = coords((1, *grid[1:]), 8), coords((2, *grid[1:]), 16)
    assert read(video) == (*grid, 0, 0)
    assert read(image, video, batch=2) == (*grid, tokens, 0)
    assert read(clip, image, video) == (*grid, 3 * tokens, 0)
    # Two images at the same time; a clip that rises towards the video's time.
    assert read(image, image, video) == (*grid, 2 * tokens, 0)
    assert read(coords((2, *grid[1:]), -20), video) == (*grid, 2 * tokens, 0)


def test_coordinates_that_end_with_no_full_grid_leave_it_unknown():
    video = coords((3, 7, 5))

    def moved(axis, tokens, distance):
        """The video with some of its tokens elsewhere."""
        changed = video.clone()
        changed[0, axis, tokens] += distance
        return changed

    others = {
        "no first frame": coords((3, 7, 5), 4),
        "half a frame": video[..., :-5],
        "columns before rows": video[:, [0, 2, 1]],
        "backwards in time": torch.cat([coords((1, 7, 5), first_frame) for first_frame in (0, 9, 1)], 2),
        "rows backwards": video * torch.tensor([1, -1, 1])[:, None],
        "columns backwards": video * torch.tensor([1, 1, -1])[:, None],
        "frames of two shapes": torch.cat([coords((1, 7, 5)), coords((1, 5, 7), 8)], 2),
        "a row at the time of the frame before": moved(0, slice(35, 40), -1 / 25),
        "a frame further down": moved(1, slice(35, 70), 32),
        "a row further right": moved(2, slice(40, 45), 32),
    }
    assert [name for name, tensor in others.items() if read(tensor) is not None] == []
    assert ltx.layout(None, {"hidden_states": torch.zeros(1, 104, 4), "video_coords": video}) is None


def image(frame_index, **changes):
    return LTXVideoCondition(image=Image.effect_noise((160, 96), 50).convert("RGB"), frame_index=frame_index, **changes)


def video(frame_index, frames):
    images = [Image.new("RGB", (160, 96), (9 * i, 99, 0)) for i in range(frames)]
    return LTXVideoCondition(video=images, frame_index=frame_index)


# Tokens before the video: a condition at the first frame is a part of it, and so is a clip but for two frames.
CONDITIONS = {
    "none": (None, 0),
    "first image": ([image(0)], 0),
    "later image": ([image(8)], FRAME),
    "first video": ([video(0, 9)], 0),
    "later video": ([video(8, 9)], 2 * FRAME),
    "several": ([image(0), video(8, 9), image(16, strength=0.5)], 3 * FRAME),
}


def generate(pipeline, conditions, **changes):
    torch.manual_seed(0)
    prompt = {"prompt_embeds": text(), "prompt_attention_mask": torch.ones(1, TEXT_TOKENS)}
    call = prompt | {f"negative_{name}": value for name, value in prompt.items()}
    call |= {"height": 96, "width": 160, "num_frames": 17, "num_inference_steps": 3, "output_type": "latent"}
    return pipeline(**(call | changes), conditions=conditions, generator=torch.Generator().manual_seed(0)).frames


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    sizes = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": (1, 1, 1, 1, 1)}
    sizes |= {f"decoder_{name}": value for name, value in sizes.items()}
    return diffusers.AutoencoderKLLTXVideo(latent_channels=4, **sizes).eval()


@pytest.fixture
def pipeline(vae):
    return without_encoders(
        diffusers.LTXConditionPipeline,
        transformer=TINY["ltx"].make(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
    )


@pytest.mark.parametrize(("conditions", "text_before"), CONDITIONS.values(), ids=CONDITIONS)
def test_every_call_of_the_condition_pipeline_runs_sparse(pipeline, conditions, text_before, monkeypatch):
    reads, grid_at_end = [], ltx._grid_at_end
    monkeypatch.setattr(ltx, "_grid_at_end", lambda coords: (reads.append(coords), grid_at_end(coords))[1])

    pipeline.enable_sparse_attention(config(strategy := Watched(density=0.5), strict=True))
    generate(pipeline, conditions)
    assert {call.grid for call in strategy.calls} == {TokenGrid(3, 3, 5, text_before=text_before)}
    # Reading waits for the device: once in a generation.
    assert len(reads) == 1
    assert report_of(pipeline).dense_calls == 0


@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 1.0}, {"denoise_strength": 0.7}], ids=str)
@pytest.mark.parametrize("conditions", [value for value, _ in CONDITIONS.values()], ids=CONDITIONS)
def test_at_full_density_the_condition_pipeline_gives_what_it_gives_stock(pipeline, conditions, changes):
    expected = generate(pipeline, conditions, **changes)
    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(pipeline, conditions, **changes), expected, atol=1e-4, rtol=1e-4)
    assert report_of(pipeline).dense_calls == 0
