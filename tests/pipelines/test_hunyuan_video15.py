"""HunyuanVideo 1.5 makes a mask of all pairs of tokens in every layer; enabled, it does not."""

import pytest
import torch
from enabled import DENSE, SPARSE, run
from tiny_models import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from diffsparse.key_mask import KeyMask

TINY_MODEL = TINY["hunyuan_video15"]
TOKENS = 3 * 7 * 5 + TINY_MODEL.text_after


class Pairs(TorchDispatchMode):
    """Shapes of what operators give back that have one entry for each pair of tokens."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.shape[-2:] == (TOKENS, TOKENS):
            self.shapes.append(tuple(output.shape))
        return output


def pairs_made(model):
    with Pairs() as pairs:
        run(model, TINY_MODEL.call(model, TINY_MODEL.grid, batch=2))
    return pairs.shapes


@pytest.mark.parametrize("chosen", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_no_tensor_of_all_pairs_of_tokens_is_made(chosen):
    model = TINY_MODEL.make()
    assert (2, 1, TOKENS, TOKENS) in pairs_made(model)
    model.enable_sparse_attention(chosen)
    assert pairs_made(model) == []
    model.disable_sparse_attention()
    assert (2, 1, TOKENS, TOKENS) in pairs_made(model)


def test_a_key_mask_refuses_what_it_cannot_stand_for():
    with pytest.raises(TypeError, match=r"softmax.*all pairs"):
        torch.nn.functional.softmax(KeyMask(torch.ones(1, 3)), dim=-1)
