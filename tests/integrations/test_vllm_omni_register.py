from __future__ import annotations

import configparser
import logging
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import vllm_omni_standins as standins

from diffsparse.integrations.vllm_omni_register import register


def test_setup_names_the_function_to_the_engine():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    name, _, value = setup["options.entry_points"]["vllm_omni.general_plugins"].strip().partition(" = ")
    assert (name, EntryPoint(name, value, "vllm_omni.general_plugins").load()) == ("diffsparse", register)


def test_register_takes_the_name_of_the_backend_for_npus(monkeypatch):
    engine = standins.install(monkeypatch)
    register()
    register()
    assert engine.overrides == {"RAINFUSION_ATTN": "diffsparse.integrations.vllm_omni_backend.DiffSparseBackend"}


@pytest.mark.parametrize(
    "engine",
    [{"is_npu": True}, {"backends": ("RAINFUSION_ATTN", "SPARSE_ATTN")}],
    ids=["on an NPU", "where the function is found by itself"],
)
def test_register_leaves_alone(monkeypatch, engine):
    engine = standins.install(monkeypatch, **engine)
    register()
    assert engine.overrides == {}


def test_register_says_what_is_missing(monkeypatch, caplog):
    engine = standins.install(monkeypatch, backends=("TORCH_SDPA",))
    with caplog.at_level(logging.WARNING):
        register()
    assert engine.overrides == {}
    assert "no backend RAINFUSION_ATTN" in caplog.text
