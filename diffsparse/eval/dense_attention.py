"""The dense attention that is at hand on a machine: what sparse attention has to beat."""

from __future__ import annotations

import functools
import importlib
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TORCH_BACKENDS = {"torch": None, "torch cuDNN": "CUDNN_ATTENTION", "torch flash": "FLASH_ATTENTION"}
EXACT = (*TORCH_BACKENDS, "flash-attn-4")
"""Those that compute in the dtype of their inputs; SageAttention quantizes."""


def dense_candidates(
    query: Tensor, key: Tensor, value: Tensor, say: Callable[[str], None]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name and call of every dense attention that can take query, key, value [B, H, S, D] here.

    torch's own, flash-attn-4 and SageAttention where they are installed. What raises at a first call is left out,
    and `say` is told why.
    """
    makers: list[Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]] = [
        *(functools.partial(_torch, backend=backend) for backend in TORCH_BACKENDS.values()),
        _flash4,
        _sage,
    ]
    for name, make in zip([*EXACT, "SageAttention 1"], makers):
        try:
            call = make(query, key, value)
            call()
        except Exception as error:  # whatever a missing or an unfitting library raises: it is not a candidate then
            say(f"{name} cannot run: {reason_of(error)}")
            continue
        yield name, call


def reason_of(error: Exception) -> str:
    """What was raised, on one line: compilers say much."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def _torch(query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> Callable[[], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call() -> Tensor:
        if backend is None:
            return scaled_dot_product_attention(query, key, value)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(query, key, value)

    return call


def _flash4(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    attention = importlib.import_module("flash_attn.cute").flash_attn_func

    def call() -> Tensor:
        output: Tensor = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))[0]
        return output.transpose(1, 2)

    return call


def _sage(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    attention = importlib.import_module("sageattention").sageattn

    def call() -> Tensor:
        output: Tensor = attention(query, key, value)
        return output

    return call
