"""Where kernels are launched, on the device of their tensors, and what attention kernels are given there."""

from __future__ import annotations

import torch
from torch import Tensor

FUSION = {"enable_fp_fusion": True}
"""Of each launch: a product and a sum take one instruction. Unsaid, Triton 3.9 warns, and 3.10 makes two of them."""


def launch_on(device: torch.device) -> torch.cuda.device:
    """Launches go to the current device: make it the tensors' own. Nothing on the CPU, for the interpreter."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def is_captured(device: torch.device) -> bool:
    """Whether what is launched there becomes part of a CUDA graph: it computes nothing until that is replayed."""
    # Asking starts CUDA, which needs a driver: before that nothing is captured.
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_before_ampere(device: torch.device) -> bool:
    """Whether an NVIDIA GPU has less shared memory than the kernels' tiles may take, 64 KiB of Turing for one."""
    return torch.cuda.is_initialized() and torch.cuda.get_device_capability(device) < (8, 0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory ran out: of Apple's GPUs torch has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)


def refuse_first_use_in_graph(device: torch.device) -> None:
    """Raise RuntimeError where a CUDA graph is captured: kernels are tried before their first use, and waited for.

    That breaks the capture, and says nothing about the kernels: who asks must not keep an answer.
    """
    if is_captured(device):
        raise RuntimeError(
            "diffsparse tries its GPU kernels before their first use, which cannot be part of a CUDA graph. "
            "Make the same call once before the graph is captured."
        )


def step_of_heads(order: Tensor | None) -> int:
    """From one head of an order [H|1, S] to the next, in numbers."""
    return 0 if order is None or order.shape[0] == 1 else order.stride(0)


def outputs(query: Tensor, dtype: torch.dtype, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Room for the output of queries [B, H, S, D], [B, S, H, D] in memory, and for the logsumexp [B, H, S] or none."""
    batch, heads, tokens, dim = query.shape
    out = query.new_empty((batch, tokens, heads, dim), dtype=dtype).transpose(1, 2)
    return out, query.new_empty((batch, heads, tokens) if return_lse else 0, dtype=torch.float32)
