"""Mochi attends row by row of the batch, to as much text as each row has."""

import torch
from tiny_models import TINY

from diffsparse import Adaptive, SparseAttentionConfig


def test_rows_of_one_length_are_planned_apart():
    # Two prompts of one length: nothing but the row tells their sequences apart.
    model = TINY["mochi"].make()
    call = TINY["mochi"].call(model, (3, 7, 5), batch=2)
    call["encoder_attention_mask"] = torch.arange(7) < torch.tensor([[4], [4]])
    strategy = Adaptive(density=0.3, query_block_size=16, key_block_size=16)

    def run(call):
        model.enable_sparse_attention(SparseAttentionConfig(strategy, dense_steps=0.0, min_tokens=0, strict=True))
        with torch.no_grad():
            output = model(**call, return_dict=False)[0]
        model.disable_sparse_attention()
        return output

    alone = [run({name: value[row : row + 1] for name, value in call.items()}) for row in range(2)]
    torch.testing.assert_close(run(call), torch.cat(alone))
