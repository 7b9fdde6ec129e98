from __future__ import annotations

import argparse
import inspect
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import ModelMixin

from diffsparse.eval import cli, families
from diffsparse.eval.families import rows, transformer_classes
from diffsparse.pipelines.families import FAMILIES
from diffsparse.pipelines.left_alone import LEFT_ALONE

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
WAITING = {"BriaFibo2Transformer2DModel", "MiniMaxH3Transformer3DModel"}
"""Transformers that wait for someone to describe them. Not for new ones: those want a look."""


@pytest.fixture(scope="module")
def made():
    """The rows, and what diffusers said meanwhile of its own later versions."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        table = rows()
    return table, [str(each.message) for each in warned if issubclass(each.category, FutureWarning)]


@pytest.fixture(scope="module")
def table(made):
    return {row.transformer.strip("`"): row for row in made[0]}


def written_for():
    """The version of diffusers that the committed page is about."""
    return PAGE.read_text(encoding="utf-8").split("transformer in diffusers ")[1].split(". ")[0]


def run(**options):
    return families.run(argparse.Namespace(**({"output": None} | options)))


@pytest.mark.skipif(diffusers.__version__ != written_for(), reason=f"the page is of diffusers {written_for()}")
def test_the_committed_page_is_what_the_command_makes(table, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "rows", lambda: list(table.values()))
    assert run(output=tmp_path / "families.md") == 0
    assert (tmp_path / "families.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8"), (
        "docs/families.md is out of date: make it anew by `diffsparse families --output docs/families.md`"
    )


def test_nothing_is_warned_of_that_the_user_cannot_mend(made):
    assert made[1] == []


@pytest.mark.skipif(diffusers.__version__ != written_for(), reason=f"the page is of diffusers {written_for()}")
def test_no_transformer_is_unknown_but_those_that_wait(table):
    assert {name for name, row in table.items() if row.state == "unknown"} <= WAITING


def test_no_transformer_of_diffusers_is_missing(table):
    names = {name for name in dir(diffusers.models) if "Transformer" in name}
    models = {
        name
        for name in names
        if isinstance(thing := getattr(diffusers, name, None), type) and issubclass(thing, ModelMixin)
    }
    assert len(models) > 60
    assert models <= set(table)
    installed = {name for family in FAMILIES for name in family.transformers if hasattr(diffusers, name)}
    assert installed <= set(table)


def test_what_a_pipeline_of_diffusers_calls_its_transformer_is_there(table):
    called = set()
    for name in dir(diffusers):
        if name.endswith("Pipeline") and isinstance(pipeline := getattr(diffusers, name, None), type):
            parts = inspect.signature(pipeline.__init__).parameters.items()
            kinds = [part.annotation for part_name, part in parts if part_name.startswith("transformer")]
            called |= {each for kind in kinds for each in getattr(kind, "__args__", (kind,)) if isinstance(each, type)}
    models = {each.__name__ for each in called if issubclass(each, ModelMixin)}
    assert len(models) > 40
    assert models <= set(table)


def test_a_row_says_what_the_families_say(table):
    for name, row in table.items():
        family = next((family for family in FAMILIES if name in family.transformers), None)
        assert row.family == (family.name if family else "")
        assert row.state == "covered" if family else row.state in ("unknown", f"left alone: {LEFT_ALONE.get(name)}")
        assert bool(row.tokens) == (family is not None)


def test_the_layers_of_every_family_can_be_taken_over(table):
    known = {f"`{name}`" for name in ("dispatch_attention_fn", "scaled_dot_product_attention")}
    covered = {name: row for name, row in table.items() if row.state == "covered"}
    assert {row.attention for row in covered.values() if not row.attention.startswith("not seen")} <= known
    # The routes of two that other tests run.
    assert table["WanTransformer3DModel"].attention == "`dispatch_attention_fn`"
    assert table["CogVideoXTransformer3DModel"].attention == "`scaled_dot_product_attention`"


def test_a_class_that_nothing_names_is_unknown(monkeypatch, capsys):
    class NewTransformer2DModel(ModelMixin):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(1, 1)

    monkeypatch.setattr(families, "transformer_classes", lambda: {"NewTransformer2DModel": NewTransformer2DModel})
    assert run() == 0
    shown = capsys.readouterr().out
    assert "| `NewTransformer2DModel` |  | unknown |  | nothing |" in shown
    assert "0 covered, 0 left alone, 1 unknown." in shown


def test_the_classes_are_models_and_no_helpers():
    assert all(issubclass(cls, ModelMixin) for cls in transformer_classes().values())
    assert "FluxPosEmbed" not in transformer_classes()


def test_a_page_that_cannot_be_written_is_found_before_it_is_made(monkeypatch, capsys):
    monkeypatch.setattr(families, "rows", lambda: pytest.fail("made"))
    assert cli.main(["families", "--output", "/nowhere/families.md"]) == 2
    assert "--output must name a file in a folder that exists, got /nowhere/families.md" in capsys.readouterr().err
