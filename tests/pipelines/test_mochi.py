"""Mochi attends row by row of the batch, to as much text as each row has."""

import torch
from enabled import config, run
from tiny_models import TINY


def test_rows_of_one_length_are_planned_apart():
    # Two prompts of one length: nothing but the row tells their sequences apart.
    model = TINY["mochi"].make()
    call = TINY["mochi"].call(model, (3, 7, 5), batch=2)
    call["encoder_attention_mask"] = torch.arange(7) < torch.tensor([[4], [4]])
    outputs = []
    for each in (call, *({name: value[row : row + 1] for name, value in call.items()} for row in range(2))):
        model.enable_sparse_attention(config(strict=True))
        outputs.append(run(model, each))
        model.disable_sparse_attention()
    together, *alone = outputs
    torch.testing.assert_close(together, torch.cat(alone))
