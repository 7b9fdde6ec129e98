"""What moves or shrinks weights while the pipeline runs: offloading and layerwise casting."""

import accelerate
import pytest
import torch
from enabled import DENSE, FULL, SPARSE, report_of
from tiny_models import generate, tiny_wan_pipeline


def sequential_offload(pipeline):
    # What `enable_sequential_cpu_offload` does to each of its models. There is no accelerator to load onto; the hooks
    # are the same.
    accelerate.cpu_offload(pipeline.transformer, torch.device("cpu"))


def group_offload(offload_type):
    def apply(pipeline):
        pipeline.transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=offload_type,
            num_blocks_per_group=1 if offload_type == "block_level" else None,
        )

    return apply


def layerwise_casting(pipeline):
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


WAYS = {
    "sequential": sequential_offload,
    "group, by block": group_offload("block_level"),
    "group, by leaf": group_offload("leaf_level"),
    "layerwise casting": layerwise_casting,
}


@pytest.fixture(params=WAYS)
def change(request):
    return WAYS[request.param]


def test_sparse_and_dense_attention_are_what_they_are_without_sparse_attention(change):
    pipeline = tiny_wan_pipeline()
    change(pipeline)
    stock = generate(pipeline)
    pipeline.enable_sparse_attention(DENSE)
    assert torch.equal(generate(pipeline), stock)
    pipeline.disable_sparse_attention()
    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(pipeline), stock)
    assert report_of(pipeline).sparse_calls == 3 * 2 * 2
    pipeline.disable_sparse_attention()
    assert torch.equal(generate(pipeline), stock)


def test_the_order_of_enabling_does_not_matter(change):
    first, last = tiny_wan_pipeline(), tiny_wan_pipeline()
    first.enable_sparse_attention(SPARSE)
    change(first)
    change(last)
    last.enable_sparse_attention(SPARSE)
    for calls in (1, 2):
        assert torch.equal(generate(first), generate(last))
        for pipeline in (first, last):
            assert (report_of(pipeline).sparse_calls, report_of(pipeline).dense_calls) == (calls * 3 * 2 * 2, 0)
