from __future__ import annotations

import warnings

import pytest

from diffsparse.kernels.first_use import is_right


def test_a_kernel_that_is_right_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_right("adding", lambda: True)


@pytest.mark.parametrize(("check", "why"), [(lambda: False, "wrong on a small input"), (lambda: 1 / 0, "ZeroDivision")])
def test_a_kernel_that_is_not_right_is_left_out_with_a_warning(check, why):
    with pytest.warns(UserWarning, match=f"adding is left out.*{why}"):
        assert not is_right("adding", check)
