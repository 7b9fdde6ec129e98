"""What to start from where no family describes a transformer: its attention modules, the arguments of its forward."""

from __future__ import annotations

import inspect
import re

from torch import nn

from diffsparse.processors import attention_calls


def family_to_start_from(transformer: nn.Module) -> str:
    """Code that describes a transformer, but for its layout, which has to be filled in, and for layers to strike out.

    Every attention module is named that may be self-attention: diffusers does not mark all others.
    """
    name = type(transformer).__name__
    arguments = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
    timestep = next((n for n in ("timestep", *arguments) if n in arguments and n.startswith("time")), None)
    timestep_line = f'\n    timestep="{timestep}",' if timestep is not None else ""
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
    layout=layout,{timestep_line}
)
model.enable_sparse_attention(family=family)
"""


def attention_patterns(transformer: nn.Module) -> tuple[str, ...]:
    """Names of the modules that call softmax attention, each number in them as `*`, without sure cross-attention."""
    names = (
        name
        for name, module in transformer.named_modules()
        if attention_calls(module) and not _has_keys_of_another_size(module)
    )
    return tuple(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))


def _has_keys_of_another_size(module: nn.Module) -> bool:
    # `is_cross_attention` is not enough: some models set it on their self-attention (OmniGen).
    keys, queries = getattr(module, "cross_attention_dim", None), getattr(module, "query_dim", None)
    return keys is not None and queries is not None and keys != queries
