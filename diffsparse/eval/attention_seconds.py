"""How long a pipeline was in its self-attention layers: of a dense video as of a sparse one, by the same hooks."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import nn

from diffsparse.eval.generate import transformers_of
from diffsparse.pipelines.families import find_family


class AttentionSeconds:
    """Counts while it is entered: whole layers, so projections, norms and rotary embedding are in it.

    Reading it on a GPU waits for the GPU, which counting does not.
    """

    def __init__(self, pipe: Any, device: str) -> None:
        self._layers = _self_attention(pipe) if device == "cpu" or device.startswith("cuda") else None
        self._on_gpu = device.startswith("cuda")
        self._now = functools.partial(_event_on_gpu, device) if self._on_gpu else time.perf_counter
        self._spans: list[tuple[Any, Any]] = []
        self._begun: Any = None
        self._hooks: list[Any] = []

    @property
    def total(self) -> float | None:
        """The seconds; None where no family says which layers these are, and on devices other than CPU and CUDA."""
        if not self._layers:
            return None
        if not self._on_gpu:
            return float(sum(end - begin for begin, end in self._spans))
        if self._spans:
            self._spans[-1][1].synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000)

    def __enter__(self) -> AttentionSeconds:
        for layer in self._layers or ():
            self._hooks += [layer.register_forward_pre_hook(self._begin), layer.register_forward_hook(self._end)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        self._begun = self._now()

    def _end(self, *_: Any) -> None:
        self._spans.append((self._begun, self._now()))


def _self_attention(pipe: Any) -> list[nn.Module] | None:
    """The layers of all transformers; None where one is of no known family."""
    layers = []
    for transformer in transformers_of(pipe):
        if (family := find_family(transformer)) is None:
            return None
        layers += [transformer.get_submodule(name) for name in family.layer_names(transformer)]
    return layers


def _event_on_gpu(device: str) -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
