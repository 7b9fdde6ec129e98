"""LTX-2 says its sizes beside packed latents; its pipelines of keyframe slots, in the coordinates of all tokens."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from enabled import FULL, Watched, config, report_of
from tiny.model import CHANNELS, TEXT_TOKENS
from tiny_models import TINY
from tiny_pipelines import text
from torch import nn

from diffsparse.grid import TokenGrid
from diffsparse.pipelines import ltx2


def coords(grid, first_frame=0, fps=24):
    """Coordinates [1, 3, S, 2] of latents as LTX-2 makes them: where a token starts, and where it ends."""
    frames, rows, columns = (torch.arange(size, dtype=torch.float32) for size in grid)
    times = (first_frame + (8 * frames - 7).clamp_min(0)) / fps
    starts = torch.cartesian_prod(times, 32 * rows, 32 * columns).T
    return torch.stack([starts, starts + torch.tensor([1 / fps, 32, 32])[:, None]], dim=-1)[None]


def read(*parts, batch=1, **sizes):
    """What the layout makes of a call with the coordinates of several latents, one after the other."""
    both = torch.cat(parts, dim=2).expand(batch, -1, -1, -1).clone()
    found = ltx2.layout(None, {"hidden_states": torch.zeros(batch, both.shape[2], 4), "video_coords": both} | sizes)
    return found and tuple(found)


@pytest.mark.parametrize("grid", [(3, 7, 5), (1, 7, 5), (3, 1, 5), (3, 7, 1), (1, 1, 1)])
def test_the_grid_is_what_the_coordinates_begin_with(grid):
    tokens, video = grid[1] * grid[2], coords(grid)
    assert read(video) == (*grid, 0, 0)
    if grid[0] > 1:
        # Keyframes within the video; a reference of another size; a tile, whose places begin at those of its corner.
        assert read(video, *[coords((1, *grid[1:]), frame) for frame in (8, 1)], batch=2) == (*grid, 0, 2 * tokens)
        assert read(video, coords((3, 2, 2))) == (*grid, 0, 3 * 2 * 2)
        assert read(video - torch.tensor([0.5, 64, 32])[:, None, None]) == (*grid, 0, 0)
        # As large as a frame and behind the last, but with a token at another time or place.
        for axis in range(3):
            other = coords((1, *grid[1:]), 8 * grid[0])
            other[:, axis, -1] += 1
            assert read(video, other) == (*grid, 0, tokens)
    assert read(video, coords((1, *grid[1:]), 8 * grid[0])) == (grid[0] + 1, *grid[1:], 0, 0)


@pytest.mark.parametrize("memory", [(1, 7, 5), (2, 7, 5), (4, 7, 5), (1, 2, 2)])
def test_tokens_before_a_grid_that_the_call_names_are_seen_in_the_coordinates(memory):
    # Memory of earlier shots, as Echo puts it there: at times far behind the video's.
    size = {"num_frames": 3, "height": 7, "width": 5}
    video, slots = coords((3, 7, 5)), coords(memory, 12000)
    tokens = slots.shape[2]
    assert read(slots, video, **size) == (3, 7, 5, tokens, 0)
    assert read(video, slots, **size) == (3, 7, 5, 0, tokens)
    assert read(video, coords((3, 7, 5)), **size) == (3, 7, 5, 0, 105)
    # Coordinates that show no such grid are no reason to give up that of the call.
    assert read(slots, video * torch.tensor([1, -1, 1])[:, None, None], **size) == (3, 7, 5, 0, tokens)


def test_coordinates_that_begin_with_no_full_grid_leave_it_unknown():
    video = coords((3, 7, 5))
    # At the end of each frame's second row.
    aside = (torch.arange(105) % 35 == 9)[:, None]
    others = {
        "half a row": video[:, :, [*range(33), *range(35, 105)]],
        "columns before rows": video[:, [0, 2, 1]],
        "rows backwards": video * torch.tensor([1, -1, 1])[:, None, None],
        "columns backwards": video * torch.tensor([1, 1, -1])[:, None, None],
        "a row that slants": video + aside * torch.tensor([0, 1, 0])[:, None, None],
        "a column that slants": video + aside * torch.tensor([0, 0, 1])[:, None, None],
        "a keyframe at the time of a single frame": torch.cat([coords((1, 7, 5))] * 2, dim=2),
    }
    assert [name for name, tensor in others.items() if read(tensor) is not None] == []
    latents = torch.zeros(1, 105, 4)
    for other in (latents[:, 1:], torch.zeros(1, 106, 4)):
        assert ltx2.layout(None, {"hidden_states": other, "video_coords": video}) is None
    # No starts and ends; no coordinates.
    assert ltx2.layout(None, {"hidden_states": latents, "video_coords": video[..., 0]}) is None
    assert ltx2.layout(None, {"hidden_states": latents}) is None
    # Sizes that do not fit are no reason to go by the coordinates.
    assert read(video, num_frames=4, height=7, width=5) is None
    assert read(video, num_frames=3, height=7) is None


class StandIn(nn.Module):
    """What a pipeline asks of its autoencoders where it makes latents of embeddings; and its connectors."""

    device, dtype = torch.device("cpu"), torch.float32
    spatial_compression_ratio, temporal_compression_ratio, mel_compression_ratio = 32, 8, 4
    config = SimpleNamespace(sample_rate=16000, mel_hop_length=160, mel_bins=8, latent_channels=2, scaling_factor=1.0)

    def __init__(self):
        super().__init__()
        self.latents_mean, self.latents_std = torch.zeros(CHANNELS), torch.ones(CHANNELS)

    def forward(self, embeddings, mask, **options):
        return embeddings, embeddings, mask


@pytest.fixture
def pipeline():
    make = getattr(diffusers, "LTX2DFRPipeline", None)
    if make is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no LTX2DFRPipeline")
    pipeline = make(
        transformer=TINY["ltx2"].make(use_keyframes_abs_pos_embedding=True),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        connectors=StandIn(),
        vae=StandIn(),
        audio_vae=StandIn(),
        **dict.fromkeys(("text_encoder", "tokenizer", "vocoder")),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def four_tiles():
    from diffusers.pipelines.ltx2.dfr_layout import epilogue_tiles

    return epilogue_tiles((7, 3, 5), 1, ())


def generate(pipeline, tiles=None):
    return pipeline(
        prompt_embeds=text(),
        prompt_attention_mask=torch.ones(1, TEXT_TOKENS),
        height=96,
        width=160,
        num_frames=49,
        sigmas=[1.0, 0.7, 0.3],
        video_tiles=tiles,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


@pytest.mark.parametrize("tiled", [False, True])
def test_every_call_of_the_pipeline_of_keyframe_slots_runs_sparse(pipeline, tiled, monkeypatch):
    reads, grid_at_start = [], ltx2._grid_at_start
    monkeypatch.setattr(ltx2, "_grid_at_start", lambda coords: (reads.append(coords), grid_at_start(coords))[1])

    pipeline.enable_sparse_attention(config(strategy := Watched(density=0.5), strict=True))
    generate(pipeline, four_tiles() if tiled else None)
    # Behind the seven frames, as large as each, come a slot within them and one at their end.
    height, width = (2, 4) if tiled else (3, 5)
    assert {call.grid for call in strategy.calls} == {TokenGrid(7, height, width, text_after=2 * height * width)}
    # Reading waits for the device: once in a generation, or for each tile of it.
    assert len(reads) == (4 if tiled else 1)
    assert report_of(pipeline).dense_calls == 0


@pytest.mark.parametrize("tiled", [False, True])
def test_at_full_density_it_gives_what_it_gives_stock(pipeline, tiled):
    tiles = four_tiles() if tiled else None
    expected = generate(pipeline, tiles)
    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(pipeline, tiles), expected, atol=1e-5, rtol=1e-5)
    assert report_of(pipeline).dense_calls == 0


def test_tiles_of_different_sizes_keep_their_plans(pipeline):
    from diffusers.pipelines.ltx2.dfr_layout import LTX2DFREpilogueTile

    # Three steps; columns 0 to 3, and 3 and 4, which are blended half and half.
    whole, tiles = slice(0, 7), []
    for columns in (slice(0, 4), slice(3, 5)):
        weight = torch.tensor([0.5 if column == 3 else 1.0 for column in range(columns.start, columns.stop)])
        tiles.append(LTX2DFREpilogueTile(whole, slice(0, 3), columns, weight.expand(7, 3, -1)))
    pipeline.enable_sparse_attention(config(strategy := Watched(density=0.5), replan_every=2))
    generate(pipeline, tiles)
    first_layer = [(call.step, call.grid.width) for call in strategy.calls if call.layer == 0]
    assert first_layer == [(0, 4), (0, 2), (2, 4), (2, 2)]
    assert report_of(pipeline).dense_calls == 0
