"""One enabled transformer of diffusers: its layers by their handles, step and layout by its calls."""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffsparse.config import SparseAttentionConfig
from diffsparse.grid import grid_of
from diffsparse.pipelines.family import Family
from diffsparse.pipelines.padding import hides_a_tail, hides_nothing
from diffsparse.session import Session
from diffsparse.steps import StepClock


class TransformerSession(Session):
    """The state of one enabled transformer, found by its layers through their handles.

    It is that of the thread that called the transformer last. What another thread is still computing runs dense.

    Args:
        transformer: held weakly.
        family: how the transformer lays out its tokens.
        layer_names: its self-attention modules in the order they run.
        config: what the user asked for.
        pipeline: what runs the denoising loop; None for a transformer enabled on its own. Held weakly.
        name: what the pipeline calls the transformer.
    """

    family: Family

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        layer_names: tuple[str, ...],
        config: SparseAttentionConfig,
        pipeline: Any = None,
        name: str = "transformer",
    ) -> None:
        super().__init__(family.class_name(transformer), family, layer_names, config)
        self.clock = StepClock(pipeline, name)
        self.refused: set[int] = set()
        """Layers that could not be given a sparse processor."""
        self._thread: int | None = None
        self._lock = threading.RLock()
        """Held where step, layout and plans are changed, and while a layer goes by them."""
        self._modules = tuple(weakref.ref(_with_processor(transformer.get_submodule(name))) for name in layer_names)
        self._argument_names = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self.handles = tuple(_register(self, layer) for layer in range(len(layer_names)))
        self.close = weakref.finalize(self, _forget, tuple(int(handle) for handle in self.handles))
        """Forget the layers; calls with their handles run dense from now on."""

    def begin_call(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read step and layout off a call of the transformer; its forward pre-hook."""
        call = dict(zip(self._argument_names, args)) | kwargs
        with self._lock:
            step = self.clock.tick(call.get(self.family.timestep))
            layout = self._read_layout(transformer, call)
            self._read_text_mask(call, layout)
            # Tiles of one step may differ in size. Where nothing says how many steps there are, it is another video.
            is_other_video = step.total is None and _video_size(layout) != _video_size(self.layout)
            if is_other_video or self._thread != threading.get_ident():
                self.forget_plans()
            self._thread = threading.get_ident()
            self.begin(step, layout)
        reasons = ((layer, self.why_not_reached(layer)) for layer in range(len(self.layer_names)))
        self.unreached = {layer: reason for layer, reason in reasons if reason is not None}
        if self.config.strict and self.unreached:
            raise self.refusal(*next(iter(self.unreached.items())))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        ranks: int = 1,
        dense: Callable[[], Tensor] | None = None,
    ) -> Tensor | None:
        """As that of any session, for the thread that called the transformer last."""
        if self.is_of_text_alone(key.shape[2]):
            return None
        if self.family.masks_pairs and mask is not None and mask.ndim == 4:
            mask = mask[:, :, -1:]
        with self._lock:
            if self._thread in (None, threading.get_ident()):
                return super().attend(layer, query, key, value, mask, scale, ranks, dense)
        self.fall_back(layer, "another thread called the transformer meanwhile")
        return None

    def is_of_text_alone(self, num_keys: int) -> bool:
        """Whether a call with so many keys is of text alone, which is no business of ours."""
        if not self.family.text_attends_alone or self.layout is None:
            return False
        grid = grid_of(self.layout, 0)
        # Text may be as long as the grid, or longer; what sees the grid has its keys.
        return num_keys < grid.num_video_tokens or num_keys <= grid.text_before + grid.text_after

    def _read_layout(self, transformer: nn.Module, call: Mapping[str, Any]) -> tuple[int | None, ...] | None:
        """What the family makes of a call. One that it did not foresee is no reason to lose a generation."""
        self.why_no_layout = "the call does not say the size of the grid"
        try:
            layout = self.family.layout(transformer, call)
            sizes = None if layout is None else tuple(layout)
            if sizes is not None:
                grid_of(sizes, 0)
        except Exception as error:
            self.why_no_layout = f"the layout of its family raises {type(error).__name__}: {error}"
            return None
        return sizes

    def _read_text_mask(self, call: Mapping[str, Any], layout: tuple[int | None, ...] | None) -> None:
        """See what the call's mask of text hides, if anything, and where."""
        mask = self.family.text_mask_of(call)
        self.mask_hides_nothing = hides_nothing(mask)
        self.padded_within = False
        if mask is not None and layout is not None and not self.mask_hides_nothing:
            self.padded_within = layout[3] != 0 or not hides_a_tail(mask)

    def end_call(self) -> None:
        """Let the plans go with the last call of a generation, so that what decodes its latents has their memory."""
        with self._lock:
            if self.step is not None and self.step.is_last_of_generation:
                self.forget_plans()

    def module(self, layer: int) -> nn.Module | None:
        """The attention module of the layer; None once it is gone."""
        return self._modules[layer]()

    def processor(self, layer: int) -> Any:
        """The processor that the layer has now."""
        return getattr(self.module(layer), "processor", None)

    def why_not_reached(self, layer: int) -> str | None:
        """Why no call of this layer comes here; None where they do."""
        if getattr(self.processor(layer), "_diffsparse_handle", None) is self.handles[layer]:
            return None
        if layer in self.refused:
            return "its processor cannot be made sparse"
        return "its processor was replaced after enabling"


def _with_processor(module: nn.Module) -> nn.Module:
    """The attention module itself, inside what FSDP or activation checkpointing made of it.

    These show its processor as theirs, and keep one that is set to themselves.
    """
    while "processor" not in vars(module) | module._modules and len(children := list(module.children())) == 1:
        (module,) = children
    return module


_LAYERS: dict[int, tuple[weakref.ref[TransformerSession], int]] = {}
_numbers = itertools.count()


def _register(session: TransformerSession, layer: int) -> Tensor:
    """A handle for the layer: a 0-d CPU int64 tensor, which compiled code passes on without looking at it."""
    number = next(_numbers)
    _LAYERS[number] = (weakref.ref(session), layer)
    return torch.tensor(number, device="cpu")


def _forget(numbers: tuple[int, ...]) -> None:
    for number in numbers:
        _LAYERS.pop(number, None)


def find_layer(handle: Tensor) -> tuple[TransformerSession, int] | None:
    """The session and layer of a handle; None once the session is closed."""
    reference, layer = _LAYERS.get(int(handle), (None, 0))
    session = reference() if reference is not None else None
    return None if session is None else (session, layer)


def _video_size(layout: tuple[int | None, ...] | None) -> tuple[int | None, ...] | None:
    return None if layout is None else layout[:3]
