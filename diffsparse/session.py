"""One enabled transformer: dense or sparse now, the plans it keeps, what ran."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffsparse.config import SparseAttentionConfig
from diffsparse.grid import TokenGrid
from diffsparse.kernels.block_sparse import MAX_HEAD_DIM
from diffsparse.plan import AttentionPlan
from diffsparse.rank_order import RankOrder
from diffsparse.steps import Step, StepClock
from diffsparse.strategies.strategy import AttentionCall


class Family(Protocol):
    """What the session asks of a model family; the families are described in `diffsparse/pipelines`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def padding_mask(self) -> bool: ...  # noqa: D102
    @property
    def timestep(self) -> str: ...  # noqa: D102
    @property
    def spreads_mask(self) -> bool: ...  # noqa: D102
    @property
    def text_apart(self) -> bool | None: ...  # noqa: D102
    @property
    def layout(self) -> Callable[[nn.Module, Mapping[str, Any]], tuple[int | None, ...] | None]: ...  # noqa: D102


class DenseFallback(RuntimeError):
    """Raised instead of a dense fallback when the config is strict."""


@dataclass
class LayerTally:
    """What ran in one layer. `density` sums the density of each head over the sparse calls, [H]."""

    sparse_calls: int = 0
    dense_reasons: Counter[str] = field(default_factory=Counter)
    density: Tensor | None = None
    classes: Tensor | None = None

    def count_sparse(self, plan: AttentionPlan) -> None:
        """One more sparse call with this plan. Nothing is read back from the device here."""
        self.sparse_calls += 1
        density = plan.mask.density
        self.density = density if self.density is None else self.density + density
        self.classes = plan.classes


@dataclass(frozen=True, eq=False)
class _KeptPlan:
    plan: AttentionPlan | None
    made_at: int

    def serves(self, step: int, replan_every: int) -> bool:
        """Whether the plan is still right at this step of the same generation."""
        age = step - self.made_at
        lasts = self.plan is not None and self.plan.lasts
        return age >= 0 and (lasts or age < replan_every)


