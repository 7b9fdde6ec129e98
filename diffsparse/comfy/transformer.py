"""One `diffusion_model` while it samples: its layers by their blocks, and the override of its attention."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffsparse.comfy.models import ComfyModel, uncompiled
from diffsparse.comfy.override_call import AttentionFunction, OverrideCall, read_call
from diffsparse.config import SparseAttentionConfig
from diffsparse.kernels.launch import is_out_of_memory
from diffsparse.pipelines.family import Layout
from diffsparse.plan_recorder import PlanRecorder
from diffsparse.session import Session
from diffsparse.steps import Step

OPTIONS, OVERRIDE = "transformer_options", "optimized_attention_override"
"""The argument in which ComfyUI tells its models how to run, and what stands there for their attention."""

SKIPPED = "stg_skip_self_attn"
"""The option by which ComfyUI's spatio-temporal guidance tells a block to pass its values through, unattended."""

OUT_OF_MEMORY = "out of memory"
UNREACHED = "another node has replaced the attention of its block"

# Compiled code runs these as they are, so that step, layer and plan are looked up at each call.
_never_compiled = torch.compiler.disable


class SampledTransformer:
    """Sends the self-attention of each block to a session, and everything else to the model's own attention.

    Args:
        module: the `diffusion_model`.
        model: its entry in the table of models.
        config: what the user asked for.
    """

    def __init__(self, module: nn.Module, model: ComfyModel, config: SparseAttentionConfig) -> None:
        blocks = model.named_blocks(module)
        self.session = Session(type(module).__name__, model, tuple(blocks), config)
        self.previous: AttentionFunction | None = None
        """During a call of the model, the override that was there before ours; dense calls go through it."""
        self.ran = self.ran_sparse = False
        """Whether any block ran in the last call of the model, and any attention of it sparse."""
        self._why_dense: str | None = None
        self._gave_up: str | None = None
        self._is_called = False
        """Whether a call of the model runs that `begin_call` was told of, not one of somebody who tells no step."""
        self._layer: int | None = None
        self._awaits_attention = False
        self._num_tokens = 0
        """Of the block's self-attention, once it has come."""
        self._recorded: dict[int, tuple[Any, int]] = {}
        """By layer, the layout and the tokens that a plan file is made for."""
        self._hooks = [
            hook
            for layer, block in enumerate(blocks.values())
            for hook in (
                block.register_forward_pre_hook(
                    functools.partial(self._enter_block, layer, _place_of_options(block)), with_kwargs=True
                ),
                block.register_forward_hook(self._leave_block),
            )
        ]

    @_never_compiled
    def begin_call(self, step: Step, layout: Layout | None, why_dense: str | None) -> None:
        """A call of the model begins, at this step and with this layout; it stays dense if there is a reason."""
        self.session.begin(step, layout)
        self._why_dense = self._gave_up or why_dense
        self._is_called, self._layer = True, None
        self.ran = self.ran_sparse = False

    def end_call(self) -> None:
        """The call of the model is over, or has failed."""
        self._is_called, self._layer, self.previous = False, None, None

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self.session.forget_plans()

    @_never_compiled
    def override(self, function: AttentionFunction, *args: Any, **kwargs: Any) -> Tensor:
        """What stands in the options as `OVERRIDE`."""
        stand_in = function if self.previous is None else functools.partial(self.previous, function)
        dense = functools.partial(stand_in, *args, **kwargs)
        if self._layer is None:
            return dense()
        call = read_call(*args, **kwargs)
        if not self._is_self_attention(call):
            return dense()
        output = self._attend(self._layer, call, dense)
        if output is None:
            return dense()
        self.ran_sparse = True
        return call.give_back(output)

    def _is_self_attention(self, call: OverrideCall) -> bool:
        """Whether a call in a block is its self-attention: the first there that can be, and each as long as it is.

        More than one come where a node that saves memory takes a few heads at a time.
        """
        if not self._awaits_attention:
            one_more = call.query.shape[-2] == call.key.shape[-2] == self._num_tokens
            if one_more and isinstance(self.session.config.strategy, PlanRecorder):
                raise ValueError(
                    f"DiffSparse Calibrate: another node takes {call.heads} heads of a block at a time, to save "
                    f"memory, and a plan file is for all of them together. Remove that node for this run."
                )
            return one_more
        if call.is_cross_attention:
            # The block's self-attention never came here.
            return False
        self._awaits_attention, self._num_tokens = False, call.query.shape[-2]
        return True

    def _attend(self, layer: int, call: OverrideCall, dense: Callable[[], Tensor]) -> Tensor | None:
        """Sparse attention of a layer, [B, H, S, D]; None, and counted, where it stays dense."""
        if isinstance(self.session.config.strategy, PlanRecorder):
            self._check_same_length(layer, call.query.shape[-2])
        if self._why_dense is not None:
            self.session.check_call(layer, *call.heads_first()[:2])
            self.session.count_dense(layer, self._why_dense)
            return None
        if (obstacle := _obstacle(call)) is not None:
            self.session.fall_back(layer, obstacle)
            return None
        query, key, value = call.heads_first()
        try:
            with _memory_of_its_own():
                return self.session.attend(layer, query, key, value, call.mask, call.scale, dense=dense)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # The rest of this run stays dense, or the next layer would run out of memory as well.
            self._why_dense = self._gave_up = OUT_OF_MEMORY
            self.session.forget_plans()
            self.session.fall_back(layer, OUT_OF_MEMORY)
            return None

    def _check_same_length(self, layer: int, num_tokens: int) -> None:
        """Raise at the first step, for the recorder would after the dense ones."""
        now = self.session.layout, num_tokens
        first = self._recorded.setdefault(layer, now)
        if first != now:
            raise ValueError(
                f"DiffSparse Calibrate: a plan file is for one size and text length, but a call of {num_tokens} tokens "
                f"({_grid_text(now[0])}) came after one of {first[1]} ({_grid_text(first[0])}). Use prompts of one "
                f"length, and neither areas nor context windows, or go without a plan file."
            )

    @_never_compiled
    def _enter_block(
        self, layer: int, place_of_options: int | None, block: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if not self._is_called:
            return None
        self.ran = True
        self._layer = layer
        self._num_tokens = 0
        by_position = place_of_options is not None and place_of_options < len(args)
        options = args[place_of_options] if by_position else kwargs.get(OPTIONS)
        self._awaits_attention = not (options or {}).get(SKIPPED, False)
        if place_of_options is None or by_position or OPTIONS in kwargs:
            return None
        # WanModel_S2V in ComfyUI 0.3.64 tells its blocks nothing, and they would never ask for the override.
        return args, kwargs | {OPTIONS: {OVERRIDE: self.override}}

    @_never_compiled
    def _leave_block(self, block: nn.Module, args: Any, output: Any) -> None:
        if self._layer is not None and self._awaits_attention:
            self.session.fall_back(self._layer, UNREACHED)
        self._layer = None


def _grid_text(layout: tuple[int | None, ...] | None) -> str:
    return "no grid" if layout is None else "frames, height and width {} x {} x {}".format(*layout)


def _place_of_options(block: nn.Module) -> int | None:
    """Which argument of a block the options are; None where it takes none by that name."""
    names = list(inspect.signature(uncompiled(block).forward).parameters)
    return names.index(OPTIONS) if OPTIONS in names else None


def _memory_of_its_own() -> contextlib.AbstractContextManager[Any]:
    """ComfyUI 0.35 and newer replay what a call of some models allocates, and abort where any of it outlives the call.

    Plans and counts do, and calls that make a plan allocate more than others.
    """
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", contextlib.nullcontext)
    context: contextlib.AbstractContextManager[Any] = pause()
    return context


def _obstacle(call: OverrideCall) -> str | None:
    """What no session can handle."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value)):
        return "gradients are required"
    if not call.low_precision_attention:
        return "the model asks for exact attention"
    return None
