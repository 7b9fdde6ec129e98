"""LTX says its sizes beside packed latents, or does not."""

import pytest
import torch
from tiny_models import TINY

from diffsparse.pipelines.ltx import layout


@pytest.fixture
def call():
    return TINY["ltx"].call(TINY["ltx"].make(), (3, 7, 5))


def test_condition_tokens_before_the_video_leave_the_grid_unknown(call):
    # What LTXConditionPipeline passes: coordinates of all tokens, no sizes.
    call["video_coords"] = torch.zeros(1, 3, 3 * 7 * 5)
    sizes = ("num_frames", "height", "width")
    assert layout(None, call | dict.fromkeys(sizes)) is None
    # What the pipeline of long videos passes: coordinates, and ones as sizes.
    assert layout(None, call | dict.fromkeys(sizes, 1)) is None
    # Sizes that happen to fit do not say where the condition tokens are.
    assert layout(None, call) is None


@pytest.mark.parametrize("name", ["num_frames", "height", "width"])
def test_sizes_that_do_not_give_the_number_of_tokens_are_not_believed(call, name):
    assert layout(None, call | {name: call[name] + 1}) is None
    assert layout(None, {key: value for key, value in call.items() if key != name}) is None
