"""What a session keeps plans for, and for how long."""

import weakref
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from enabled import config

from diffsparse.block_mask import BlockMask, num_blocks
from diffsparse.plan import AttentionPlan
from diffsparse.session import Session
from diffsparse.steps import Step
from diffsparse.strategies.dense import Dense

GRID = (2, 3, 5)


class PaddedText:
    name, padding_mask, text_apart = "padded text", True, None


@dataclass(frozen=True)
class Recorded:
    """Computes all blocks, and remembers at which layer and step it planned."""

    lasts: bool = False
    planned: list[tuple[int, int]] = field(default_factory=list)

    def plan(self, query, key, value, call):
        self.planned.append((call.layer, call.step))
        tokens = query.shape[2]
        everything = torch.ones(1, 1, *[num_blocks(tokens, 16)] * 2, dtype=torch.bool)
        return AttentionPlan(None, BlockMask.from_visible(everything, tokens, 16, 16), lasts=self.lasts)


def session_of(strategy, **changes):
    return Session("model", PaddedText(), ("first", "second"), config(strategy, **changes))


def qkv(batch=1, tokens=30, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch * tokens)
    return [torch.randn(batch, 2, tokens, 8, generator=generator).to(dtype) for _ in range(3)]


def begin(session, index, branch="cond", named=True, first=False, grid=GRID):
    session.begin(Step(index, 20, branch, first, branch_is_named=named), (*grid, 0, None))


def attend(session, layer=0, mask=None, **inputs):
    output = session.attend(layer, *qkv(**inputs), mask, None)
    assert output is not None, session.tallies[layer].dense_reasons
    return output


@pytest.mark.parametrize("every", [1, 3])
def test_a_plan_serves_so_many_steps(every):
    session = session_of(strategy := Recorded(), replan_every=every)
    for index in range(7):
        begin(session, index)
        for layer in (0, 1):
            attend(session, layer)
    assert strategy.planned == [(layer, index) for index in range(0, 7, every) for layer in (0, 1)]


def test_steps_that_did_not_run_count():
    session = session_of(strategy := Recorded(), replan_every=3)
    for index in (0, 2, 4, 5, 9):
        begin(session, index)
        attend(session)
    assert strategy.planned == [(0, 0), (0, 4), (0, 9)]


def test_a_plan_that_lasts_ends_with_its_generation():
    session = session_of(strategy := Recorded(lasts=True), replan_every=1)
    for index in (0, 1, 2, 3, 0, 1):
        begin(session, index, first=index == 0)
        attend(session)
    assert strategy.planned == [(0, 0), (0, 0)]


def test_a_generation_plans_anew_even_at_the_step_of_the_one_before():
    session = session_of(strategy := Recorded())
    for _ in range(2):
        begin(session, 3, first=True)
        attend(session)
    assert strategy.planned == [(0, 3), (0, 3)]


@pytest.mark.parametrize(("named", "plans"), [(True, 1), (False, 2)])
def test_branches_share_a_plan_where_something_names_them(named, plans):
    session = session_of(strategy := Recorded())
    for index in (0, 1):
        for branch in ("cond", "uncond"):
            begin(session, index, branch, named)
            attend(session)
    assert len(strategy.planned) == plans


@pytest.mark.parametrize(
    "other",
    [
        {"batch": 2},
        {"tokens": 37},
        {"dtype": torch.bfloat16},
        {"mask": torch.arange(30)[None, None, None] < 28},
        {"grid": (2, 5, 3)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_a_plan_was_not_made_for_has_its_own_and_takes_nothing_away(other):
    session = session_of(strategy := Recorded())
    other = dict(other)
    for _ in range(2):
        begin(session, 0)
        attend(session)
        begin(session, 0, grid=other.get("grid", GRID))
        attend(session, **{name: value for name, value in other.items() if name != "grid"})
    assert len(strategy.planned) == 2


def test_the_plans_of_branches_that_do_not_come_again_are_given_back():
    @dataclass(frozen=True)
    class Watched(Recorded):
        alive: weakref.WeakSet = field(default_factory=weakref.WeakSet)

        def plan(self, query, key, value, call):
            self.alive.add(plan := super().plan(query, key, value, call))
            return plan

    session = session_of(strategy := Watched(), replan_every=3)
    for index in range(20):
        begin(session, index, f"window {index}", named=False)
        for layer in (0, 1):
            attend(session, layer)
    assert len(strategy.planned) == 2 * 20
    assert len(strategy.alive) == 2 * 3


def test_rows_that_come_one_by_one_have_plans_of_their_own_at_every_step():
    session = session_of(strategy := Recorded(), replan_every=4)
    for index in range(3):
        begin(session, index)
        for _ in range(2):
            attend(session)
    assert len(strategy.planned) == 2


@pytest.mark.parametrize("shape", [(2, 1, 1, 30), (2, 30), (1, 1, 1, 30)], ids=str)
def test_a_padding_mask_hides_the_keys_that_it_says(shape):
    session = session_of(Recorded(), strict=True)
    begin(session, 0)
    length = torch.tensor([30, 21] if shape[0] == 2 else [25])
    hides = torch.arange(30) < length[:, None]
    expected = F.scaled_dot_product_attention(*qkv(batch=2), attn_mask=hides[:, None, None])
    output = attend(session, mask=hides.view(shape), batch=2)
    assert torch.allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 30, 30, dtype=torch.bool), torch.zeros(1, 1, 1, 30)])
