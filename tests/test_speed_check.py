"""Sparse attention is left out where it would not be faster, and that is found out once."""

import dataclasses
import itertools
import logging
import weakref

import comfy_standins
import pytest
import torch
from composition.test_padded_within import masked_call
from enabled import Watched, config, report_of, run
from tiny_models import TINY

import diffsparse.config
from diffsparse import Adaptive, processors, speed_check, text_order
from diffsparse.plan import AttentionPlan
from diffsparse.session import Session
from diffsparse.steps import Step

SMALL = Adaptive(density=0.3, query_block_size=16, key_block_size=16)


class Clock:
    """Stands in for the clock: seconds of dense attention, sparse attention and a plan, which are timed in turn."""

    def __init__(self, dense, sparse, plan):
        self.seconds = itertools.cycle((dense, sparse, plan))
        self.timed = 0

    def __call__(self, call, device):
        call()
        self.timed += 1
        return next(self.seconds)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(speed_check, "_SPEED_UPS", {})
    monkeypatch.setattr(speed_check, "LEAST_SPEED_UP", 1.2)
    # Tiny models are worth timing.
    monkeypatch.setattr(diffsparse.config, "MIN_TOKENS", 0)


@pytest.fixture
def set_clock(monkeypatch):
    def set_to(dense, sparse, plan):
        clock = Clock(dense, sparse, plan)
        monkeypatch.setattr(speed_check, "seconds_of", clock)
        return clock

    return set_to


@pytest.fixture
def wan():
    return TINY["wan"].make()


@pytest.fixture
def call(wan):
    return TINY["wan"].call(wan, TINY["wan"].grid)


def timed(strategy=SMALL, **changes):
    return config(strategy, **({"min_tokens": None} | changes))


def test_what_is_faster_runs_sparse_as_if_it_had_not_been_timed(wan, call, set_clock):
    clock = set_clock(dense=1.0, sparse=0.5, plan=0.5)
    wan.enable_sparse_attention(config(SMALL))
    expected = run(wan, call)
    wan.disable_sparse_attention()
    assert clock.timed == 0
    wan.enable_sparse_attention(timed())
    assert torch.equal(run(wan, call), expected)
    assert (report_of(wan).sparse_calls, report_of(wan).dense_calls) == (3, 0)


def test_what_is_not_faster_is_dense_from_its_first_call_on(wan, call, set_clock, caplog):
    stock = run(wan, call)
    set_clock(dense=1.0, sparse=0.8, plan=0.4)
    wan.enable_sparse_attention(timed(strict=True))
    with caplog.at_level(logging.WARNING, logger="diffsparse"):
        assert torch.equal(run(wan, call), stock)
        assert torch.equal(run(wan, call), stock)
    reason = "sparse attention is 1.11x as fast as dense attention here"
    assert report_of(wan).dense_reasons == {reason: 6}
    assert report_of(wan).sparse_calls == 0
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(
        "diffsparse: self-attention of WanTransformer3DModel over 105 tokens is left to the model: " + reason
    )


def test_what_moves_text_is_timed_with_sparse_attention(monkeypatch):
    model, call = masked_call("krea2", [2, 4])
    moved, timed_moves, move = [], [], text_order._in_order
    monkeypatch.setattr(text_order, "_in_order", lambda x, order: (moved.append(x), move(x, order))[1])

    def seconds_of(attend, device):
        before = len(moved)
        attend()
        timed_moves.append(len(moved) - before)
        return 1.0

    monkeypatch.setattr(speed_check, "seconds_of", seconds_of)
    model.enable_sparse_attention(timed())
    run(model, call)
    # Dense attention, sparse attention with query, key, value and output, a plan.
    assert timed_moves[:3] == [0, 4, 0]


def test_each_kind_of_call_is_timed_once_in_a_process(wan, call, set_clock):
    clock = set_clock(dense=1.0, sparse=0.1, plan=0.1)
    once = 3 * speed_check.LEAST_ROUNDS
    for _ in range(2):
        wan.enable_sparse_attention(timed())
        run(wan, call)
        run(wan, call)
        wan.disable_sparse_attention()
        assert clock.timed == once
    wan.enable_sparse_attention(timed())
    run(wan, TINY["wan"].call(wan, (2, 7, 5)))
    assert clock.timed == 2 * once
    wan.disable_sparse_attention()
    wan.enable_sparse_attention(timed(replan_every=2))
    run(wan, call)
    assert clock.timed == 3 * once


@pytest.mark.parametrize(("replan_every", "sparse_calls"), [(1, 0), (2, 0), (4, 3)])
def test_a_plan_costs_its_share(wan, call, set_clock, replan_every, sparse_calls):
    set_clock(dense=1.0, sparse=0.5, plan=1.2)
    wan.enable_sparse_attention(timed(replan_every=replan_every))
    run(wan, call)
    assert report_of(wan).sparse_calls == sparse_calls


