"""Weights quantized by bitsandbytes, as diffusers loads them: sparse attention gets what their layers make."""

import pytest
import torch
from diffusers import BitsAndBytesConfig, WanTransformer3DModel
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from enabled import FULL, SPARSE, report_of
from tiny_models import TINY, generate, tiny_wan_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

bitsandbytes = pytest.importorskip("bitsandbytes")

# Layers with fewer inputs than one block of 4-bit weights has.
SMALL = ["condition_embedder", "attn2", "proj_out"]
CONFIGS = {
    "8 bit": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SMALL),
    "4 bit": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=SMALL,
    ),
}


def wide_wan_pipeline():
    """A tiny pipeline whose layers have as many inputs as a block of 4-bit weights."""
    pipeline = tiny_wan_pipeline()
    pipeline.transformer = TINY["wan"].make(in_channels=16, out_channels=16, num_layers=2, ffn_dim=64)
    return pipeline


@pytest.fixture(params=CONFIGS)
def load(request, tmp_path, monkeypatch):
    """Makes a Wan pipeline with quantized weights."""
    # diffusers refuses to begin without a GPU, although bitsandbytes computes on a CPU too.
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    wide_wan_pipeline().transformer.save_pretrained(tmp_path)

    def make():
        pipeline = wide_wan_pipeline()
        pipeline.transformer = WanTransformer3DModel.from_pretrained(
            tmp_path, quantization_config=CONFIGS[request.param], dtype=torch.float32, device_map={"": "cpu"}
        )
        return pipeline

    return make


def test_attention_is_as_exact_as_stock_and_runs_sparse(load):
    pipeline = load()
    assert type(pipeline.transformer.blocks[0].attn1.to_q) is not torch.nn.Linear
    stock = generate(pipeline)
    assert (stock - generate(wide_wan_pipeline())).abs().max() > 1e-3
    # Activations of 8 bits fall to the other side of a half where sums are taken in another order.
    with sdpa_kernel(SDPBackend.MATH):
        tolerance = 4 * (generate(pipeline) - stock).abs().max().item()

    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(pipeline), stock, rtol=0, atol=tolerance)
    assert (report_of(pipeline).sparse_calls, report_of(pipeline).dense_calls) == (3 * 2 * 2, 0)
    pipeline.disable_sparse_attention()
    assert torch.equal(generate(pipeline), stock)
    pipeline.enable_sparse_attention(SPARSE)
    assert (generate(pipeline) - stock).abs().max() > tolerance
