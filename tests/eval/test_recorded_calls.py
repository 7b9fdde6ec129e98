from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from diffsparse import Adaptive, Dense, S2Attention, SparseD
from diffsparse.eval.generate import Sampling, load_pipeline
from diffsparse.eval.recorded_calls import REPLAN_EVERY, density_of, error_of, record_calls

STATIC = S2Attention(local_blocks=1, stride=3, block_size=16)


@pytest.fixture(scope="module")
def calls(tiny_model):
    sampling = dataclasses.replace(Sampling.read(tiny_model), num_inference_steps=2 * REPLAN_EVERY + 2)
    return record_calls(load_pipeline(tiny_model, "cpu"), "a prompt", 0, sampling, dense_steps=0.2)


def test_each_layer_is_kept_where_it_is_planned_and_where_the_plan_is_oldest(calls):
    first = 2
    assert [(call.call.step, call.age) for call in calls if call.call.layer == 0] == [
        (first, 0),
        (first + REPLAN_EVERY - 1, REPLAN_EVERY - 1),
        (first + REPLAN_EVERY, 0),
        (first + 2 * REPLAN_EVERY - 1, REPLAN_EVERY - 1),
    ]
    assert {call.call.layer for call in calls} == {0, 1}


def test_the_sampled_rows_are_dense_attention(calls):
    call = calls[-1]
    dense = F.scaled_dot_product_attention(call.query.double(), call.key.double(), call.value.double())
    torch.testing.assert_close(call.exact.double(), dense[:, :, call.rows], atol=1e-4, rtol=1e-4)


def test_keeping_everything_has_density_1_and_no_error(calls):
    assert density_of(Adaptive(density=1.0), calls) == 1.0
    assert error_of(Adaptive(density=1.0), calls) < 1e-4
    assert density_of(Dense(), calls) == 1.0
    assert error_of(Dense(), calls) == 0.0


def test_density_and_error_are_those_of_the_masks(calls):
    masks = [STATIC.plan(c.query, c.key, c.value, c.call).mask.visible()[0] for c in calls]  # [H, Q, K]
    assert density_of(STATIC, calls) == pytest.approx(sum(m.float().mean().item() for m in masks) / len(masks))
    errors = []
    for call, mask in zip(calls, masks):
        seen = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[None, :, : call.query.shape[2]]
        seen = seen[..., : call.query.shape[2]][:, :, call.rows]
        masked = F.scaled_dot_product_attention(call.query[:, :, call.rows], call.key, call.value, seen)
        errors.append(((masked - call.exact).norm() / call.exact.norm()).item())
    assert error_of(STATIC, calls) == pytest.approx(sum(errors) / len(errors), rel=1e-3)


@pytest.mark.parametrize(("lasts", "plans_a_layer"), [(False, 2), (True, 1)])
def test_a_layer_is_planned_as_often_as_in_a_session(calls, lasts, plans_a_layer):
    @dataclasses.dataclass
    class Counting:
        made: int = 0

        def plan(self, query, key, value, call):
            self.made += 1
            return dataclasses.replace(SparseD().plan(query, key, value, call), lasts=lasts)

    strategy = Counting()
    error_of(strategy, calls)
    assert strategy.made == 2 * plans_a_layer


def test_without_a_sparse_call_there_is_nothing_to_keep(tiny_model):
    pipe = load_pipeline(tiny_model, "cpu")
    with pytest.raises(ValueError, match="can be sparse"):
        record_calls(pipe, "a prompt", 0, Sampling.read(tiny_model), dense_steps=1.0)
    assert not pipe.is_sparse_attention_enabled
