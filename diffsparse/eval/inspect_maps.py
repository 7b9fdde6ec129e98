"""Attention maps of one head, pooled to a few cells a side, in the tokens' own order and in that of the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from diffsparse.calibration import OWN_ORDER, name_of_order
from diffsparse.eval.inspect_measures import Attended
from diffsparse.grid import TokenGrid

MOST_CELLS = 320
"""Cells a side."""
ROWS_A_CELL = 32
"""Query rows that are computed for each row of cells."""
MAX_SCORES = 1 << 21
"""Scores held at a time, unless a single query row has more."""
NEXT_TO_NOTHING = 1e-20
"""Added to each weight, so that where float32 has none left there is still a share that is kept: that of the pairs."""
OTHER_ORDER = "other"

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Attention of queries (down) to keys (across).

    Attributes:
        attention: [C_q, C], mean weight of a cell's pairs, as a multiple of what attention spread evenly over all keys
            would give. There are fewer cells of queries where the first tokens alone have some.
        kept: [C_q, C], share of that attention whose pairs are computed exactly.
        cell: tokens a cell and side.
        order: "own", the axes by which the tokens are sorted, outermost first, or "other".
    """

    attention: Array
    kept: Array
    cell: int
    order: str


@dataclass(frozen=True, eq=False)
class MapPair:
    """A head's map before and after its tokens are put in order."""

    before: AttentionMap
    after: AttentionMap
    grid: TokenGrid


def attention_maps(call: Attended, head: int) -> MapPair:
    """The maps of a head in the first row of the batch, of about ROWS_A_CELL query rows for each row of cells."""
    num_queries, num_tokens = call.query.shape[2], call.grid.num_tokens
    mask = call.plan.mask
    cell = cell_size(num_tokens, mask.query_block_size, mask.key_block_size)
    place, key_place = call.places(head)
    cells = [-(-num // cell) for num in (num_queries, num_tokens)]
    own = torch.arange(num_tokens, device=place.device)
    # What has no queries is text, which stays last in every order.
    order = torch.cat([place.argsort(), own[num_queries:]])
    ways = ("before", own, None), ("after", place, key_place.argsort())
    sums = {name: place.new_zeros(2, *cells, dtype=torch.float32) for name in ("before", "after")}
    counts = {name: place.new_zeros(cells[0], dtype=torch.float32) for name in sums}
    rows_of_cells = _sampled(cell, own[:num_queries], order[:num_queries])
    for rows in rows_of_cells.split(max(1, MAX_SCORES // num_tokens)):
        weights, exactly = call.attention(0, head, rows)
        weights += NEXT_TO_NOTHING
        parts = torch.stack([weights, weights * exactly])  # [2, R, S]
        for name, places, keys in ways:
            ordered = parts if keys is None else parts.index_select(-1, keys)
            sums[name].index_add_(1, places[rows] // cell, _pooled(ordered, cell))
            counts[name].index_add_(0, places[rows] // cell, torch.ones_like(rows, dtype=torch.float32))
    sizes = _pooled(torch.ones(1, num_tokens), cell)[0].numpy()  # [C]
    names = OWN_ORDER, name_of_order(order.cpu(), call.grid) or OTHER_ORDER
    before, after = (_finished(sums[key], counts[key], sizes, num_tokens, cell, name) for key, name in zip(sums, names))
    return MapPair(before, after, call.grid)


def cell_size(num_tokens: int, query_block_size: int, key_block_size: int) -> int:
    """Tokens a cell: as few as MOST_CELLS allow, such that no edge of a block lies within a cell where that can be."""
    least = -(-num_tokens // MOST_CELLS)
    smaller, larger = sorted((query_block_size, key_block_size))
    if larger % smaller == 0:
        fitting = next((size for size in range(least, smaller + 1) if smaller % size == 0), None)
        return fitting or -(-least // larger) * larger
    return least


def _sampled(cell: int, *orders: Tensor) -> Tensor:
    """Query tokens [R]: of each cell of each order [S] at least one, and all where a cell has few."""
    most = max(1, cell // ROWS_A_CELL)
    step = next(size for size in range(most, 0, -1) if cell % size == 0)
    starts = torch.arange(0, len(orders[0]), step)
    lengths = (len(orders[0]) - starts).clamp_max(step)
    # At random within each stretch: a regular step would fall on the same frames again and again.
    places = torch.rand(len(starts), generator=torch.Generator().manual_seed(0)) * lengths
    chosen = (starts + places.long()).to(orders[0].device)
    return torch.cat([order[chosen] for order in orders]).unique()


def _pooled(x: Tensor, cell: int) -> Tensor:
    """The sums over each cell of x [..., S]: [..., C]."""
    return F.pad(x, (0, -x.shape[-1] % cell)).unflatten(-1, (-1, cell)).sum(-1)


def _finished(sums: Tensor, counts: Tensor, sizes: Array, num_tokens: int, cell: int, order: str) -> AttentionMap:
    mass, kept_mass = (sums / counts.clamp_min(1)[:, None]).cpu().numpy()
    attention, kept = mass / sizes * num_tokens, kept_mass / np.maximum(mass, NEXT_TO_NOTHING)
    return AttentionMap(attention, np.clip(kept, 0, 1), cell, order)