def test_a_user_who_says_min_tokens_gets_sparse_attention(wan, call, set_clock):
    clock = set_clock(dense=1.0, sparse=9.0, plan=9.0)
    wan.enable_sparse_attention(timed(min_tokens=1))
    run(wan, call)
    assert (clock.timed, report_of(wan).sparse_calls) == (0, 3)


def test_what_is_timed_is_a_step_in_the_middle(wan, call, set_clock):
    set_clock(dense=1.0, sparse=0.1, plan=0.1)
    wan.enable_sparse_attention(timed(strategy := Watched()))
    run(wan, call)
    # The first layer: its own plan, one to time sparse attention by, one in each round; then two more layers.
    assert [call.progress for call in strategy.calls] == [None, *[0.5] * (1 + speed_check.LEAST_ROUNDS), None, None]


@pytest.mark.parametrize(("dense", "rounds"), [(1e-3, 8), (0.1, 5), (9.0, 2)])
def test_short_calls_are_timed_more_often(wan, call, set_clock, dense, rounds):
    clock = set_clock(dense=dense, sparse=0.0, plan=1e-9)
    wan.enable_sparse_attention(timed())
    run(wan, call)
    assert clock.timed == 3 * rounds


def test_a_strategy_that_nobody_can_watch_is_timed():
    speed, query = speed_check.SpeedCheck("a model", timed(Slots())), torch.zeros(1, 1, 8, 8)
    speed.time(query, None, list, lambda plan: None, lambda progress: 0, 1)
    assert speed.knows(query, None)


def test_a_strategy_that_cannot_be_hashed_is_timed(wan, call, set_clock):
    clock = set_clock(dense=1.0, sparse=0.1, plan=0.1)
    wan.enable_sparse_attention(timed(strategy=NoHash(query_block_size=16, key_block_size=16)))
    run(wan, call)
    run(wan, call)
    assert (clock.timed, report_of(wan).sparse_calls) == (3 * speed_check.LEAST_ROUNDS, 6)


class Itself:
    """A strategy without a hash of its own, as a plain class is and `Calibrated`."""

    def plan(self, query, key, value, call):
        raise AssertionError


class NoHash(Adaptive):
    __hash__ = None


class Slots:
    """The same without a weak reference to it."""

    __slots__ = ("place",)
    plan = Itself.plan


@pytest.mark.parametrize("make", [Itself, NoHash])
def test_nothing_is_known_of_a_strategy_because_of_one_that_is_gone(make):
    gone, query = [], torch.zeros(1, 1, 8, 8)
    for _ in range(20):
        # Nobody holds it when the next one is made, which may well lie where it lay.
        chosen = timed(make())
        gone.append(weakref.ref(chosen.strategy))
        speed = speed_check.SpeedCheck("a model", chosen)
        assert not speed.knows(query, None)
        speed.time(query, None, list, lambda plan: None, lambda progress: 0, num_served=1)
        assert speed.knows(query, None)
        del chosen
    assert [strategy() for strategy in gone] == [None] * 20


@pytest.mark.parametrize("make", [Itself, Adaptive])
@pytest.mark.parametrize(
    ("changes", "is_known"),
    [
        ({}, True),
        # As `eval run` warms up.
        ({"dense_steps": 0.5}, True),
        ({"dense_layers": (0,)}, True),
        ({"strict": True}, True),
        ({"replan_every": 7}, False),
        ({"backend": "flex"}, False),
        ({"quantization": "int8"}, False),
        ({"strategy": Adaptive(density=0.5)}, False),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else None,
)
def test_what_is_known_holds_for_configs_that_take_the_same_time(make, changes, is_known):
    chosen, query = timed(make()), torch.zeros(1, 1, 8, 8)
    speed_check.SpeedCheck("a model", chosen).time(query, None, list, lambda plan: None, lambda progress: 0, 1)
    other = dataclasses.replace(chosen, **changes)
    assert speed_check.SpeedCheck("another model", other).knows(query, None) == is_known


def test_dense_attention_is_timed_under_the_models_autocast(wan, call, set_clock, monkeypatch):
    def watched(*args):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return dense(*args)

    dense, seen = processors._dense, []
    monkeypatch.setattr(processors, "_dense", watched)
    set_clock(dense=1.0, sparse=0.1, plan=0.1)
    wan.enable_sparse_attention(timed())
    with torch.autocast("cpu", dtype=torch.float16):
        run(wan, call)
    assert seen == [torch.float16] * speed_check.LEAST_ROUNDS


def test_nothing_is_timed_where_nothing_is_computed():
    speed = speed_check.SpeedCheck("a model", timed())
    assert speed.knows(torch.empty(1, 1, 8, 8, device="meta"), None)
    assert not speed.knows(torch.zeros(1, 1, 8, 8), None)


def test_the_clock_counts_the_calls():
    calls = []
    assert speed_check.seconds_of(lambda: calls.append(1), torch.device("cpu"), repeats=3) > 0
    assert len(calls) == 3


class NoText:
    name, padding_mask, text_apart = "no text", False, None


def begin(session, index):
    session.begin(Step(index, 4, None, index == 0), (3, 5, 7, 0, 0))


def attend(session, layer=0, batch=1, dense=list):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(batch, 2, 105, 8, generator=generator) for _ in range(3))
    return session.attend(layer, query, key, value, None, None, dense=dense)


