"""A transformer that no family knows: what the warning gives to start from, and what a user's own family does."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from enabled import SPARSE, config, report_of
from tiny_models import tiny_wan_pipeline
from torch import nn

import diffsparse
from diffsparse import DenseFallback, Family, Layout
from diffsparse.describe import attention_patterns

HEIGHT, WIDTH, TEXT = 7, 5, 3


class Mine(nn.Module):
    """Text, then an image, through two layers of self-attention, after one of cross-attention."""

    def __init__(self):
        super().__init__()
        self.cross = Attention(query_dim=64, cross_attention_dim=48, heads=2, dim_head=32)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(64), "attn": Attention(query_dim=64, heads=2, dim_head=32)})
            for _ in range(2)
        )

    def forward(self, image, time, text):
        x = torch.cat([text, image.flatten(2).mT + time], dim=1)
        x = x + self.cross(x, text[..., :48])
        for block in self.blocks:
            x = x + block["attn"](block["norm"](x))
        return x


def layout(transformer, call):
    height, width = call["image"].shape[-2:]
    return Layout(1, height, width, text_before=call["text"].shape[1])


MINE = Family("mine", ("Mine",), ("blocks.*.attn",), layout, timestep="time")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mine().eval().requires_grad_(False)


@pytest.fixture
def call():
    return {"image": torch.randn(1, 64, HEIGHT, WIDTH), "time": torch.tensor(0.5), "text": torch.randn(1, TEXT, 64)}


def test_the_warning_is_code_that_needs_only_the_layout(model, call, caplog):
    caplog.set_level(logging.WARNING, logger="diffsparse")
    stock = model(**call)
    diffsparse.enable_sparse_attention(model, SPARSE)
    assert torch.equal(model(**call), stock)
    (record,) = caplog.records
    introduction, code = record.getMessage().split("\n\n", 1)
    assert "Mine is of no model family" in introduction
    assert "image, time, text" in code
    assert report_of(model).family is None
    assert report_of(model).sparse_calls == 0
    assert "no known family" in str(diffsparse.sparse_attention_report(model))
    diffsparse.disable_sparse_attention(model)

    described = []
    ready = code.replace("frames=...", "frames=1").replace("height=...", f"height={HEIGHT}")
    ready = ready.replace("width=...", f"width={WIDTH}").replace("text_before=...", f"text_before={TEXT}")
    ready = ready.replace("text_after=...", "text_after=0")
    namespace = {"model": SimpleNamespace(enable_sparse_attention=lambda family: described.append(family))}
    exec(ready, namespace)
    # Its timestep is there too, and tells the steps.
    diffsparse.enable_sparse_attention(model, config(dense_steps=0.2), family=described[0])
    for time in (0.5, 0.4):
        model(**(call | {"time": torch.tensor(time)}))
    assert (report_of(model).sparse_calls, report_of(model).dense_calls) == (2, 2)


def test_patterns_name_self_attention_once_each_and_no_sure_cross_attention(model):
    assert attention_patterns(model) == ("blocks.*.attn",)
    assert attention_patterns(nn.Sequential(nn.Linear(1, 1))) == ()


def test_layers_are_numbered_pattern_by_pattern_and_alternatives_take_turns(model):
    def names(*layers):
        return Family("mine", ("Mine",), layers, layout).layer_names(model)

    assert names("blocks.*.norm", "blocks.*.attn") == tuple(f"blocks.{i}.{m}" for m in ("norm", "attn") for i in (0, 1))
    assert names("blocks.*.norm|blocks.*.attn") == tuple(f"blocks.{i}.{m}" for i in (0, 1) for m in ("norm", "attn"))
    # One that two patterns match is one layer.
    assert names("blocks.1.attn", "blocks.*.attn") == ("blocks.1.attn", "blocks.0.attn")


def test_a_family_of_ones_own_runs_sparse_and_disables_exactly(model, call):
    stock = model(**call)
    diffsparse.enable_sparse_attention(model, SPARSE, family=MINE)
    assert not torch.equal(model(**call), stock)
    report = report_of(model)
    assert (report.family, report.num_layers, report.sparse_calls, report.dense_calls) == ("mine", 2, 2, 0)
    diffsparse.disable_sparse_attention(model)
    assert torch.equal(model(**call), stock)


def test_steps_are_told_by_the_argument_that_the_family_names(model, call):
    diffsparse.enable_sparse_attention(model, config(dense_steps=0.2), family=MINE)
    for time in (1.0, 0.6, 0.2):
        model(**(call | {"time": torch.tensor(time)}))
    assert report_of(model).dense_reasons == {"early step": 2}
    assert report_of(model).sparse_calls == 4


def test_a_timestep_that_the_transformer_does_not_take_is_warned_of_where_it_would_tell_the_steps(model, call, caplog):
    class Pipeline:
        components = {"transformer": model}  # noqa: RUF012

    nameless, pipeline = dataclasses.replace(MINE, timestep="timestep"), Pipeline()
    quiet = [(model, config(), nameless), (pipeline, config(dense_steps=0.2), nameless)]
    for thing, chosen, family in [*quiet, (model, config(dense_steps=0.2), MINE)]:
        diffsparse.enable_sparse_attention(thing, chosen, family=family)
        diffsparse.disable_sparse_attention(thing)
    assert caplog.records == []
    diffsparse.enable_sparse_attention(model, config(dense_steps=0.2), family=nameless)
    (record,) = caplog.records
    assert "Mine takes no argument `timestep`" in record.getMessage()
    assert "each call counts as the first step and stays dense" in record.getMessage()
    for time in (1.0, 0.6):
        model(**(call | {"time": torch.tensor(time)}))
    assert report_of(model).dense_reasons == {"early step": 2 * 2}


@pytest.mark.parametrize("name", ["mask", "mask.text"])
def test_a_text_mask_that_the_transformer_does_not_take_is_an_error(model, name):
    wrong = dataclasses.replace(MINE, text_mask=name)
    with pytest.raises(ValueError, match=f"`text_mask` '{name}' of the family 'mine' is no argument of Mine, .*text"):
        diffsparse.enable_sparse_attention(model, SPARSE, family=wrong)
    assert not diffsparse.is_sparse_attention_enabled(model)


def test_a_transformer_that_takes_any_argument_takes_the_mask_and_the_timestep_that_a_family_names(caplog):
    class Open(Mine):
        def forward(self, image, text, **more):
            return super().forward(image, more["time"], text)

    family = dataclasses.replace(MINE, transformers=("Open",), text_mask="mask")
    diffsparse.enable_sparse_attention(Open(), config(dense_steps=0.2), family=family)
    assert caplog.records == []


def test_a_text_mask_that_is_no_tensor_is_an_error(model, call):
    diffsparse.enable_sparse_attention(model, SPARSE, family=dataclasses.replace(MINE, text_mask="time"))
    with pytest.raises(TypeError, match=r"`text_mask` 'time' of the family 'mine' must .* the call has 0\.5 there"):
        model(**(call | {"time": 0.5}))


def test_a_layout_of_another_number_of_tokens_is_counted_or_raised(model, call):
    wrong = Family("mine", ("Mine",), MINE.layers, lambda transformer, call: Layout(1, HEIGHT, WIDTH))
    stock = model(**call)
    diffsparse.enable_sparse_attention(model, SPARSE, family=wrong)
    assert torch.equal(model(**call), stock)
    assert report_of(model).dense_reasons == {"38 tokens where the layout says 35": 2}
    diffsparse.disable_sparse_attention(model)
    diffsparse.enable_sparse_attention(model, config(strict=True), family=wrong)
    with pytest.raises(DenseFallback, match=r"blocks\.0\.attn.*38 tokens where the layout says 35"):
        model(**call)


@pytest.mark.parametrize("form", [[1, HEIGHT, WIDTH, TEXT, 0], Layout(1, HEIGHT, WIDTH, None, 0)], ids=str)
def test_a_layout_may_be_a_list_and_leave_a_number_of_text_tokens_to_the_sequence(model, call, form):
    family = Family("mine", ("Mine",), MINE.layers, lambda transformer, call: form)
    diffsparse.enable_sparse_attention(model, SPARSE, family=family)
    model(**call)
    assert (report_of(model).sparse_calls, report_of(model).dense_calls) == (2, 0)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (lambda transformer, call: call["nothing"], "KeyError: 'nothing'"),
        (lambda transformer, call: Layout(1, 0, WIDTH), "ValueError: `height` of a token grid must be"),
        (lambda transformer, call: Layout(1, HEIGHT, WIDTH, 0, -1), "ValueError: `text_after` of a token grid must be"),
        (lambda transformer, call: (1, WIDTH), "TypeError"),
    ],
)
def test_a_layout_that_fails_costs_no_generation_and_is_counted_or_raised(model, call, layout, reason):
    stock = model(**call)
    failing = Family("mine", ("Mine",), MINE.layers, layout)
    diffsparse.enable_sparse_attention(model, SPARSE, family=failing)
    assert torch.equal(model(**call), stock)
    ((text, count),) = report_of(model).dense_reasons.items()
    assert text.startswith(f"the layout of its family raises {reason}")
    assert count == 2
    diffsparse.disable_sparse_attention(model)
    diffsparse.enable_sparse_attention(model, config(strict=True), family=failing)
    with pytest.raises(DenseFallback, match="the layout of its family raises"):
        model(**call)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("transformer_blocks.*.attn",), r"match no module of Mine.*'blocks\.\*\.attn'"),
        (("blocks.*",), r"match `blocks\.0`, which has no attention processor, of Mine"),
        ((), "match no module"),
    ],
)
def test_patterns_that_match_nothing_or_other_modules_are_refused(model, layers, message):
    with pytest.raises(ValueError, match=message):
        diffsparse.enable_sparse_attention(model, SPARSE, family=Family("mine", ("Mine",), layers, layout))
    assert not diffsparse.is_sparse_attention_enabled(model)


def test_a_family_that_names_no_transformer_here_is_refused(model):
    other = Family("other", ("Other",), MINE.layers, layout)
    with pytest.raises(ValueError, match=r"describes Other, but Mine has Mine\. Name its class"):
        diffsparse.enable_sparse_attention(model, SPARSE, family=other)
    with pytest.raises(TypeError, match=r"must be None or a diffsparse\.Family, got 'wan'"):
        diffsparse.enable_sparse_attention(model, SPARSE, family="wan")


def test_a_pipelines_component_of_any_name_can_be_described(model):
    class Pipeline:
        components = {"denoiser": model, "vae": nn.Linear(1, 1)}  # noqa: RUF012

    pipeline = Pipeline()
    diffsparse.enable_sparse_attention(pipeline, SPARSE, family=MINE)
    assert report_of(pipeline).name == "denoiser"
    diffsparse.disable_sparse_attention(pipeline)
    assert not diffsparse.is_sparse_attention_enabled(model)


def test_ones_own_family_goes_before_the_known_ones():
    pipeline = tiny_wan_pipeline()
    own = Family("own", ("WanTransformer3DModel",), ("blocks.0.attn1",), lambda transformer, call: None)
    pipeline.enable_sparse_attention(SPARSE, family=own)
    assert (report_of(pipeline).family, report_of(pipeline).num_layers) == ("own", 1)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("transformers", "Mine", "a tuple of strings, got 'Mine'"),
        ("layers", "Mine", "a tuple of strings, got 'Mine'"),
        ("layout", None, "a function"),
        ("name", None, "a string, got None"),
        ("timestep", None, "a string, got None"),
        ("timestep", ("t",), r"a string, got \('t',\)"),
        ("padding_mask", "no", "True or False, got 'no'"),
        ("spreads_mask", None, "True or False, got None"),
        ("masks_pairs", 1, "True or False, got 1"),
        ("text_attends_alone", "yes", "True or False, got 'yes'"),
        ("text_apart", "no", "True, False or None, got 'no'"),
        ("text_mask", True, "None or a string, got True"),
    ],
)
def test_a_field_of_another_type_is_refused(field, value, expected):
    with pytest.raises(TypeError, match=f"`{field}` of a family must be {expected}"):
        dataclasses.replace(MINE, **{field: value})


class PassingOn(nn.Module):
    """What stands in for a transformer and is no more than it, as of DDP."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **call):
        return self.module(**call)


def test_a_transformer_of_an_own_family_is_found_inside_a_wrapper(model, call):
    stock = model(**call)
    wrapped = PassingOn(model)
    diffsparse.enable_sparse_attention(wrapped, SPARSE, family=MINE)
    assert not torch.allclose(wrapped(**call), stock)
    # These are not told the family.
    assert report_of(wrapped).sparse_calls == 2
    assert diffsparse.is_sparse_attention_enabled(wrapped)
    diffsparse.disable_sparse_attention(wrapped)
    assert torch.equal(model(**call), stock)


def test_a_wrapped_transformer_that_is_left_alone_is_told_why(caplog):
    left_alone = type("AceStepTransformer1DModel", (Mine,), {})()
    with caplog.at_level(logging.WARNING):
        diffsparse.enable_sparse_attention(PassingOn(left_alone))
    assert "AceStepTransformer1DModel stays dense" in caplog.text
    assert "no model family" not in caplog.text
