"""Several prompts of different length in one call: each row comes out as it would alone."""

import pytest
import torch
from enabled import FULL, config, report_of, run
from tiny_models import TINY, generate, tiny_wan_pipeline

from diffsparse import Adaptive
from diffsparse.heads import HeadClass
from diffsparse.strategies.adaptive import Candidate

# One candidate and no tail to choose: no row has a say in the plan of another.
BAND = Adaptive(
    density=0.3,
    query_block_size=16,
    key_block_size=16,
    tail=False,
    candidates=(Candidate(HeadClass.SPATIAL, "frame-major", "band"),),
)
STATIC = config(BAND, strict=True)

# Prompts of other lengths in each row, by a mask or by leaving padding out. Framepack's call names places by tensors
# that have nothing to do with rows.
RAGGED = [name for name, tiny in TINY.items() if tiny.text_lengths and name != "framepack"]


def row_of(call, row):
    """One row of a call of two."""
    tensors = {name: value for name, value in call.items() if torch.is_tensor(value) and value.shape[:1] == (2,)}
    return call | {name: value[row : row + 1] for name, value in tensors.items()}


@pytest.mark.parametrize("name", RAGGED)
def test_a_row_of_a_batch_is_what_it_is_alone(name):
    tiny = TINY[name]
    model = tiny.make()
    call = tiny.call(model, tiny.grid, batch=2)
    alone = [row_of(call, row) for row in (0, 1)]
    stock = run(model, call)
    # As far as the same rows in a batch are off in the stock model; another order of sums in float32.
    tolerance = 4 * (stock - torch.cat([run(model, each) for each in alone])).abs().max().item()
    model.enable_sparse_attention(FULL)
    torch.testing.assert_close(run(model, call), stock, rtol=0, atol=tolerance)
    model.disable_sparse_attention()

    model.enable_sparse_attention(STATIC)
    sparse = run(model, call)
    torch.testing.assert_close(torch.cat([run(model, each) for each in alone]), sparse, rtol=0, atol=tolerance)
    assert not torch.allclose(sparse, stock, atol=10 * tolerance)
    report = report_of(model)
    assert report.density < 0.95
    # Three calls, one with two rows.
    assert report.sparse_calls == len(tiny.layers) * (tiny.calls_per_layer + 2)


def test_prompts_of_one_pipeline_call_come_out_as_they_would_alone():
    prompts = ["a cat", "two dogs run through deep snow"]
    pipeline = tiny_wan_pipeline()
    pipeline.enable_sparse_attention(STATIC)

    def noise(row):
        return torch.Generator().manual_seed(row)

    together = generate(pipeline, prompt=prompts, negative_prompt=["", "bad"], generator=[noise(0), noise(1)])
    assert (report_of(pipeline).sparse_calls, report_of(pipeline).dense_calls) == (3 * 2 * 2, 0)
    alone = [
        generate(pipeline, prompt=prompts[row], negative_prompt=["", "bad"][row], generator=noise(row))
        for row in (0, 1)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
