"""What holds for every test of the nodes."""

import comfy_standins as standins
import pytest


@pytest.fixture(autouse=True)
def _comfy(monkeypatch, tmp_path):
    """What the nodes ask of ComfyUI finds stand-ins; its models are in `models` of the test's folder."""
    standins.install(monkeypatch, tmp_path / "models")
