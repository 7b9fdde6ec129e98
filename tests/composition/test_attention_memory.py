"""What a layer of a real model allocates at 720p, counted on the meta device: sizes without memory."""

import weakref
from types import ModuleType

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsparse import Adaptive, SparseAttentionConfig, processors
from diffsparse.block_mask import BlockMask
from diffsparse.kernels import block_sparse
from diffsparse.permutation import Permutation
from diffsparse.plan import AttentionPlan
from diffsparse.steps import Step
from diffsparse.strategies.dense import Dense

# The grid of 720 x 1280 pixels and the text tokens, as each family's pipeline makes them.
MODELS = {
    "HunyuanVideo15Transformer3DModel": ((31, 45, 80), 1985),
    "HunyuanVideoTransformer3DModel": ((33, 45, 80), 256),
}


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that operators make on the meta device, and the most that is held at a time."""

    def __init__(self):
        super().__init__()
        self.largest = self.held = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.count(tensor.untyped_storage())
        return output

    def count(self, storage):
        address, size = storage._cdata, storage.nbytes()
        if address not in self.storages:
            self.storages.add(address)
            self.held += size
            self.largest, self.peak = max(self.largest, size), max(self.peak, self.held)
            weakref.finalize(storage, self.forget, address, size)

    def forget(self, address, size):
        self.storages.discard(address)
        self.held -= size


class Layer:
    """The first attention layer of a model, and a call of it."""

    def __init__(self, name):
        self.grid, self.text = MODELS[name]
        with torch.device("meta"):
            options = {"num_single_layers": 0} if name == "HunyuanVideoTransformer3DModel" else {}
            self.model = getattr(diffusers, name)(num_layers=1, num_refiner_layers=1, **options)
            self.model.eval().requires_grad_(False).to(torch.bfloat16)
            video = self.grid[0] * self.grid[1] * self.grid[2]
            config = self.model.config
            heads, dim = config.num_attention_heads, config.attention_head_dim
            # HunyuanVideo gives its layers the mask of keys, 1.5 that of its text.
            mask = (1, 1, 1, video + self.text) if options else (1, self.text)
            self.call = {
                "hidden_states": torch.empty(1, video, heads * dim, dtype=torch.bfloat16),
                "encoder_hidden_states": torch.empty(1, self.text, heads * dim, dtype=torch.bfloat16),
                "attention_mask": torch.empty(mask, dtype=torch.bool),
                "image_rotary_emb": (torch.empty(video, dim), torch.empty(video, dim)),
            }
        self.one_copy = 2 * (video + self.text) * heads * dim

    def enable(self, strategy):
        self.model.enable_sparse_attention(SparseAttentionConfig(strategy, dense_steps=0.0, min_tokens=0))
        session, _ = processors.find_layer(self.model.transformer_blocks[0].attn.processor._diffsparse_handle)
        session.begin(Step(0, 50, None, is_first_of_generation=True), (*self.grid, 0, self.text))
        return session.tallies[0]

    def allocations(self):
        with Allocations() as counted:
            self.model.transformer_blocks[0].attn(**self.call)
        return counted


@pytest.fixture
def attention_as_one_operator(monkeypatch):
    """The masks that torch's attention is given. What it allocates inside is no business of a processor."""
    masks = []

    def attention(query, key, value, mask=None, *args, attn_mask=None, **kwargs):
        masks.append(attn_mask if mask is None else mask)
        return torch.empty_like(query)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    # The function within our operator, which would be taken as a whole on the meta device.
    monkeypatch.setattr(processors, "_attend", processors._attend._init_fn)
    # No kernel runs there, so none can be found right.
    monkeypatch.setattr("diffsparse.session.why_none", lambda *call: None)
    yield masks
    # Or later tests of torch.compile would go on with what stands in here.
    torch._dynamo.reset()
    processors._sparse_class.cache_clear()


@pytest.mark.parametrize("name", MODELS)
def test_no_tensor_is_larger_than_query_key_value_and_output(name, attention_as_one_operator):
    layer = Layer(name)
    stock = layer.allocations()
    tally = layer.enable(Dense())
    dense = layer.allocations()
    assert sum(tally.dense_reasons.values()) == 1
    layer.model.disable_sparse_attention()
    tally = layer.enable(Adaptive())
    sparse = layer.allocations()
    assert tally.sparse_calls == 1

    bound = 4 * layer.one_copy
    assert max(dense.largest, sparse.largest) <= bound
    # Planning and attending take no more than the norms before them did.
    assert sparse.peak <= dense.peak
    stock_mask, dense_mask = attention_as_one_operator
    assert dense_mask.shape[2] == 1
    assert (stock.largest > bound) == (stock_mask.shape[2] > 1) == (name == "HunyuanVideo15Transformer3DModel")


def test_tokens_in_another_order_go_before_the_output_comes_back(monkeypatch):
    # What happens within our operator, but for the kernel.
    kernel = ModuleType("kernel")
    kernel.attend = lambda query, *inputs, **options: (torch.empty_like(query), query.new_empty(0))
    monkeypatch.setattr(block_sparse, "pick_backend", lambda *choice: kernel)
    monkeypatch.setattr(block_sparse, "_operator", block_sparse._operator._init_fn)
    # Beside the inputs, which count too: three of them and the output, or the output in both orders, never more.
    query, key, value = (torch.empty(1, 8, 4096, 64, device="meta") for _ in range(3))
    visible = torch.ones(1, 8, 32, 32, dtype=torch.bool, device="meta")
    order = torch.arange(4096, device="meta").expand(8, -1)
    plan = AttentionPlan(Permutation(order), BlockMask.from_visible(visible, 4096, 128, 128))
    with Allocations() as counted:
        output = plan.attend(query, key, value)
    assert output.shape == query.shape
    copies = counted.peak / (query.numel() * query.element_size())
    assert 3 + 4 <= copies < 3 + 4.1
