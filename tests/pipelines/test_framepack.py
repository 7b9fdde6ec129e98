"""A single row of Framepack brings no padded text, and no mask."""

import torch
from tiny_models import TINY

from diffsparse import Adaptive, SparseAttentionConfig
from diffsparse.grid import TokenGrid


def test_a_single_row_runs_sparse_with_as_much_text_as_it_has():
    grids = set()

    class Watched(Adaptive):
        def plan(self, query, key, value, call):
            grids.add((call.grid, call.key_length))
            return super().plan(query, key, value, call)

    tiny = TINY["framepack"]
    model = tiny.make()
    strategy = Watched(density=0.3, query_block_size=16, key_block_size=16)
    model.enable_sparse_attention(SparseAttentionConfig(strategy, dense_steps=0.0, min_tokens=0, strict=True))
    with torch.no_grad():
        model(**tiny.call(model, tiny.grid, batch=1))
    # Three image tokens, and four of seven text tokens.
    assert grids == {(TokenGrid(*tiny.grid, text_before=tiny.text_before, text_after=3 + 4), None)}
