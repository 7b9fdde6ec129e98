"""What changes the layers around attention: fused projections, LoRA through peft, quantized weights."""

import copy

import pytest
import torch
from enabled import FULL, SPARSE, report_of
from tiny_models import generate, tiny_wan_pipeline

CALLS = 3 * 2 * 2


def fused_projections(transformer):
    transformer.fuse_qkv_projections()


def torchao_int8(transformer):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(transformer, quantization.Int8WeightOnlyConfig())


def gguf_q8(transformer):
    gguf = pytest.importorskip("gguf")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    for block in transformer.blocks:
        for name in ("to_q", "to_k", "to_v"):
            stock = getattr(block.attn1, name)
            linear = utils.GGUFLinear(stock.in_features, stock.out_features, bias=True, compute_dtype=torch.float32)
            kind = gguf.GGMLQuantizationType.Q8_0
            quantized = torch.from_numpy(gguf.quants.quantize(stock.weight.detach().numpy(), kind))
            linear.weight = utils.GGUFParameter(quantized, quant_type=kind)
            linear.bias = stock.bias
            setattr(block.attn1, name, linear.requires_grad_(False))


CHANGES = (fused_projections, torchao_int8, gguf_q8)


@pytest.mark.parametrize("change", CHANGES)
def test_attention_is_as_exact_as_stock_and_runs_sparse_in_either_order(change):
    pipeline = tiny_wan_pipeline()
    original = generate(pipeline)
    change(pipeline.transformer)
    stock = generate(pipeline)
    if change is fused_projections:
        assert all(block.attn1.fused_projections for block in pipeline.transformer.blocks)
    else:
        assert (stock - original).abs().max() > 1e-4
    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(pipeline), stock)
    assert (report_of(pipeline).sparse_calls, report_of(pipeline).dense_calls) == (CALLS, 0)
    pipeline.disable_sparse_attention()
    assert torch.equal(generate(pipeline), stock)

    pipeline.enable_sparse_attention(SPARSE)
    first = tiny_wan_pipeline()
    first.enable_sparse_attention(SPARSE)
    change(first.transformer)
    assert torch.equal(generate(first), generate(pipeline))
    assert report_of(first).sparse_calls == CALLS


@pytest.fixture
def with_adapters():
    """A pipeline with two LoRA adapters, of which none is active."""
    peft = pytest.importorskip("peft")
    pipeline = tiny_wan_pipeline()
    for seed, name in enumerate(("first", "second")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
            pipeline.transformer.add_adapter(config, adapter_name=name)
    pipeline.disable_lora()
    return pipeline


def stages(pipeline):
    """What people do with adapters, one after the other; the pipeline after each."""
    yield "none"
    pipeline.enable_lora()
    for name in ("first", "second"):
        pipeline.set_adapters(name)
        yield name
    pipeline.set_adapters(["first", "second"], adapter_weights=[0.5, 0.7])
    yield "both"
    pipeline.fuse_lora()
    yield "fused"
    pipeline.unfuse_lora()
    yield "unfused"
    pipeline.delete_adapters("first")
    yield "one deleted"
    pipeline.unload_lora_weights()
    yield "unloaded"


def test_adapters_are_loaded_switched_fused_and_unloaded_while_enabled(with_adapters):
    pipeline = with_adapters
    twin = copy.deepcopy(pipeline.transformer)
    stock = {stage: generate(pipeline) for stage in stages(pipeline)}
    for earlier, later in zip(["none", "first", "second"], ["first", "second", "both"]):
        assert not torch.allclose(stock[earlier], stock[later], atol=1e-3)

    pipeline.transformer = twin
    pipeline.enable_sparse_attention(FULL)
    for calls, stage in enumerate(stages(pipeline), 1):
        torch.testing.assert_close(generate(pipeline), stock[stage])
        assert (report_of(pipeline).sparse_calls, report_of(pipeline).dense_calls) == (calls * CALLS, 0)
        assert report_of(pipeline).unreached_layers == {}
    pipeline.disable_sparse_attention()
    torch.testing.assert_close(generate(pipeline), generate(tiny_wan_pipeline()))


def test_an_adapter_from_a_state_dict_takes_effect_while_enabled(with_adapters):
    peft = pytest.importorskip("peft")
    weights = peft.get_peft_model_state_dict(with_adapters.transformer, adapter_name="second")
    weights = {f"transformer.{name}": value for name, value in weights.items()}
    stock, enabled = tiny_wan_pipeline(), tiny_wan_pipeline()
    stock.load_lora_weights(weights)
    enabled.enable_sparse_attention(FULL)
    before = generate(enabled)
    enabled.load_lora_weights(weights)
    torch.testing.assert_close(generate(enabled), generate(stock))
    assert not torch.allclose(generate(enabled), before, atol=1e-3)