class Session:
    """The state of one enabled transformer, found by its layers through their handles.

    Args:
        transformer: held weakly.
        family: how the transformer lays out its tokens.
        layer_names: its self-attention modules in the order they run.
        config: what the user asked for.
        pipeline: what runs the denoising loop; None for a transformer enabled on its own. Held weakly.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        layer_names: tuple[str, ...],
        config: SparseAttentionConfig,
        pipeline: Any = None,
    ) -> None:
        self.family = family
        self.config = config
        self.layer_names = layer_names
        self.clock = StepClock(pipeline)
        self.tallies = [LayerTally() for _ in layer_names]
        self.num_heads = 0
        self.refused: set[int] = set()
        """Layers that could not be given a sparse processor."""
        self._modules = tuple(weakref.ref(transformer.get_submodule(name)) for name in layer_names)
        self._model_name = type(transformer).__name__
        self._argument_names = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self._dense_layers = self._resolve_dense_layers()
        self._layout: tuple[int | None, ...] | None = None
        self._why_no_grid = ""
        self._rows: Counter[int] = Counter()
        self._step: Step | None = None
        self._plans: dict[Hashable, _KeptPlan] = {}
        self.handles = tuple(_register(self, layer) for layer in range(len(layer_names)))
        self.close = weakref.finalize(self, _forget, tuple(int(handle) for handle in self.handles))
        """Forget the layers; calls with their handles run dense from now on."""

    def begin_call(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read step and layout off a call of the transformer; its forward pre-hook."""
        call = dict(zip(self._argument_names, args)) | kwargs
        self._step = self.clock.tick(call.get(self.family.timestep))
        self._rows.clear()
        last, self._layout = self._layout, self._read_layout(transformer, call)
        # Branches may differ in their text, but never in the size of the video.
        if self._step.is_first_of_generation or _video_size(self._layout) != _video_size(last):
            self._plans.clear()
        if self.config.strict:
            for layer, name in enumerate(self.layer_names):
                if (reason := self.why_not_reached(layer)) is not None:
                    raise DenseFallback(f"layer {layer} ({name}) cannot run sparse: {reason}. {_WITHOUT_STRICT}")

    def end_call(self) -> None:
        """Let the plans go with the last call of a generation, so that what decodes its latents has their memory."""
        if self._step is not None and self._step.is_last_of_generation:
            self._plans.clear()

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        dense: Callable[[], Tensor],
        ranks: int = 1,
    ) -> Tensor:
        """Attention of one layer, by its plan or by `dense()`: [B, H, S, D].

        Args:
            layer: index into `layer_names`.
            query, key, value: [B, H, S, D] after norms and rotary embedding.
            mask: what the model passes to its own attention.
            scale: factor on the scores, D ** -0.5 if None.
            dense: the model's own attention of the same inputs.
            ranks: how many ranks the sequence was put together from, see `RankOrder`.

        Raises:
            DenseFallback: the config is strict and this layer cannot run sparse.
        """
        self.num_heads = query.shape[1]
        self._rows[layer] += 1
        if (reason := self._policy(layer, query)) is not None:
            self.count_dense(layer, reason)
            return dense()
        if (reason := self._obstacle(query, key, value, mask, ranks)) is None:
            key_length = _key_length(mask, query.shape[0])
            order = RankOrder(self._parts(query.shape[2]), ranks)
            query, key, value = (order.undo(x) for x in (query, key, value))
            plan = self._plan(layer, query, key, value, key_length, scale)
            if isinstance(plan, AttentionPlan):
                self.tallies[layer].count_sparse(plan)
                return order.apply(
                    plan.attend(query, key, value, key_length=key_length, scale=scale, backend=self.config.backend)
                )
            reason = plan
        self.fall_back(layer, reason)
        return dense()

    def processor(self, layer: int) -> Any:
        """The processor that the layer has now."""
        return getattr(self._modules[layer](), "processor", None)

    def why_not_reached(self, layer: int) -> str | None:
        """Why no call of this layer comes here; None where they do."""
        if getattr(self.processor(layer), "_diffsparse_handle", None) is self.handles[layer]:
            return None
        if layer in self.refused:
            return "its processor cannot be made sparse"
        return "its processor was replaced after enabling"

    def count_dense(self, layer: int, reason: str) -> None:
        """One more dense call of `layer`, for the report."""
        self.tallies[layer].dense_reasons[reason] += 1

    def fall_back(self, layer: int, reason: str) -> None:
        """A dense call that policy did not ask for."""
        self.count_dense(layer, reason)
        if self.config.strict and reason != _STRATEGY_SAYS_DENSE:
            raise DenseFallback(
                f"layer {layer} ({self.layer_names[layer]}) cannot run sparse: {reason}. {_WITHOUT_STRICT}"
            )

    def _read_layout(self, transformer: nn.Module, call: Mapping[str, Any]) -> tuple[int | None, ...] | None:
        """What the family makes of a call. One that it did not foresee is no reason to lose a generation."""
        self._why_no_grid = "the call does not say the size of the grid"
        try:
            layout = self.family.layout(transformer, call)
            if layout is not None:
                TokenGrid(*layout[:4])  # type: ignore[arg-type]
        except Exception as error:
            self._why_no_grid = f"the layout of its family raises {type(error).__name__}: {error}"
            return None
        return layout

    def _resolve_dense_layers(self) -> frozenset[int]:
        count = len(self.layer_names)
        for layer in self.config.dense_layers:
            if not -count <= layer < count:
                raise ValueError(
                    f"`dense_layers` names layer {layer}, but {self._model_name} has {count} "
                    f"self-attention layers: expected {-count} to {count - 1}."
                )
        return frozenset(layer % count for layer in self.config.dense_layers)

    def _grid(self, num_tokens: int) -> TokenGrid | None:
        """Where the tokens of a sequence of this length sit, by the layout of the call."""
        if self._layout is None:
            return None
        *fixed, text_after = self._layout
        grid = TokenGrid(*fixed)  # type: ignore[arg-type]
        # Some layers see the grid without its text.
        if num_tokens == grid.num_video_tokens:
            return replace(grid, text_before=0)
        left = max(0, num_tokens - grid.num_tokens) if text_after is None else text_after
        return replace(grid, text_after=left)

    def _policy(self, layer: int, query: Tensor) -> str | None:
        """Why the user's own settings want this call dense."""
        if layer in self._dense_layers:
            return "dense layer"
        if self._step is not None and self._step.is_within_first(self.config.dense_steps):
            return "early step"
        if query.shape[2] < self.config.min_tokens:
            return f"fewer than {self.config.min_tokens} tokens"
        return None

    def _obstacle(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, ranks: int) -> str | None:
        """Why this call cannot run sparse."""
        if self._step is None:
            return "called outside its transformer"
        grid = self._grid(query.shape[2])
        if grid is None:
            return self._why_no_grid
        if query.shape != key.shape or key.shape != value.shape:
            return "query, key and value differ in shape"
        if query.shape[2] != grid.num_tokens:
            return f"{query.shape[2]} tokens where the layout says {grid.num_tokens}"
        if query.shape[3] > MAX_HEAD_DIM:
            return f"head dim {query.shape[3]} above {MAX_HEAD_DIM}"
        if mask is not None and not (self.family.padding_mask and _hides_keys_only(mask)):
            return "attention mask"
        if ranks > 1 and self.family.text_apart is None and grid.num_video_tokens < grid.num_tokens:
            return "nobody has said how context parallelism cuts the text of this family"
        return None

    def _parts(self, num_tokens: int) -> tuple[int, ...]:
        """The lengths of the model's tensors that make up a sequence and that context parallelism cuts one by one."""
        grid = self._grid(num_tokens)
        assert grid is not None
        if not self.family.text_apart or grid.num_video_tokens == num_tokens:
            return (num_tokens,)
        first = grid.text_before or grid.num_video_tokens
        return first, num_tokens - first

    def _plan(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_length: Tensor | None,
        scale: float | None,
    ) -> AttentionPlan | str:
        """The layer's plan, kept or new, or why there is none."""
        grid = self._grid(query.shape[2])
        assert self._step is not None
        assert grid is not None
        made_for = (grid, query.shape, query.dtype, query.device, key_length is None)
        # Guidance branches share a plan: their errors then point the same way, and guidance does not amplify them.
        # A model that attends row by row of the batch calls a layer several times; each row is a video of its own.
        slot = (layer, self._rows[layer], made_for, None if self._step.branch_is_named else self._step.branch)
        kept = self._plans.get(slot)
        if kept is None or not kept.serves(self._step.index, self.config.replan_every):
            if not _is_finite(query, key, value):
                return "NaN or infinity in query, key or value"
            call = AttentionCall(
                grid=grid,
                layer=layer,
                num_layers=len(self.layer_names),
                step=self._step.index,
                num_steps=self._step.total,
                key_length=key_length,
                scale=scale,
            )
            plan = self.config.strategy.plan(query, key, value, call)
            kept = self._plans[slot] = _KeptPlan(plan, self._step.index)
        return _STRATEGY_SAYS_DENSE if kept.plan is None else kept.plan


