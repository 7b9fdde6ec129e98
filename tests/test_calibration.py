from __future__ import annotations

import pytest

from diffsparse.calibration import NAMED_ORDERS, named_order
from diffsparse.grid import TokenGrid


@pytest.mark.parametrize("name", NAMED_ORDERS)
def test_named_orders_are_arrangements(name):
    grid = TokenGrid(2, 3, 4, text_before=2, text_after=1)
    order = named_order(name, grid)
    assert sorted(order.tolist()) == list(range(grid.num_tokens))
    assert (order.tolist() == list(range(grid.num_tokens))) == (name == "own")
