"""What torch.compile may run in a model's place: code that it made before DiffSparse was there."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from diffsparse.comfy.models import diffusion_model

_IS_REACHED: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""Of the compiled models that have run with DiffSparse, whether all of their blocks came to it in the last run."""


def begin_run(patcher: Any) -> None:
    """Have a model compiled anew before its first run with DiffSparse.

    ComfyUI's nodes tell torch.compile to take no heed of other `transformer_options`, and it takes none of new hooks:
    what it compiled without DiffSparse would run on, dense. What it compiles with it serves both.
    """
    if _is_compiled(patcher) and diffusion_model(patcher) not in _IS_REACHED:
        torch.compiler.reset()


def end_run(patcher: Any, is_reached: bool) -> bool:
    """Whether the next run has the model compiled anew: once, where blocks no longer come to DiffSparse that did."""
    if not _is_compiled(patcher):
        return False
    module = diffusion_model(patcher)
    if not is_reached and _IS_REACHED.get(module, False):
        del _IS_REACHED[module]
        return True
    _IS_REACHED[module] = is_reached
    return False


def _is_compiled(patcher: Any) -> bool:
    """Whether a node compiles the model or its blocks: it leaves in the options how."""
    return "torch_compile_kwargs" in patcher.model_options