_STRATEGY_SAYS_DENSE = "the strategy keeps it dense"
_WITHOUT_STRICT = "With strict=False it runs dense and the report counts it."

_LAYERS: dict[int, tuple[weakref.ref[Session], int]] = {}
_numbers = itertools.count()


def _register(session: Session, layer: int) -> Tensor:
    """A handle for the layer: a 0-d CPU int64 tensor, which compiled code passes on without looking at it."""
    number = next(_numbers)
    _LAYERS[number] = (weakref.ref(session), layer)
    return torch.tensor(number, device="cpu")


def _forget(numbers: tuple[int, ...]) -> None:
    for number in numbers:
        _LAYERS.pop(number, None)


def find_layer(handle: Tensor) -> tuple[Session, int] | None:
    """The session and layer of a handle; None once the session is closed."""
    reference, layer = _LAYERS.get(int(handle), (None, 0))
    session = reference() if reference is not None else None
    return None if session is None else (session, layer)


def _video_size(layout: tuple[int | None, ...] | None) -> tuple[int | None, ...] | None:
    return None if layout is None else layout[:3]


def _hides_keys_only(mask: Tensor) -> bool:
    """Whether a mask is [B|1, 1, 1, S] or [B, S] bool: the same keys for every query."""
    return mask.dtype == torch.bool and (mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1:3] == (1, 1)))


def _key_length(mask: Tensor | None, batch: int) -> Tensor | None:
    """The lengths [B] int32 that a mask of a padded tail leaves."""
    if mask is None:
        return None
    return mask.reshape(mask.shape[0], -1).sum(-1, dtype=torch.int32).expand(batch).contiguous()


def _is_finite(*tensors: Tensor) -> bool:
    """Whether planning can trust these values. On a GPU nobody waits for the answer: NaN stays in its own rows."""
    return all(
        tensor.device.type != "cpu" or bool(torch.isfinite(tensor.sum(dtype=torch.float32))) for tensor in tensors
    )
