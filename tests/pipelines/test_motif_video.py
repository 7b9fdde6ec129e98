"""Motif-Video's decoder layers attend to other tokens than its other layers."""

import torch
from tiny_models import TINY

from diffsparse import Adaptive, SparseAttentionConfig
from diffsparse.grid import TokenGrid


def test_decoder_layers_run_sparse_with_the_encoders_video_behind_their_own():
    grids = []

    class Watched(Adaptive):
        def plan(self, query, key, value, call):
            grids.append(call.grid)
            return super().plan(query, key, value, call)

    tiny = TINY["motif_video"]
    model = tiny.make(num_decoder_layers=1)
    strategy = Watched(density=0.3, query_block_size=16, key_block_size=16)
    model.enable_sparse_attention(SparseAttentionConfig(strategy, dense_steps=0.0, min_tokens=0, strict=True))
    with torch.no_grad():
        model(**tiny.call(model, tiny.grid, batch=2))
    assert grids == [*3 * [TokenGrid(*tiny.grid, text_after=7)], TokenGrid(*tiny.grid, text_after=3 * 7 * 5)]
