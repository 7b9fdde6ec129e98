"""The attention layers of one transformer: dense or sparse now, the plans they keep, what ran."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.autocast import as_autocast, with_autocast_as_now, without_autocast
from diffsparse.call_tokens import CallTokens, Order
from diffsparse.config import SparseAttentionConfig, resolve_dense_layers
from diffsparse.grid import TokenGrid
from diffsparse.kernels.block_sparse import DTYPES, MAX_HEAD_DIM, pick_backend, why_none
from diffsparse.pipelines.padding import hides_keys_only, is_of_keys, key_length_of
from diffsparse.plan import AttentionPlan
from diffsparse.speed_check import SpeedCheck
from diffsparse.steps import Step
from diffsparse.strategies.all_blocks import AllBlocks
from diffsparse.strategies.calibrated import Calibrated
from diffsparse.strategies.strategy import AttentionCall, make_plan


class Family(Protocol):
    """What the session asks of a model family."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def padding_mask(self) -> bool: ...  # noqa: D102
    @property
    def text_apart(self) -> bool | None: ...  # noqa: D102


class DenseFallback(RuntimeError):
    """Raised instead of a dense fallback when the config is strict."""


@dataclass
class LayerTally:
    """What ran in one layer. `density` sums the density of each head over the sparse calls, [H]."""

    sparse_calls: int = 0
    precisions: Counter[str] = field(default_factory=Counter)
    dense_reasons: Counter[str] = field(default_factory=Counter)
    density: Tensor | None = None
    classes: Tensor | None = None

    def count_sparse(self, plan: AttentionPlan) -> None:
        """One more sparse call with this plan. Nothing is read back from the device here."""
        self.sparse_calls += 1
        self.precisions[plan.precision] += 1
        density = plan.mask.density
        self.density = density if self.density is None else self.density.to(density.device) + density
        self.classes = plan.classes


