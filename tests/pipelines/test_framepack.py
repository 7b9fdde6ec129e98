"""A single row of Framepack brings no padded text, and no mask."""

from enabled import Watched, config, run
from tiny_models import TINY

from diffsparse.grid import TokenGrid


def test_a_single_row_runs_sparse_with_as_much_text_as_it_has():
    tiny = TINY["framepack"]
    model = tiny.make()
    model.enable_sparse_attention(config(strategy := Watched(), strict=True))
    run(model, tiny.call(model, tiny.grid, batch=1))
    # Three image tokens, and four of seven text tokens.
    grid = TokenGrid(*tiny.grid, text_before=tiny.text_before, text_after=3 + 4)
    assert {(call.grid, call.key_length) for call in strategy.calls} == {(grid, None)}
