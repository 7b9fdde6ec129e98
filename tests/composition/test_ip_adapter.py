"""An IP-Adapter on Flux, whose processors carry weights of their own: its layers stay dense, the others run sparse."""

import pytest
import torch
from enabled import DENSE, FULL, SPARSE, config, report_of
from tiny_models import TEXT_CHANNELS
from tiny_pipelines import generate_image, tiny_flux_pipeline

from diffsparse import DenseFallback

STEPS, DOUBLE, SINGLE = 3, 2, 2
EMBEDDING = 12


def adapter(transformer):
    """The state dict of an IP-Adapter with random weights."""
    random = torch.Generator().manual_seed(3)

    def weight(*sizes):
        return torch.randn(*sizes, generator=random)

    inner = transformer.inner_dim
    projections = {
        f"{block}.{name}_ip.{part}": weight(inner, TEXT_CHANNELS) if part == "weight" else weight(inner)
        for block in range(DOUBLE)
        for name in ("to_k", "to_v")
        for part in ("weight", "bias")
    }
    tokens = 4 * TEXT_CHANNELS
    image = {"proj.weight": weight(tokens, EMBEDDING), "proj.bias": weight(tokens)}
    image |= {"norm.weight": weight(TEXT_CHANNELS), "norm.bias": weight(TEXT_CHANNELS)}
    return {"image_proj": image, "ip_adapter": projections}


def load(pipeline):
    pipeline.transformer._load_ip_adapter_weights([adapter(pipeline.transformer)], low_cpu_mem_usage=False)


def generate(pipeline, with_image=True):
    names = ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds") if with_image else ()
    return generate_image(pipeline, steps=STEPS, **{name: [torch.ones(1, 1, EMBEDDING)] for name in names})


@pytest.fixture
def pipeline():
    return tiny_flux_pipeline()


def test_layers_with_the_adapter_stay_dense_and_the_others_run_sparse(pipeline):
    load(pipeline)
    stock = generate(pipeline)
    for chosen in (DENSE, FULL):
        pipeline.enable_sparse_attention(chosen)
        torch.testing.assert_close(generate(pipeline), stock)
        assert report_of(pipeline).unreached_layers == {"its processor cannot be made sparse": DOUBLE}
        counted = report_of(pipeline).sparse_calls if chosen is FULL else report_of(pipeline).dense_calls
        assert counted == STEPS * SINGLE
        pipeline.disable_sparse_attention()
    assert torch.equal(generate(pipeline), stock)


def test_an_adapter_loaded_after_enabling_works_and_the_report_says_to_enable_again(pipeline):
    pipeline.enable_sparse_attention(FULL)
    generate(pipeline, with_image=False)
    load(pipeline)
    with_adapter = tiny_flux_pipeline()
    load(with_adapter)
    stock = generate(with_adapter)
    assert torch.equal(generate(pipeline), stock)
    report = report_of(pipeline)
    assert report.unreached_layers == {"its processor was replaced after enabling": DOUBLE + SINGLE}
    assert report.sparse_calls == STEPS * (DOUBLE + SINGLE)
    pipeline.disable_sparse_attention()
    assert torch.equal(generate(pipeline), stock)
    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(pipeline), stock)
    assert report_of(pipeline).sparse_calls == STEPS * SINGLE


def test_unloading_it_leaves_a_model_that_runs_sparse_in_every_layer_once_enabled_again(pipeline):
    pipeline.register_modules(image_encoder=None, feature_extractor=None)
    stock = generate(pipeline, with_image=False)
    load(pipeline)
    pipeline.enable_sparse_attention(SPARSE)
    generate(pipeline)
    pipeline.unload_ip_adapter()
    generate(pipeline, with_image=False)
    pipeline.disable_sparse_attention()
    assert torch.equal(generate(pipeline, with_image=False), stock)
    pipeline.enable_sparse_attention(config(strict=True))
    generate(pipeline, with_image=False)
    assert report_of(pipeline).sparse_calls == STEPS * (DOUBLE + SINGLE)


def test_strict_refuses_layers_that_the_adapter_keeps_dense(pipeline):
    load(pipeline)
    pipeline.enable_sparse_attention(config(strict=True))
    with pytest.raises(DenseFallback, match=r"transformer_blocks\.0\.attn.*cannot be made sparse"):
        generate(pipeline)
