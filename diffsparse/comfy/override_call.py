"""ComfyUI's attention call: what an override is given, as query, key and value [B, H, S, D], and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

AttentionFunction = Callable[..., Tensor]
"""ComfyUI's attention function, or an override: its first argument is then the function that it stands for."""


@dataclass(frozen=True, eq=False)
class OverrideCall:
    """The arguments of one attention call, which ComfyUI 0.3.64 and 0.33 name alike.

    Attributes:
        query, key, value: [B, H, S, D] if `skip_reshape`, else [B, S, H * D]; Stable Diffusion 3 leaves its value
            [B, S, H, D] then. Key and value may have fewer heads, each for as many of the query.
        heads: H of the query.
        mask: what the model passes; it may come by position or by name.
        skip_output_reshape: whether the model awaits [B, H, S, D], not [B, S, H * D].
        scale: factor on the scores, D ** -0.5 if None.
        low_precision_attention: False where the model's author asks for this call to stay exact.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    mask: Tensor | None
    skip_reshape: bool
    skip_output_reshape: bool
    scale: float | None
    low_precision_attention: bool

    @property
    def is_cross_attention(self) -> bool:
        """Whether the key is shorter than the query. In self-attention it is as long, or longer with a cache."""
        return self.key.shape[-2] < self.query.shape[-2]

    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as [B, H, S, D], without a copy."""
        return self._split(self.query), self._split(self.key), self._split(self.value)

    def give_back(self, output: Tensor) -> Tensor:
        """An output [B, H, S, D] in the shape that the model awaits."""
        return output if self.skip_output_reshape else output.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        if self.skip_reshape:
            return x
        # Grouped keys have fewer heads, of the query's head dim.
        return x.flatten(2).unflatten(-1, (-1, self.query.shape[-1] // self.heads)).transpose(1, 2)


def read_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    scale: float | None = None,
    low_precision_attention: bool = True,
    **more: Any,
) -> OverrideCall:
    """An attention call, by position or by name as ComfyUI's models pass it. Arguments of later versions do no harm."""
    return OverrideCall(q, k, v, heads, mask, skip_reshape, skip_output_reshape, scale, low_precision_attention)
