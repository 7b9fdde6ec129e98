"""Ideogram 4's pipeline: a model with text that is padded at its front, and one without text."""

import diffusers
import torch
from enabled import FULL, Watched, config, report_of, run
from tiny.ideogram4 import call_with_text, make
from tiny.model import TEXT_TOKENS
from tiny_pipelines import text, without_encoders

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.family import Layout
from diffsparse.pipelines.ideogram4 import layout


def pipeline():
    pipe = without_encoders(
        diffusers.Ideogram4Pipeline,
        transformer=make(),
        unconditional_transformer=make(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )

    def encode_prompt(prompt, grid_h, grid_w, max_sequence_length, device):
        ids = pipe._prepare_ids([4], grid_h, grid_w, max_sequence_length, device)
        return text(max_sequence_length + grid_h * grid_w), *ids

    pipe.encode_prompt = encode_prompt
    return pipe


def generate(pipe):
    size = {"height": 7 * 16, "width": 5 * 16, "max_sequence_length": TEXT_TOKENS, "guidance_schedule": (3.0,) * 3}
    noise = torch.Generator().manual_seed(0)
    return pipe("a cat", **size, num_inference_steps=3, output_type="latent", generator=noise).images


def test_both_models_are_as_exact_as_stock_and_run_sparse_but_for_early_steps():
    pipe = pipeline()
    stock = generate(pipe)
    pipe.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(pipe), stock)
    pipe.disable_sparse_attention()
    pipe.enable_sparse_attention(config(strategy := Watched(density=0.5), dense_steps=0.34, strict=True))
    assert not torch.allclose(generate(pipe), stock, atol=1e-4)
    grids = {TokenGrid(1, 7, 5, text_after=TEXT_TOKENS), TokenGrid(1, 7, 5)}
    assert {call.grid for call in strategy.calls} == grids
    reports = pipe.sparse_attention_report().transformers
    assert [report.name for report in reports] == ["transformer", "unconditional_transformer"]
    assert all((report.sparse_calls, report.dense_reasons) == (2 * 2, {"early step": 2}) for report in reports)


def test_the_layout_is_that_of_the_position_ids():
    model, call = make(), call_with_text(make(), (1, 7, 5))
    assert layout(model, call) == Layout(1, 7, 5, text_before=TEXT_TOKENS)


def test_images_packed_in_a_row_stay_dense():
    model = make()
    first, second = (call_with_text(model, (1, 7, 5), seed=seed) for seed in range(2))
    call = first | {name: torch.cat([x, second[name]], dim=1) for name, x in first.items() if x.ndim > 1}
    call["segment_ids"][:, TEXT_TOKENS + 35 :] = 2
    stock = run(model, call)
    model.enable_sparse_attention(FULL)
    assert torch.equal(run(model, call), stock)
    assert report_of(model).dense_reasons == {"the call does not say the size of the grid": 2}
