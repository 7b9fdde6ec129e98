"""`diffsparse families`: every transformer of diffusers, its family, or why it stays dense; docs/families.md."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from diffsparse.describe import attention_patterns
from diffsparse.eval.output_file import check_output_file
from diffsparse.pipelines.families import FAMILIES
from diffsparse.pipelines.family import Family
from diffsparse.pipelines.left_alone import LEFT_ALONE
from diffsparse.processors import attention_calls
from diffsparse.whole_file import whole_file

INTRODUCTION = """\
# Transformers of diffusers

What diffsparse makes of every transformer in diffusers {version}. `diffsparse families --output docs/families.md` made
this page, and a test holds that it would make the same today.

- *covered*: its self-attention runs sparse. *left alone*: it stays dense, for the reason given. *unknown*: nobody has
  described it yet; it stays dense, and the warning says how to describe it
  ([CONTRIBUTING.md](../CONTRIBUTING.md#a-model-family)).
- Covered means tested on small random models of the class, not yet on the published weights.
- The last column is the function by which a small model of the class calls self-attention, or what may be that.
"""

# For configs whose defaults are None and make no model.
REQUIRED = {
    "patch_size": 2,
    "in_channels": 4,
    "caption_channels": (8, 8),
    "num_kv_heads": 4,
    "rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
}


class Row(NamedTuple):
    """One transformer class of diffusers."""

    transformer: str
    family: str
    state: str
    tokens: str
    attention: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the table goes."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page there instead of printing it")


def run(args: argparse.Namespace) -> int:
    """Print or write the page; 0."""
    if args.output is None:
        print(page(rows()), end="")
    else:
        check_output_file("--output", args.output)
        with whole_file(args.output) as unfinished:
            unfinished.write_text(page(rows()), encoding="utf-8")
    return 0


def page(table: list[Row]) -> str:
    """The page in Markdown."""
    import diffusers

    states = ("covered", "left alone", "unknown")
    counts = ", ".join(f"{sum(row.state.startswith(state) for row in table)} {state}" for state in states)
    head = ("transformer", "family", "state", "tokens of one attention call", "attention by")
    lines = [head, tuple("---" for _ in head), *table]
    body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return f"{INTRODUCTION.format(version=diffusers.__version__)}\n{counts}.\n\n{body}\n"


def rows() -> list[Row]:
    """One row for each of `transformer_classes`, by name."""
    return [_row(name, cls) for name, cls in sorted(transformer_classes().items())]


def transformer_classes() -> dict[str, Any]:
    """The models of the installed diffusers that are named so, or by a family, or by `LEFT_ALONE`."""
    import diffusers

    named = {name for family in FAMILIES for name in family.transformers} | set(LEFT_ALONE)
    names = [name for name in dir(diffusers) if "Transformer" in name or name in named]
    classes = {name: getattr(diffusers, name) for name in names}
    return {n: c for n, c in classes.items() if isinstance(c, type) and issubclass(c, diffusers.ModelMixin)}


def _row(name: str, cls: Any) -> Row:
    family = next((family for family in FAMILIES if name in family.transformers), None)
    if family is None:
        state = f"left alone: {LEFT_ALONE[name]}" if name in LEFT_ALONE else "unknown"
        return Row(f"`{name}`", "", state, "", _attention_by(cls, None))
    first_paragraph = (inspect.getdoc(family.layout) or "").split("\n\n")[0]
    tokens = " ".join(first_paragraph.split()).rstrip(".")
    return Row(f"`{name}`", family.name, "covered", tokens, _attention_by(cls, family))


def _attention_by(cls: Any, family: Family | None) -> str:
    """The functions that the family's layers call; without a family, those of all that may be self-attention."""
    model = _small(cls)
    if model is None:
        return "not seen: its defaults make no model"
    patterns = attention_patterns(model) if family is None else family.layers
    names = Family("", (), patterns, lambda transformer, call: None).layer_names(model)
    calls = sorted({f"`{call}`" for name in names for call in attention_calls(model.get_submodule(name))})
    return ", ".join(calls) or "nothing"


def _small(cls: Any) -> nn.Module | None:
    """A model without memory, of few blocks where its config allows that; None where its defaults do not do."""
    parameters = inspect.signature(cls.__init__).parameters
    few = {n: 1 for n, p in parameters.items() if "layers" in n and type(p.default) is int}
    required = {n: size for n, size in REQUIRED.items() if n in parameters and parameters[n].default is None}
    for config in (few, {}, few | required, required):
        with contextlib.suppress(Exception), warnings.catch_warnings(), torch.device("meta"):
            # What diffusers' own models still use of diffusers is nothing that who reads the page could mend.
            warnings.simplefilter("ignore", FutureWarning)
            model: nn.Module = cls(**config)
            return model
    return None