def test_no_output_of_sparse_attention_lies_in_memory_while_dense_attention_is_timed(monkeypatch):
    def watched(*args, **kwargs):
        outputs.append(weakref.ref(output := attend_by_plan(*args, **kwargs)))
        return output

    attend_by_plan, outputs, alive = AttentionPlan.attend, [], []
    monkeypatch.setattr(AttentionPlan, "attend", watched)
    session = Session("a model", NoText(), ("layer",), timed(replan_every=100))
    begin(session, 0)
    attend(session, dense=lambda: alive.append([output() for output in outputs if output() is not None]))
    assert len(outputs) > len(alive) > 0
    assert not any(alive)


NO_MEMORY = [torch.OutOfMemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GiB).")]


@pytest.mark.parametrize("error", NO_MEMORY)
def test_what_dense_attention_has_no_memory_for_stays_sparse(error):
    def dense():
        tried.append(1)
        raise error

    tried = []
    session = Session("a model", NoText(), ("layer",), timed())
    for index in range(3):
        begin(session, index)
        assert attend(session, dense=dense) is not None
    assert (len(tried), session.tallies[0].sparse_calls) == (1, 3)


def test_another_error_of_dense_attention_is_not_taken_for_too_little_memory():
    def dense():
        raise RuntimeError("a driver's")

    session = Session("a model", NoText(), ("layer",), timed())
    begin(session, 0)
    with pytest.raises(RuntimeError, match="a driver's"):
        attend(session, dense=dense)


def test_no_memory_for_a_second_plan_loses_no_call():
    class Large(Adaptive):
        def plan(self, query, key, value, call):
            planned.append(call.step)
            if len(planned) > 1:
                raise torch.OutOfMemoryError
            return super().plan(query, key, value, call)

    planned = []
    strategy = Large(query_block_size=16, key_block_size=16)
    session = Session("a model", NoText(), ("layer",), timed(strategy, replan_every=100))
    for index in range(3):
        begin(session, index)
        assert attend(session) is not None
    assert (len(planned), session.tallies[0].sparse_calls) == (2, 3)


def test_a_strategy_that_keeps_the_middle_dense_is_asked_about_it_once():
    class AtTheEnds(Adaptive):
        def plan(self, query, key, value, call):
            planned.append(call.progress)
            return None if call.progress == 0.5 else super().plan(query, key, value, call)

    planned = []
    strategy = AtTheEnds(query_block_size=16, key_block_size=16)
    session = Session("a model", NoText(), ("layer",), timed(strategy, replan_every=1))
    for index in range(3):
        begin(session, index)
        assert attend(session) is not None
    assert planned == [0.125, 0.5, 0.375, 0.625]


def test_what_is_found_slow_takes_no_plan_from_what_is_not(set_clock):
    session = Session("a model", NoText(), ("fast", "slow"), timed(strategy := Watched()))
    for index in range(4):
        begin(session, index)
        set_clock(dense=1.0, sparse=0.1, plan=0.1)
        attend(session, 0)
        set_clock(dense=1.0, sparse=9.0, plan=0.1)
        attend(session, 1, batch=2)
    assert [tally.sparse_calls for tally in session.tallies] == [4, 0]
    assert set(strategy.planned) == {(0, 0), (1, 0)}


def test_in_comfyui_the_line_says_what_was_found(monkeypatch, tmp_path, set_clock, caplog):
    comfy_standins.install(monkeypatch, tmp_path)
    model = comfy_standins.patcher()
    set_clock(dense=1.0, sparse=2.0, plan=0.0)
    with caplog.at_level(logging.INFO):
        sparse = comfy_standins.patched(model, min_tokens=-1, start_percent=0.0)
        assert torch.equal(comfy_standins.sample(sparse), comfy_standins.sample(model))
    assert "0 of 5 steps sparse" in caplog.text
    assert "sparse attention is 0.50x as fast as dense attention here (" in caplog.text


def test_in_comfyui_what_another_node_has_put_in_the_place_of_dense_attention_is_timed(
    monkeypatch, tmp_path, set_clock
):
    def other(function, *args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    comfy_standins.install(monkeypatch, tmp_path)
    set_clock(dense=1.0, sparse=0.1, plan=0.0)
    counts = []
    for min_tokens in (0, -1):
        calls = []
        sparse = comfy_standins.patched(comfy_standins.patcher(), min_tokens=min_tokens, start_percent=0.0)
        sparse.model_options["transformer_options"]["optimized_attention_override"] = other
        comfy_standins.sample(sparse)
        counts.append(len(calls))
    assert counts[1] == counts[0] + speed_check.LEAST_ROUNDS
