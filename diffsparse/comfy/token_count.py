"""What a latent comes to in tokens, and what sparse attention may gain there, by counting operations."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from diffsparse.comfy.models import ComfyModel, uncompiled

_ELSEWHERE = re.compile(
    r"txt|add_|_[ty]\b|context_|\binstruct_|mlpc|audio|mod|adaln|norm\d\.linear|experts\.[23]\b|"
    r"(cross_att\w*|attn2)\.(to_)?[kv]",
    re.IGNORECASE,
)
"""Names of weights of a block that no token of the grid meets: of text and sound, and of the step's embedding.

And two of HiDream's four experts: a token goes to two.
"""


@dataclass(frozen=True)
class TokenCount:
    """The tokens of a latent in a model, and the work that attention is there.

    Attributes:
        frames, height, width: in tokens.
        attention_share: of the operations of all blocks, 0 to 1. Text and sound are not counted.
        density: share of the attention that would be computed.
    """

    frames: int
    height: int
    width: int
    attention_share: float
    density: float

    @property
    def num_tokens(self) -> int:
        """Tokens of the video or image."""
        return self.frames * self.height * self.width

    @property
    def speed_up(self) -> float:
        """How many times faster a sparse step can be at most: choosing what to skip takes time too."""
        return 1 / (1 - self.attention_share * (1 - self.density))

    def __str__(self) -> str:
        return (
            f"{self.num_tokens:,} tokens: {self.frames} x {self.height} x {self.width} (frames, height, width)\n"
            f"Attention is {100 * self.attention_share:.0f} % of the work of a step.\n"
            f"Computing {100 * self.density:.0f} % of it makes a sparse step at most {self.speed_up:.2f} times as fast "
            f"(counted, not measured)."
        )


def count_tokens(module: nn.Module, model: ComfyModel, latents: Any, density: float) -> TokenCount:
    """Count for latents [B, C, frames, height, width] or [B, C, height, width], or a list that begins with them."""
    layout = model.layout(module, {"x": latents, "context": torch.empty(1, 0, 1)})
    tokens = layout.frames * layout.height * layout.width
    blocks = model.named_blocks(module).values()
    # By their shapes: of those that a GGUF file holds in 4 bits, `numel` counts the bytes.
    shapes = [
        weight.shape
        for block in blocks
        for name, weight in uncompiled(block).named_parameters()
        if _ELSEWHERE.search(name) is None
    ]
    weights = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    # Two operations a weight and token; of attention, query times key and weights times value.
    attention = len(blocks) * 4 * tokens**2 * attrgetter(model.width)(module)
    return TokenCount(
        layout.frames, layout.height, layout.width, attention / (attention + 2 * tokens * weights), density
    )