@dataclass(frozen=True, eq=False)
class _Way:
    """How the kernel computes a call: by this config, where the check does not find it hardly faster than dense."""

    config: SparseAttentionConfig
    check: SpeedCheck


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
    """The state of one transformer. What runs it says which step it is and where the tokens sit.

    Args:
        model_name: the transformer's class, for errors.
        family: what its attention is like.
        layer_names: its self-attention layers in the order they run.
        config: what the user asked for.

    Raises:
        ValueError: the config names a layer that is not there, or its plans are for another model.
    """

    def __init__(
        self, model_name: str, family: Family, layer_names: tuple[str, ...], config: SparseAttentionConfig
    ) -> None:
        if layer_names and isinstance(config.strategy, Calibrated):
            config.strategy.check_model(model_name, len(layer_names))
        self.model_name = model_name
        self.family = family
        self.config = config
        self.layer_names = layer_names
        self.tallies = [LayerTally() for _ in layer_names]
        self.num_heads = 0
        self._dense_layers = resolve_dense_layers(config.dense_layers, len(layer_names), model_name)
        self.layout: tuple[int | None, ...] | None = None
        self.why_no_layout = "the call does not say the size of the grid"
        self.mask_hides_nothing = False
        """Whether a mask that comes with this call is to be taken for none."""
        self.padded_within = False
        """Whether a mask that comes with this call hides text elsewhere than at the end of the sequence."""
        self.unreached: dict[int, str] = {}
        """Layers of which nothing came here in the last call of the transformer, and why."""
        self._rows: Counter[int] = Counter()
        self.step: Step | None = None
        """That of the call of the transformer that runs, or ran last."""
        self._plans: dict[Hashable, _KeptPlan] = {}
        self._speed_check = SpeedCheck(model_name, config)
        self._way_of_dense: _Way | None = None
        """That of calls which policy wants dense; None where the model computes them."""
        if (precision := config.dense_quantization) is not None:
            dense = replace(config, strategy=AllBlocks(config.backend, precision), quantization=precision)
            self._way_of_dense = _Way(dense, SpeedCheck(model_name, dense, f"the kernel in {precision}"))
        self._checked: set[tuple[torch.device, torch.dtype]] = set()

    def begin(self, step: Step, layout: tuple[int | None, ...] | None) -> None:
        """One call of the transformer begins: at this step, with its tokens laid out like this.

        Args:
            layout: frames, height and width of the grid, then the text tokens before and after it. One of these two
                may be None where only the sequence shows how many there are. None where the call does not say.
        """
        self._rows.clear()
        if step.is_first_of_generation:
            self.forget_plans()
        self.step, self.layout = step, None if layout is None else tuple(layout)

    def forget_plans(self) -> None:
        """Plan every layer anew at its next call."""
        self._plans.clear()

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
        """Attention of one layer by its plan, [B, H, S, D]; None, and counted, where the model's own is to compute it.

        Args:
            layer: index into `layer_names`.
            query, key, value: [B, H, S, D] after norms and rotary embedding. Query may be of the grid's tokens alone,
                or of all but those before it. Key and value may have fewer heads, each for as many of the query.
            mask: what the model passes to its own attention.
            scale: factor on the scores, D ** -0.5 if None.
            ranks: how many ranks the sequence was put together from, see `RankOrder`.
            dense: what computes this call where it has to be dense, to be timed; None to go without.

        Raises:
            DenseFallback: the config is strict and this layer cannot run sparse.
            ValueError: the backend cannot run here, or not in the precision that the config asks for, or the config's
                plans are for another grid or number of heads.
        """
        if dense is not None:
            dense = with_autocast_as_now(dense, query.device)
        query, key, value = (as_autocast(x) for x in (query, key, value))
        with without_autocast(query.device):
            return self._attend(layer, query, key, value, mask, scale, ranks, dense)

    def why_not_reached(self, layer: int) -> str | None:
        """Why no call of this layer comes here; None where they do."""
        return None

    def why_not_counted(self, layer: int) -> str | None:
        """Why no call of this layer comes here now, or came in the last call of the transformer; None where they do."""
        return self.why_not_reached(layer) or self.unreached.get(layer)

    def count_dense(self, layer: int, reason: str) -> None:
        """One more dense call of `layer`, for the report."""
        self.tallies[layer].dense_reasons[reason] += 1

    def fall_back(self, layer: int, reason: str) -> None:
        """A dense call that policy did not ask for."""
        self.count_dense(layer, reason)
        if self.config.strict and reason != _STRATEGY_SAYS_DENSE:
            raise self.refusal(layer, reason)

    def check_call(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Raise now what would otherwise be raised after the dense steps, minutes later; both are [B, H, S, D].

        Raises:
            ValueError: as `attend` does.
        """
        self._check_backend(query)
        self._check_calibration(layer, query, key)

    def _attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        ranks: int,
        dense: Callable[[], Tensor] | None,
    ) -> Tensor | None:
        self.check_call(layer, query, key)
        self.num_heads = query.shape[1]
        self._rows[layer] += 1
        policy = self._policy(layer, query)
        way = self._way(policy, query)
        if way is None:
            self.count_dense(layer, str(policy))
            return None
        if (slow := way.check.why_slow(key, mask)) is not None:
            self.count_dense(layer, _after(policy, slow))
            return None
        # One of pairs hides more than text: of Qwen-Image 2.1's it hides what comes after each token.
        hiding = None if self.mask_hides_nothing and mask is not None and is_of_keys(mask) else mask
        if (reason := self._obstacle(query, key, value, hiding, ranks)) is None:
            key_length = key_length_of(hiding, query.shape[0])
            tokens, is_joint = self._tokens(query, key), query.shape[2] == key.shape[2]
            assert tokens is not None
            order = tokens.order(hiding, ranks, self.family.text_apart, query.device)
            given = query, key, value
            query, key, value = _in_own_order(order, *given)

            def sparse(plan: AttentionPlan) -> Tensor:
                return plan.attend(query, key, value, key_length=key_length, scale=scale, backend=self.config.backend)

            def sparse_as_given(plan: AttentionPlan) -> Tensor:
                """As it is timed: what it costs to bring tokens into their own order, and back, is part of it."""
                _in_own_order(order, *given)
                return order.apply(sparse(plan)) if is_joint else sparse(plan)

            inputs = query, key, value, tokens.grid, key_length
            make_plan = functools.partial(self._make_plan, way.config, layer, *inputs, scale)
            plan = self._plan(layer, policy, *inputs, make_plan)
            if isinstance(plan, AttentionPlan):
                if dense is not None and not way.check.knows(key, mask):
                    # Once before it is timed, and not kept: dense attention may need the memory.
                    sparse(plan)
                    way.check.time(key, mask, dense, sparse_as_given, make_plan, self._num_served(plan))
                    if (slow := way.check.why_slow(key, mask)) is not None:
                        self.count_dense(layer, _after(policy, slow))
                        return None
                output = sparse(plan)
                # Not before it has run: memory may run out.
                if policy is None:
                    self.tallies[layer].count_sparse(plan)
                else:
                    self.count_dense(layer, f"{policy}, in {plan.precision}")
                return order.apply(output) if is_joint else output
            reason = plan
        if policy is None:
            self.fall_back(layer, reason)
        else:
            self.count_dense(layer, _after(policy, reason))
        return None

    def _way(self, policy: str | None, query: Tensor) -> _Way | None:
        """How the kernel computes a call that `policy` wants dense, or sparse where it is None; None: it does not."""
        if policy is None:
            return _Way(self.config, self._speed_check)
        return self._way_of_dense if query.shape[2] >= self.config.fewest_tokens else None

    def _check_backend(self, query: Tensor) -> None:
        kind, precisions = (query.device, query.dtype), self.config.precisions
        if (self.config.backend is None and not precisions) or kind in self._checked:
            return
        if query.shape[3] > MAX_HEAD_DIM or query.dtype not in DTYPES:
            return  # Dense, with its reason.
        if self.config.backend is not None:
            self._pick_backend(query, "native")
        for name, precision in precisions.items():
            try:
                self._pick_backend(query, precision)
            except ValueError as error:
                raise ValueError(f"`{name}` {precision!r} cannot be used here: {error}") from error
        self._checked.add(kind)

    def _pick_backend(self, query: Tensor, precision: str) -> None:
        """Raise ValueError if no query blocks that strategies have by default can be computed."""
        try:
            pick_backend(self.config.backend, query, 64, 64, precision)
        except ValueError:
            # Hopper's kernel takes 128 queries and no fewer; in float32, large heads leave room for no more than 64.
            pick_backend(self.config.backend, query, 128, 64, precision)

    def _check_calibration(self, layer: int, query: Tensor, key: Tensor) -> None:
        if isinstance(self.config.strategy, Calibrated) and layer not in self._dense_layers and self.step is not None:
            tokens = self._tokens(query, key)
            if tokens is not None:
                self.config.strategy.check_call(tokens.grid, query.shape[1])

    def refusal(self, layer: int, reason: str) -> DenseFallback:
        """What a strict config raises."""
        return DenseFallback(
            f"layer {layer} ({self.layer_names[layer]}) cannot run sparse: {reason}. "
            f"With strict=False it runs dense and the report counts it."
        )

    def _tokens(self, query: Tensor, key: Tensor) -> CallTokens | None:
        """The tokens of a call, by the layout of that of the transformer."""
        if self.layout is None:
            return None
        return CallTokens.of(self.layout, query.shape[2], key.shape[2], self.padded_within)

    def _policy(self, layer: int, query: Tensor) -> str | None:
        """Why the user's own settings want this call dense."""
        if layer in self._dense_layers:
            return "dense layer"
        if self.step is not None and self.step.is_within_first(self.config.dense_steps):
            return "early step"
        if query.shape[2] < (fewest := self.config.fewest_tokens):
            return f"fewer than {fewest} tokens"
        return None

    def _obstacle(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, ranks: int) -> str | None:
        """Why this call cannot run sparse."""
        if self.step is None:
            return "called outside its transformer"
        tokens = self._tokens(query, key)
        if tokens is None:
            return self.why_no_layout
        grid = tokens.grid
        may_lack = tokens.allowed_without_queries if ranks == 1 else (0,)
        are_grouped = query.shape[0] == key.shape[0] and query.shape[1] % key.shape[1] == 0
        fits = are_grouped and query.shape[3] == key.shape[3] and key.shape[2] - query.shape[2] in may_lack
        if key.shape != value.shape or not fits:
            return "query, key and value differ in shape"
        if key.shape[2] != grid.num_tokens:
            return f"{key.shape[2]} tokens where the layout says {grid.num_tokens}"
        if query.shape[3] > MAX_HEAD_DIM:
            return f"head dim {query.shape[3]} above {MAX_HEAD_DIM}"
        if query.dtype not in DTYPES:
            return f"{query.dtype}, which no backend computes in"
        if mask is not None and not (self.family.padding_mask and hides_keys_only(mask, key.shape[2])):
            return "attention mask"
        if self.padded_within and ranks > 1:
            return "text padded elsewhere than at its end, under context parallelism"
        if ranks > 1 and self.family.text_apart is None and grid.num_video_tokens < grid.num_tokens:
            return "nobody has said how context parallelism cuts the text of this family"
        return self._why_no_backend(query)

    def _why_no_backend(self, query: Tensor) -> str | None:
        """Why nothing computes sparse attention of this kind; one that was named has been asked before, and raised."""
        kind = query.device, query.dtype
        if self.config.backend is None and kind not in self._checked:
            if (reasons := why_none(query, 64, 64)) is not None:
                return f"no backend is right here: {reasons}"
            self._checked.add(kind)
        return None

    def _plan(
        self,
        layer: int,
        policy: str | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: TokenGrid,
        key_length: Tensor | None,
        make: Callable[[], AttentionPlan | None],
    ) -> AttentionPlan | str:
        """The layer's plan, kept or made, or why there is none."""
        assert self.step is not None
        made_for = (grid, query.shape, query.dtype, query.device, key_length is None)
        # Guidance branches share a plan: their errors then point the same way, and guidance does not amplify them.
        # A model that attends row by row of the batch calls a layer several times; each row is a video of its own.
        slot = (layer, policy, self._rows[layer], made_for, None if self.step.branch_is_named else self.step.branch)
        kept = self._plans.get(slot)
        if kept is None or not kept.serves(self.step.index, self.config.replan_every):
            if not _is_finite(query, key, value):
                return "NaN or infinity in query, key or value"
            # A branch may not come again, as a context window that moves at each step does not.
            self._plans = {
                other: plan
                for other, plan in self._plans.items()
                if plan.serves(self.step.index, self.config.replan_every)
            }
            kept = self._plans[slot] = _KeptPlan(make(), self.step.index)
        return _STRATEGY_SAYS_DENSE if kept.plan is None else kept.plan

    def _make_plan(
        self,
        config: SparseAttentionConfig,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: TokenGrid,
        key_length: Tensor | None,
        scale: float | None,
        progress: float | None = None,
    ) -> AttentionPlan | None:
        """A new plan of the layer by `config`, for this step or one as far on as `progress`; None to be dense."""
        assert self.step is not None
        if progress is None:
            progress = self.step.progress_beyond(config.dense_steps, config.replan_every)
        call = AttentionCall(
            grid=grid,
            layer=layer,
            num_layers=len(self.layer_names),
            step=self.step.index,
            num_steps=self.step.total,
            progress=progress,
            key_length=key_length,
            scale=scale,
            model=self.model_name,
        )
        if (missing := key.shape[2] - query.shape[2]) > 0:
            joint = F.pad(query, (0, 0, 0, missing))
            plan = make_plan(config.strategy, joint, key, value, call)
            plan = None if plan is None else plan.of_first_queries(query.shape[2])
        else:
            plan = make_plan(config.strategy, query, key, value, call)
        if plan is not None and config.quantization is not None:
            plan = replace(plan, precision=config.quantization)
        return plan

    def _num_served(self, plan: AttentionPlan) -> int:
        """How many steps such plans serve, as far as is known."""
        total = self.step.total if self.step is not None else None
        return total if plan.lasts and total is not None else self.config.replan_every


_STRATEGY_SAYS_DENSE = "the strategy keeps it dense"


def _in_own_order(order: Order, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that come in an order, in their own, with a key and a value for each head; a shorter query has it."""
    query = order.undo(query) if query.shape[2] == key.shape[2] else query
    key, value = (_for_each_head(order.undo(x), query.shape[1]) for x in (key, value))
    return query, key, value


def _for_each_head(x: Tensor, num_heads: int) -> Tensor:
    """Keys or values [B, H / n, S, D] for each head of a query, [B, H, S, D]."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def _after(policy: str | None, reason: str) -> str:
    """Why the model computes a call: what policy says first, where it wants the call dense anyway."""
    return reason if policy is None else f"{policy}, and {reason}"


def _is_finite(*tensors: Tensor) -> bool:
    """Whether planning can trust these values. On a GPU nobody waits for the answer: NaN stays in its own rows."""
    return all(
        tensor.device.type != "cpu" or bool(torch.isfinite(tensor.sum(dtype=torch.float32))) for tensor in tensors
    )
