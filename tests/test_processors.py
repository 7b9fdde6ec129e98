"""What stands in for the attention functions while a layer runs; whole models are in tests/enable."""

import pytest
import torch
import torch.nn.functional as F
from enabled import SPARSE, report_of
from tiny_models import TINY
from torch._subclasses.fake_tensor import FakeTensorMode

from diffsparse import processors


@pytest.mark.parametrize("options", [{"is_causal": True}, {"enable_gqa": True}, {"dropout_p": 0.5}], ids=str)
@pytest.mark.parametrize("way", ["torch", "diffusers"])
def test_what_no_session_can_do_is_the_stock_function(options, way, monkeypatch):
    model = TINY["wan"].make()
    model.enable_sparse_attention(SPARSE)
    handle = model.get_submodule(TINY["wan"].layers[0]).processor._diffsparse_handle
    monkeypatch.setattr(processors._CURRENT, "handle", handle)
    key_heads = 1 if "enable_gqa" in options else 2
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 30, 8, generator=generator) for heads in (2, key_heads, key_heads))
    outputs = []
    for ours in (True, False):
        torch.manual_seed(0)
        if way == "torch" or not ours:
            function = processors.scaled_dot_product_attention if ours else F.scaled_dot_product_attention
            outputs.append(function(query, key, value, **options))
        else:
            tokens_first = (x.transpose(1, 2) for x in (query, key, value))
            outputs.append(processors.dispatch_attention_fn(*tokens_first, **options).transpose(1, 2))
    assert torch.equal(*outputs)
    assert report_of(model).dense_reasons == {"causal attention, grouped queries or dropout": 1}


@pytest.mark.parametrize("way", ["torch", "diffusers"])
def test_compiled_code_is_told_the_dtype_of_autocast(way, monkeypatch):
    model = TINY["wan"].make()
    model.enable_sparse_attention(SPARSE)
    handle = model.get_submodule(TINY["wan"].layers[0]).processor._diffsparse_handle
    monkeypatch.setattr(processors._CURRENT, "handle", handle)
    names = {"torch": "scaled_dot_product_attention", "diffusers": "dispatch_attention_fn"}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype=torch.bfloat16):
        query = torch.randn(1, 2, 30, 8)
        assert getattr(processors, names[way])(query, query, query).dtype == torch.bfloat16
