"""What a plan keeps of each head's attention, measured on sampled query rows against all keys, in float32."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.heads import HeadClass, sample_rows
from diffsparse.kernels.quantization import incoherence, key_mean
from diffsparse.permutation import Permutation
from diffsparse.plan import AttentionPlan

SAMPLED_ROWS = 64
UNCLASSED = "unclassed"


@dataclass(frozen=True)
class HeadMeasure:
    """One head in one attention call.

    Attributes:
        head_class: name of its class, "unclassed" where the strategy names none.
        density: share of key blocks computed exactly.
        recall: share of the dense attention that falls on them, mean over the sampled rows. A pooled tail adds nothing
            to it; a skipped head has none.
        error: relative L2 error of the output of the sampled rows against dense attention.
        tail: whether the skipped blocks enter as their mean.
        skipped: whether its output is 0.
        incoherence_own_order, incoherence_plan_order: how badly its queries and keys can be quantized in the plan's
            blocks, filled by the tokens as the model has them and in the order of the plan; see `block_incoherence`.
    """

    head_class: str
    density: float
    recall: float
    error: float
    tail: bool
    skipped: bool
    incoherence_own_order: float
    incoherence_plan_order: float


@dataclass(frozen=True, eq=False)
class Attended:
    """An attention call that a plan ran: what it was given and what came out.

    Attributes:
        query, output: [B, H, S_q, D], in the tokens' own order: all S of the grid, or the first of them.
        key, value: [B, H, S, D], in the tokens' own order.
        key_length: [B], keys at or beyond it do not exist; None when all do.
        scale: factor on the scores, D ** -0.5 if None.
    """

    plan: AttentionPlan
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    grid: TokenGrid
    key_length: Tensor | None = None
    scale: float | None = None

    def places(self, head: int) -> tuple[Tensor, Tensor]:
        """The places of query tokens [S_q] and of key tokens [S] in the order that a head is computed in."""
        key_permutation = self.plan.key_permutation or self.plan.permutation
        return _places(self.plan.permutation, head, self.query), _places(key_permutation, head, self.key)

    def block_map(self, row: int, head: int) -> Tensor:
        """Which key blocks each query block of a head sees in one row of the batch, [Q, K] bool."""
        return self._block_maps[row % len(self._block_maps), head % self._block_maps.shape[1]]

    def attention(self, row: int, head: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Dense attention of query tokens `rows` [R], and what of it is computed exactly: [R, S] float32 and bool."""
        mask, (place, key_place) = self.plan.mask, self.places(head)
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = self.query[row, head, rows].float() @ self.key[row, head].float().T * scale
        if self.key_length is not None:
            scores[:, int(self.key_length[row]) :] = -torch.inf
        seen = self.block_map(row, head)[place[rows] // mask.query_block_size]  # [R, K]
        return scores.softmax(-1), seen[:, key_place // mask.key_block_size]

    @functools.cached_property
    def _block_maps(self) -> Tensor:
        return self.plan.mask.visible()


def measure(call: Attended) -> tuple[HeadMeasure, ...]:
    """The measures of every head, over all rows of the batch."""
    batch, heads = call.query.shape[:2]
    plan = call.plan
    rows = sample_rows(call.grid, SAMPLED_ROWS).to(call.query.device)
    density = plan.mask.density.expand(heads).tolist()
    classes = [UNCLASSED] * heads
    if plan.classes is not None:
        classes = [HeadClass(number).name.lower() for number in plan.classes.tolist()]
    tail = [False] * heads if plan.tail is None else plan.tail.any(0).expand(heads).tolist()
    skipped = [False] * heads if plan.skipped is None else plan.skipped.tolist()
    measures = []
    for head in range(heads):
        recalls, wrong, size = [], 0.0, 0.0
        for row in range(batch):
            weights, exactly = call.attention(row, head, rows)
            recalls.append(float((weights * exactly).sum(-1).mean()))
            exact = weights @ call.value[row, head].float()  # [R, D]
            wrong += float((call.output[row, head, rows].float() - exact).square().sum())
            size += float(exact.square().sum())
        recall = 0.0 if skipped[head] else sum(recalls) / batch
        error = (wrong / size) ** 0.5 if size else 0.0
        measures.append(
            HeadMeasure(
                classes[head], density[head], recall, error, tail[head], skipped[head], *block_incoherence(call, head)
            )
        )
    return tuple(measures)


def block_incoherence(call: Attended, head: int) -> tuple[float, float]:
    """`incoherence` of what a head quantizes, in the tokens' own order and in the plan's; over all rows of the batch.

    The mean of that of queries, in query blocks, and of keys without their mean, in key blocks: both are rounded, and
    the roundings of both are in every score. Tokens beyond a key length count in neither. Queries among them do share
    the scale of the one block where they begin, but the same block in any order, since they stay last.
    """
    mask, permutations = call.plan.mask, (call.plan.permutation, call.plan.key_permutation or call.plan.permutation)
    query, key = call.query[:, [head]], call.key[:, [head]]  # [B, 1, S_q, D], [B, 1, S, D]
    smooth = key.float() - key_mean(key, call.key_length)
    sizes = (mask.query_block_size, mask.key_block_size)
    own_order = plan_order = 0.0
    for x, block_size, permutation, place in zip((query, smooth), sizes, permutations, call.places(head)):
        own = in_order = float(incoherence(x, block_size, call.key_length).mean())
        if permutation is not None:
            in_order = float(incoherence(x[:, :, place.argsort()], block_size, call.key_length).mean())
        own_order += own / 2
        plan_order += in_order / 2
    return own_order, plan_order


def _places(permutation: Permutation | None, head: int, x: Tensor) -> Tensor:
    if permutation is None:
        return torch.arange(x.shape[2], device=x.device)
    orders, choice = permutation.orders, permutation.choice
    return orders[head % len(orders) if choice is None else choice[head]].argsort()
