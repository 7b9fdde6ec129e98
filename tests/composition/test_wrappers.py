"""Modules that stand in for the transformer, or for its attention, and pass calls on: of peft, DDP, FSDP and others."""

import sys

import pytest
import torch
from enabled import FULL, SPARSE, report_of, run
from tiny_models import TINY, generate, tiny_wan_pipeline
from torch import nn

import diffsparse

CALLS = 3 * 2 * 2


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    if sys.platform != "linux":
        pytest.skip("gloo is tried on Linux")
    torch.distributed.init_process_group("cpu:gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def peft_model(transformer):
    """As training scripts leave it in the pipeline."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        return peft.get_peft_model(transformer, adapter)


def compiled_peft_model(transformer):
    return torch.compile(peft_model(transformer), backend="eager")


def fully_sharded(transformer):
    return torch.distributed.fsdp.FullyShardedDataParallel(
        transformer, device_id=torch.device("cpu"), use_orig_params=True
    )


def sharded_in_place(transformer):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for part in (*transformer.blocks, transformer):
        torch.distributed.fsdp.fully_shard(part, mesh=mesh)
    return transformer


def prepared_by_accelerate(transformer):
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(transformer)


WRAPPERS = (peft_model, compiled_peft_model, fully_sharded, sharded_in_place, prepared_by_accelerate)


@pytest.mark.parametrize("enabled_first", [True, False])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_transformer_of_a_pipeline_runs_sparse_and_is_disabled(wrap, enabled_first, one_rank, dynamo):
    stock = tiny_wan_pipeline()
    stock.transformer = wrap(stock.transformer)
    expected = generate(stock)
    pipeline = tiny_wan_pipeline()
    if enabled_first:
        pipeline.enable_sparse_attention(FULL)
    pipeline.transformer = wrap(pipeline.transformer)
    if not enabled_first:
        pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(pipeline), expected)
    assert (report_of(pipeline).name, report_of(pipeline).sparse_calls) == ("transformer", CALLS)
    assert report_of(pipeline).dense_calls == 0
    with pytest.raises(ValueError, match="already enabled on `transformer`"):
        pipeline.enable_sparse_attention(SPARSE)
    pipeline.disable_sparse_attention()
    assert torch.equal(generate(pipeline), expected)
    pipeline.enable_sparse_attention(SPARSE)
    assert not torch.allclose(generate(pipeline), expected)


def test_a_transformer_of_ddp_runs_sparse(one_rank):
    # Pipelines take none: it has no config.
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    wrapped = nn.parallel.DistributedDataParallel(model.requires_grad_(True))
    stock = run(wrapped, call)
    diffsparse.enable_sparse_attention(wrapped, FULL)
    torch.testing.assert_close(run(wrapped, call), stock)
    assert (report_of(model).sparse_calls, report_of(wrapped).dense_calls) == (3, 0)


class WithAnotherPart(nn.Module):
    """Shows the attributes of a transformer as its own, as wrappers do, and has more in it."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer, self.other = transformer, nn.Linear(1, 1)

    def __getattr__(self, name):
        return self._modules[name] if name in self._modules else getattr(self._modules["transformer"], name)

    def forward(self, *args, **kwargs):
        return self.transformer(*args, **kwargs)


def test_a_wrapper_that_is_not_looked_into_stays_dense_and_its_pipeline_runs():
    pipeline = tiny_wan_pipeline()
    stock = generate(pipeline)
    pipeline.transformer = WithAnotherPart(pipeline.transformer)
    pipeline.enable_sparse_attention(SPARSE)
    assert torch.equal(generate(pipeline), stock)
    assert report_of(pipeline).family is None


@pytest.mark.parametrize("enabled_first", [True, False])
@pytest.mark.parametrize("wrapper", ["checkpointing", "FSDP"])
def test_attention_that_is_wrapped_by_itself_runs_sparse(wrapper, enabled_first, one_rank):
    """It shows the processor of the module inside as its own, and keeps one that is set."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    stock = run(model, call)
    own = [block.attn1 for block in model.blocks]
    if enabled_first:
        model.enable_sparse_attention(SPARSE)
    for block in model.blocks:
        block.attn1 = (checkpoint_wrapper if wrapper == "checkpointing" else fully_sharded)(block.attn1)
    for _ in range(2):
        if not model.is_sparse_attention_enabled:
            model.enable_sparse_attention(SPARSE)
        assert not torch.allclose(run(model, call), stock)
        assert report_of(model).sparse_calls == 3
        model.disable_sparse_attention()
        assert torch.equal(run(model, call), stock)
        assert {type(attention.processor).__name__ for attention in own} == {"WanAttnProcessor"}


def test_blocks_that_were_taken_away_are_no_obstacle_to_disabling():
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    model.enable_sparse_attention(SPARSE)
    del model.blocks[1]
    run(model, call)
    model.disable_sparse_attention()
    assert not model.is_sparse_attention_enabled
    assert {type(block.attn1.processor).__name__ for block in model.blocks} == {"WanAttnProcessor"}
