"""What one call of a transformer computes, counted by calling it on the meta device: shapes, no numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass
class CallFlops(TorchFunctionMode):
    """Floating-point operations of one call; a multiplication and an addition are two.

    Norms, activations and rotary embedding are not counted: they are bound by memory.

    Attributes:
        attention: query shape [B, H, S, D] and operations, 4 B H S^2 D, of every self-attention call, in their order.
        other: operations of linear layers, convolutions and all other attention.
    """

    attention: list[tuple[torch.Size, int]] = field(default_factory=list)
    other: int = 0
    _is_self_attention: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def of(cls, transformer: nn.Module, layer_names: Iterable[str], call: Mapping[str, Any]) -> CallFlops:
        """Count a call of a transformer whose self-attention layers have these names; its weights are not needed.

        Args:
            transformer: of diffusers, anywhere. What is counted is a stock one of its config, without adapters.
            layer_names: as of `Family.layer_names`.
            call: named arguments, of which the tensors' values do not matter.

        Raises:
            ValueError: the transformer takes no call of this size.
        """
        with torch.device("meta"):
            model: Any = type(transformer).from_config(transformer.config)  # type: ignore[attr-defined]
        count = cls()

        def enter(*of: Any) -> None:
            count._is_self_attention = True

        def leave(*of: Any) -> None:
            count._is_self_attention = False

        for name in layer_names:
            model.get_submodule(name).register_forward_pre_hook(enter)
            model.get_submodule(name).register_forward_hook(leave)
        arguments = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in call.items()}
        with torch.no_grad(), torch.device("meta"), count:
            try:
                model.eval()(**arguments)
            except RuntimeError as error:
                # Some have rotary embedding, or other tables, for so many frames, rows and columns and no more.
                raise ValueError(
                    f"{type(transformer).__name__} takes no call of this size ({error}). Name a smaller one."
                ) from error
        return count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count func, and run it unless it is attention, whose result has the shape of the query."""
        name, named = getattr(func, "__name__", ""), kwargs or {}
        if name == "scaled_dot_product_attention":
            query, key = (args[i] if len(args) > i else named[x] for i, x in enumerate(("query", "key")))
            flops = 4 * query.numel() * key.shape[-2]
            if self._is_self_attention:
                self.attention.append((query.shape, flops))
            else:
                self.other += flops
            return torch.empty_like(query)
        output = func(*args, **named)
        if name in ("linear", "conv1d", "conv2d", "conv3d"):
            weight = args[1] if len(args) > 1 else named["weight"]
            self.other += 2 * output.numel() * weight[0].numel()
        return output
