"""Text that a mask hides before the grid, or before its own end: as if it were not there."""

import pytest
import torch
from composition.test_batches import STATIC, row_of
from enabled import FULL, report_of
from enabled import run as run_whole
from tiny.ideogram4 import call_with_text
from tiny.model import CHANNELS, TEXT_TOKENS, Random
from tiny_models import TINY

from diffsparse.grid import TokenGrid
from diffsparse.text_order import TextOrder


def qwen_image(mask):
    return {"encoder_hidden_states_mask": mask}


def bria_fibo(mask):
    with_image = torch.cat([mask, torch.ones(2, 35, dtype=torch.bool)], dim=1)
    return {"joint_attention_kwargs": {"attention_mask": with_image[:, None, None]}}


def joyimage_edit_plus(mask):
    return {"encoder_hidden_states_mask": mask, "hidden_states": Random(0)(2, 35 + 12, CHANNELS, 1, 2, 2)}


def krea2(mask):
    return {"encoder_attention_mask": mask}


def ideogram4(mask):
    visible = torch.cat([mask, torch.ones(2, 35, dtype=torch.bool)], dim=1)
    call = call_with_text(None, TINY["ideogram4"].grid, batch=2)
    return call | {
        "segment_ids": torch.where(visible, call["segment_ids"], -1),
        "indicator": torch.where(visible, call["indicator"], 0),
    }


def prx(mask):
    return {"attention_mask": mask}


def motif_video(mask):
    return {"encoder_attention_mask": mask}


MASKED = {
    each.__name__: each for each in (qwen_image, bria_fibo, joyimage_edit_plus, ideogram4, krea2, prx, motif_video)
}
MASKED["nucleus_image"] = qwen_image
HIDDEN = {"tail": [5, 6], "head": [0, 1], "within": [2, 4]}


def masked_call(name, hidden):
    """A model, and a call of two rows of which the second has text that is hidden."""
    tiny = TINY[name]
    model = tiny.make()
    mask = torch.ones(2, TEXT_TOKENS, dtype=torch.bool)
    mask[1, hidden] = False
    call = tiny.call(model, tiny.grid, batch=2)
    return model, call | MASKED[name](mask)


def run(model, call):
    """The image that the model makes: Ideogram 4 has an output for its text as well, which its pipeline throws away."""
    output = run_whole(model, call)
    return output[:, -35:] if "indicator" in call else output


def assert_all_sparse(model, name, calls):
    report = report_of(model)
    assert (report.sparse_calls, report.dense_calls) == (calls * len(TINY[name].layers), 0)


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("name", MASKED)
def test_it_is_as_exact_as_stock(name, hidden):
    model, call = masked_call(name, hidden)
    stock = run(model, call)
    model.enable_sparse_attention(FULL)
    torch.testing.assert_close(run(model, call), stock)
    assert_all_sparse(model, name, 1)


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("name", MASKED)
def test_what_is_hidden_changes_nothing(name, hidden):
    model, call = masked_call(name, hidden)
    stock = run(model, call)
    model.enable_sparse_attention(STATIC)
    sparse = run(model, call)
    for each in (call["encoder_hidden_states"], *call.get("text_encoder_layers", ())):
        each[1, hidden] += 10
    torch.testing.assert_close(run(model, call), sparse)
    assert not torch.allclose(sparse, stock, atol=1e-4)
    assert_all_sparse(model, name, 2)
    # What is not hidden does.
    for each in (call["encoder_hidden_states"], *call.get("text_encoder_layers", ())):
        each[1, 3] += 10
    assert not torch.allclose(run(model, call)[1], sparse[1], atol=1e-4)


@pytest.mark.parametrize("name", ["qwen_image", "bria_fibo", "krea2", "nucleus_image", "prx"])
def test_a_row_with_a_hidden_tail_is_what_it_is_alone_and_without_it(name):
    model, call = masked_call(name, HIDDEN["tail"])
    alone = TINY[name].call(model, TINY[name].grid, batch=2)
    alone = row_of(alone, 1)
    alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, :5]
    if name == "bria_fibo":
        alone["text_encoder_layers"] = [layer[1:, :5] for layer in alone["text_encoder_layers"]]
        alone["txt_ids"] = alone["txt_ids"][:5]
    if name == "krea2":
        alone["position_ids"] = alone["position_ids"][2:]
    model.enable_sparse_attention(STATIC)
    torch.testing.assert_close(run(model, call)[1:], run(model, alone))
    assert_all_sparse(model, name, 2)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [("qwen_image", []), ("qwen_image", None), ("motif_video", [5, 6]), ("nucleus_image", [5, 6])],
)
def test_no_token_moves_where_a_tail_or_nothing_is_hidden(name, hidden, monkeypatch):
    model, within = masked_call(name, HIDDEN["within"])
    call = masked_call(name, hidden)[1] if hidden is not None else TINY[name].call(model, TINY[name].grid, batch=2)
    stock = run(model, call)
    model.enable_sparse_attention(FULL)
    run(model, within)
    monkeypatch.setattr(TextOrder, "of", None)
    torch.testing.assert_close(run(model, call), stock)
    assert_all_sparse(model, name, 2)


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_is_read_from_the_device_once(name, monkeypatch):
    model, call = masked_call(name, HIDDEN["tail"])
    model.enable_sparse_attention(FULL)
    run(model, call)
    read, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: (read.append(x), cpu(x))[1])
    run(model, call)
    assert not read


def test_its_own_order_has_the_grid_first_and_what_is_hidden_last():
    grid = TokenGrid(1, 2, 2, text_before=3, text_after=2)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, 0, 0, [0, 7]] = False
    x = torch.arange(9.0)[None, None, :, None] + torch.tensor([0.0, 100.0])[:, None, None, None]
    order = TextOrder.of(mask, grid, mask.device)
    own = order.undo(x.expand(2, 2, 9, 1))
    assert own[0, 1].flatten().tolist() == [3, 4, 5, 6, 1, 2, 8, 0, 7]
    assert own[1, 0].flatten().tolist() == [103, 104, 105, 106, 100, 101, 102, 107, 108]
    assert torch.equal(order.apply(own), x.expand(2, 2, 9, 1))
    no_mask = TextOrder.of(None, grid, mask.device)
    assert no_mask.undo(x)[0].flatten().tolist() == [3, 4, 5, 6, 0, 1, 2, 7, 8]
    # What comes after attention wants all heads of a token together, and would copy them once more.
    assert order.apply(own).transpose(1, 2).is_contiguous()
