"""MiniMax-H3 says the size of its video in the values of its position ids, after those of everything else."""

import pytest
import torch
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep
from tiny.minimax_h3 import AUDIO_TOKENS, MINIMAX_H3, frame_ids
from tiny.model import TEXT_TOKENS

from diffsparse.pipelines.minimax_h3 import layout


def call(grid, **changes):
    return MINIMAX_H3.call(MINIMAX_H3.make(), grid, **changes)


@pytest.mark.parametrize("grid", [(3, 7, 5), (1, 7, 5), (4, 1, 6), (4, 6, 1), (2, 1, 1)])
@pytest.mark.parametrize("condition_frames", [0, 1, 2])
def test_the_grid_is_the_generated_video_and_no_condition_frame(grid, condition_frames):
    _, height, width = grid
    expected = TEXT_TOKENS + condition_frames * height * width + AUDIO_TOKENS
    assert layout(None, call(grid, condition_frames=condition_frames)) == (*grid, expected, 0)


def test_a_condition_frame_right_before_the_video_is_none_of_it():
    made = call((3, 7, 5))
    made["position_ids"] = torch.cat([frame_ids(7.0, 7, 5), *(frame_ids(7.0 + 5 * i, 7, 5) for i in range(3))])
    assert layout(None, made) == (3, 7, 5, 35, 0)


def test_ids_that_end_with_no_grid_leave_it_unknown():
    made = call((3, 7, 5))
    made["position_ids"][-3:, 1] = torch.tensor([1.0, 0.0, 1.0])
    assert layout(None, made) is None


@pytest.mark.parametrize("anchors", [(), ("first",), ("first", "last")])
@pytest.mark.parametrize("frames", [1, 4])
def test_the_grid_is_found_in_what_the_pipeline_packs(anchors, frames):
    ids, *_ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        # Rows of a keyframe in the text count as video for the model.
        text_token_tags=torch.tensor([1, 0, 0, 1, 1]),
        num_latent_frames=frames,
        latent_height=14,
        latent_width=10,
        num_audio_latents=8,
        patch_size=(1, 2, 2),
        audio_channels=2,
        audio_tag=2,
        video_tag=0,
        keyframe_anchors=anchors,
    )
    rows = (len(anchors) + frames) * 35
    made = {"position_ids": ids, "hidden_states": torch.zeros(1, rows, 16)}
    assert layout(None, made) == (frames, 7, 5, 5 + len(anchors) * 35 + 16, 0)
