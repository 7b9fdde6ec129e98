"""Motif-Video's decoder layers attend to other tokens than its other layers."""

import torch
from enabled import FULL, Watched, config, report_of, run
from tiny_models import TINY

from diffsparse.grid import TokenGrid
from diffsparse.text_order import TextOrder


def test_decoder_layers_run_sparse_with_the_encoders_video_behind_their_own():
    tiny = TINY["motif_video"]
    model = tiny.make(num_decoder_layers=1)
    model.enable_sparse_attention(config(strategy := Watched(), strict=True))
    run(model, tiny.call(model, tiny.grid, batch=2))
    layer, decoder_layer = (TokenGrid(*tiny.grid, text_after=tokens) for tokens in (7, 3 * 7 * 5))
    assert [call.grid for call in strategy.calls] == [layer, layer, layer, decoder_layer]


def test_no_token_moves_in_decoder_layers_which_hide_none(monkeypatch):
    tiny = TINY["motif_video"]
    model = tiny.make(num_decoder_layers=1)
    call = tiny.call(model, tiny.grid, batch=2)
    call["encoder_attention_mask"][1] = torch.arange(7) != 2
    stock = run(model, call)
    orders, make = [], TextOrder.of
    monkeypatch.setattr(TextOrder, "of", lambda *args: (orders.append(args), make(*args))[1])
    model.enable_sparse_attention(FULL)
    torch.testing.assert_close(run(model, call), stock)
    assert report_of(model).sparse_calls == 4
    assert len(orders) == 3
