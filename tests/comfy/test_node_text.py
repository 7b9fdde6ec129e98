from __future__ import annotations

import sys
import types

import pytest

from diffsparse.comfy.node_text import show_on_node


@pytest.fixture
def shown(monkeypatch):
    """What ComfyUI's server was asked to show."""
    texts: list = []
    instance = types.SimpleNamespace(send_progress_text=lambda *args: texts.append(args))
    server = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "server", server)
    return texts


def test_a_text_begins_with_what_it_says_and_has_a_line_for_each_thing(shown):
    show_on_node("DiffSparse: 4 of 6 steps sparse; 0.28 s a sparse step, 0.25 s a dense step; density 17 %", "8")
    assert shown == [("4 of 6 steps sparse  \n0.28 s a sparse step, 0.25 s a dense step  \ndensity 17 %", "8")]


def test_nothing_is_shown_without_a_node_or_a_server(shown, monkeypatch):
    show_on_node("text", None)
    monkeypatch.setitem(sys.modules, "server", types.ModuleType("server"))
    show_on_node("text", "8")
    bare = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=object()))
    monkeypatch.setitem(sys.modules, "server", bare)
    show_on_node("text", "8")
    assert shown == []
