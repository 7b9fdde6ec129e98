"""What holds for every test of the nodes."""

import comfy_standins as standins
import pytest


@pytest.fixture(autouse=True)
def _comfy(monkeypatch):
    """`from comfy.patcher_extension import WrappersMP` finds a stand-in."""
    standins.install(monkeypatch)
