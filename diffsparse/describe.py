"""What to start from where no family describes a transformer: its attention modules, the arguments of its forward."""

from __future__ import annotations

import inspect
import re

from torch import nn

from diffsparse.processors import calls_attention


def family_to_start_from(transformer: nn.Module) -> str:
    """Code that describes a transformer, but for its layout, which has to be filled in, and for layers to strike out.

    Every attention module is named that is not known for cross-attention: diffusers does not mark it everywhere.
    """
    name = type(transformer).__name__
    arguments = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
    patterns = "\n".join(f'        "{pattern}",' for pattern in attention_patterns(transformer))
    return f"""\
from diffsparse import Family, Layout

def layout(transformer, call):
    # call.get(name), of the arguments: {", ".join(arguments)}
    return Layout(frames=..., height=..., width=..., text_before=..., text_after=...)  # in tokens

family = Family(
    name="my family",
    transformers=("{name}",),
    layers=(  # keep those that attend from the image's or video's tokens to themselves
{patterns or "        # no module with an attention processor that diffsparse can take over"}
    ),
    layout=layout,
)
model.enable_sparse_attention(family=family)
"""


def attention_patterns(transformer: nn.Module) -> tuple[str, ...]:
    """Names of the modules that call softmax attention, each number in them as `*`, without known cross-attention."""
    names = (
        name
        for name, module in transformer.named_modules()
        if calls_attention(module) and getattr(module, "is_cross_attention", False) is not True
    )
    return tuple(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
