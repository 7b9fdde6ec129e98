from __future__ import annotations

from types import SimpleNamespace

import pytest

from diffsparse.comfy.schedule import Branches, Window, has_few_steps, step_of, whole_schedule

SIGMAS = [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("sigma", "step"), [(1.0, 0), (0.75, 1), (0.25, 3), (0.6, 1), (0.1, 3), (0.0, 3), (14.6, 0), (0.75000001, 1)]
)
def test_a_sigma_belongs_to_the_step_that_it_lies_in(sigma, step):
    assert step_of(sigma, SIGMAS) == step


@pytest.mark.parametrize(("sigma", "step"), [(0.0, 0), (0.25, 1), (0.24999999, 1), (0.6, 2), (0.75, 3), (1.0, 3)])
def test_a_schedule_may_rise(sigma, step):
    assert step_of(sigma, SIGMAS[::-1]) == step


@pytest.mark.parametrize("part", [SIGMAS, SIGMAS[:2], SIGMAS[1:3], SIGMAS[3:]])
def test_a_part_of_a_schedule_is_known(part):
    assert whole_schedule(part, SIGMAS) is SIGMAS


@pytest.mark.parametrize("other", [[1.0, 0.5, 0.0], [0.5, 0.75], [0.9], [1.0, *SIGMAS]])
def test_another_schedule_than_that_of_the_run_is_its_own(other):
    assert whole_schedule(other, SIGMAS) is other


def test_a_window_is_dense_before_and_after_it():
    window = Window(sigma_start=0.8, sigma_end=0.2, first_step_only=False)
    reasons = [window.why_dense(sigma, step) for step, sigma in enumerate((1.0, 0.8, 0.5, 0.2, 0.1))]
    assert reasons == ["early step", None, None, None, "late step"]


@pytest.mark.parametrize(("start", "end", "steps"), [(0.8, 0.4, (1, 3)), (1.0, 0.0, (0, 4)), (0.1, 0.05, (0, 4))])
def test_the_sparse_steps_of_a_window(start, end, steps):
    assert Window(start, end, first_step_only=False).sparse_steps(SIGMAS) == steps


def test_only_the_first_step_stays_dense_where_the_window_says_so():
    window = Window(sigma_start=0.2, sigma_end=0.0, first_step_only=True)
    assert [window.why_dense(0.9, step) for step in range(3)] == ["early step", None, None]
    # The second expert of a model starts further down.
    assert window.why_dense(0.15, 0) is None


@pytest.mark.parametrize("shift", [1.0, 8.0])
@pytest.mark.parametrize(
    ("steps", "first", "end", "few"),
    [
        *((steps, 0, steps, steps <= 8) for steps in (1, 4, 8, 9, 20)),
        *((2 * half, 0, half, 2 * half <= 8) for half in (2, 3, 4, 5, 6, 8, 10)),
        (8, 0, 2, True),
        (8, 2, 4, True),
        (20, 0, 2, False),
        (20, 2, 10, False),
        (16, 8, 16, True),
    ],
)
def test_a_part_of_a_schedule_has_as_few_steps_as_the_whole(shift, steps, first, end, few):
    def percent_to_sigma(percent):
        return shift * (1 - percent) / (1 + (shift - 1) * (1 - percent))

    sigmas = [percent_to_sigma(step / steps) for step in range(first, end + 1)]
    assert has_few_steps(sigmas, percent_to_sigma) == few


def options(kinds, uuids, window=None):
    shown = {"cond_or_uncond": kinds, "uuids": uuids}
    return shown if window is None else shown | {"context_window": SimpleNamespace(index_list=window)}


def test_branches_of_guidance_share_a_name_and_regions_do_not():
    branches = Branches()
    positive, negative, region = (branches.name(options([k], [u])) for k, u in ((0, "p"), (1, "n"), (0, "region")))
    assert positive == negative != region
    assert branches.name(options([0], ["region"])) == region


def test_a_context_window_is_a_branch_of_its_own():
    branches = Branches()
    first, second = (branches.name(options([0], ["p"], window)) for window in ([0, 1], [1, 2]))
    assert first != second