def test_another_mask_is_an_obstacle(mask):
    session = session_of(Recorded())
    begin(session, 0)
    assert session.attend(0, *qkv(), mask, None) is None
    assert session.tallies[0].dense_reasons == {"attention mask": 1}


def test_a_mask_of_pairs_is_an_obstacle_whether_or_not_text_is_hidden():
    session = session_of(Recorded())
    begin(session, 0)
    session.mask_hides_nothing = True
    assert session.attend(0, *qkv(), torch.ones(1, 1, 30, 30, dtype=torch.bool).tril(), None) is None
    assert session.tallies[0].dense_reasons == {"attention mask": 1}


def test_a_mask_of_another_number_of_tokens_is_an_obstacle():
    session = session_of(Recorded())
    begin(session, 0)
    assert session.attend(0, *qkv(), torch.ones(1, 1, 1, 15, dtype=torch.bool), None) is None
    assert session.tallies[0].dense_reasons == {"attention mask": 1}


def test_text_padded_within_a_sequence_that_ranks_share_is_an_obstacle():
    session = session_of(Recorded())
    begin(session, 0)
    session.padded_within = True
    assert session.attend(0, *qkv(), torch.ones(1, 1, 1, 30, dtype=torch.bool), None, ranks=2) is None
    reason = "text padded elsewhere than at its end, under context parallelism"
    assert session.tallies[0].dense_reasons == {reason: 1}


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("text", "queries"), [((0, 7), 30), ((7, 0), 30), ((3, 4), 30), ((3, 4), 34)], ids=str)
def test_the_grid_alone_or_with_what_follows_it_may_have_queries(text, queries, heads):
    session = session_of(Recorded(), strict=True)
    session.begin(Step(0, 20, 0, True), (*GRID, *text))
    query, (key, value) = qkv(tokens=queries)[0], (x[:, :heads] for x in qkv(tokens=37)[1:])
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert torch.allclose(session.attend(0, query, key, value, None, None), expected, atol=1e-5)
    assert session.tallies[0].density == 1


def test_a_strategy_may_keep_the_queries_of_the_grid_alone_dense():
    session = session_of(Dense())
    begin(session, 0)
    assert session.attend(0, qkv()[0], *qkv(tokens=37)[1:], None, None) is None
    assert session.tallies[0].dense_reasons == {"the strategy keeps it dense": 1}


@pytest.mark.parametrize(
    ("queries", "keys", "values", "ranks"),
    [
        ((1, 2, 29, 8), (1, 2, 37, 8), (1, 2, 37, 8), 1),
        ((1, 2, 37, 8), (1, 2, 30, 8), (1, 2, 30, 8), 1),
        ((1, 2, 30, 8), (1, 4, 37, 8), (1, 4, 37, 8), 1),
        ((1, 3, 30, 8), (1, 2, 37, 8), (1, 2, 37, 8), 1),
        ((1, 2, 30, 8), (1, 2, 37, 8), (1, 2, 30, 8), 1),
        ((1, 2, 30, 8), (1, 2, 37, 8), (1, 2, 37, 8), 2),
        ((1, 2, 30, 8), (1, 2, 37, 4), (1, 2, 37, 4), 1),
        ((2, 2, 30, 8), (1, 2, 37, 8), (1, 2, 37, 8), 1),
    ],
    ids=["no grid", "fewer keys", "more heads", "odd groups", "values", "ranks", "head dim", "batch"],
)
def test_other_queries_than_the_grids_are_an_obstacle(queries, keys, values, ranks):
    session = session_of(Recorded())
    begin(session, 0)
    query, key, value = (torch.randn(shape) for shape in (queries, keys, values))
    assert session.attend(0, query, key, value, None, None, ranks) is None
    assert session.tallies[0].dense_reasons == {"query, key and value differ in shape": 1}


def test_a_mask_of_keys_is_an_obstacle_where_the_family_says_nothing_of_padding(monkeypatch):
    monkeypatch.setattr(PaddedText, "padding_mask", False)
    session = session_of(Recorded())
    begin(session, 0)
    assert session.attend(0, *qkv(), torch.ones(1, 1, 1, 30, dtype=torch.bool), None) is None
    assert session.tallies[0].dense_reasons == {"attention mask": 1}


def test_a_call_outside_of_the_transformer_is_dense():
    session = session_of(Recorded())
    assert session.attend(0, *qkv(), None, None) is None
    assert session.tallies[0].dense_reasons == {"called outside its transformer": 1}


def test_a_layer_that_the_strategy_keeps_dense_is_asked_again_as_often_as_it_would_be_planned():
    asked = []

    @dataclass(frozen=True)
    class Refuses:
        def plan(self, query, key, value, call):
            asked.append(call.step)

    session = session_of(Refuses(), replan_every=2, strict=True)
    for index in range(5):
        begin(session, index)
        assert session.attend(0, *qkv(), None, None) is None
    assert asked == [0, 2, 4]
    assert session.tallies[0].dense_reasons == {"the strategy keeps it dense": 5}
