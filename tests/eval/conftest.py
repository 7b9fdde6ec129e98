"""A tiny model in a folder, as the demo finds its own: random weights, for tests that do not look at the video."""

from __future__ import annotations

import json

import pytest
from tiny_models import tiny_wan_pipeline

SAMPLING = {
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "max_sequence_length": 24,
    "fps": 8,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_wan_pipeline().save_pretrained(folder)
    (folder / "demo.json").write_text(json.dumps(SAMPLING))
    return folder


@pytest.fixture
def own_tiny_model(tiny_model, tmp_path):
    """A copy to break."""
    import shutil

    return shutil.copytree(tiny_model, tmp_path / "broken-model")
