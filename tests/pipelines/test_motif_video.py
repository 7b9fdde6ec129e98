"""Motif-Video's decoder layers attend to other tokens than its other layers."""

from enabled import Watched, config, run
from tiny_models import TINY

from diffsparse.grid import TokenGrid


def test_decoder_layers_run_sparse_with_the_encoders_video_behind_their_own():
    tiny = TINY["motif_video"]
    model = tiny.make(num_decoder_layers=1)
    model.enable_sparse_attention(config(strategy := Watched(), strict=True))
    run(model, tiny.call(model, tiny.grid, batch=2))
    layer, decoder_layer = (TokenGrid(*tiny.grid, text_after=tokens) for tokens in (7, 3 * 7 * 5))
    assert [call.grid for call in strategy.calls] == [layer, layer, layer, decoder_layer]
