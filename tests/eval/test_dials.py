from __future__ import annotations

import json
import math

import pytest

from diffsparse.eval import dials
from diffsparse.eval.dials import LEAST, MOST_TRIES, Dials, Row, find_position
from diffsparse.strategies.adaptive import Adaptive
from diffsparse.strategies.s2_attention import S2Attention


@pytest.mark.parametrize(
    "density_at",
    [
        lambda at: at,
        lambda at: at**4,
        lambda at: at**0.6,
        lambda at: 0.06 + 0.94 * at,
        lambda at: math.expm1(at) / 1.8,
    ],
)
@pytest.mark.parametrize("density", [0.1, 0.2, 0.3])
def test_a_smooth_dial_is_set_within_a_few_percent(density_at, density):
    position = find_position(density_at, density, {})
    assert density_at(position) == pytest.approx(density, rel=0.03)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.3])
def test_a_dial_in_steps_is_set_to_the_nearest_of_them(density):
    position = find_position(lambda at: round(64 * at) / 64, density, {})
    assert round(64 * position) == round(64 * density)


def test_a_density_out_of_reach_has_the_nearest_end():
    assert find_position(lambda at: 0.6 + 0.1 * at, 0.1, {}) == LEAST
    assert find_position(lambda at: 0.1 * at, 0.3, {}) == 1.0


def test_what_was_tried_for_one_density_serves_the_next():
    tried = []

    def measure(at):
        tried.append(at)
        return at**2

    measured = {}
    for density in (0.1, 0.2, 0.1):
        find_position(measure, density, measured)
    assert len(tried) == len(set(tried)) == len(measured) <= 2 + 2 * MOST_TRIES


@pytest.fixture
def fake_measures(monkeypatch):
    monkeypatch.setattr(dials, "density_of", lambda strategy, calls: strategy.density / 2)
    monkeypatch.setattr(dials, "error_of", lambda strategy, calls: 0.1 if strategy.tail else 0.2)


def test_what_was_found_is_kept(tmp_path, fake_measures):
    file, row = tmp_path / "dials.json", Row("default", Adaptive())
    found = Dials(file, {"steps": 3})
    assert not found.has("default", 0.1)
    found.find(row, [0.1, 0.3], [])
    again = Dials(file, {"steps": 3})
    assert again.settings == found.settings
    for density in (0.1, 0.3):
        setting = again.setting("default", density)
        assert setting.density == pytest.approx(density, rel=0.02)
        assert row.at(setting.position).density == pytest.approx(2 * density, rel=0.02)
        assert (setting.error, setting.error_with_tail) == (0.2, 0.1)
    assert not again.has("default", 0.2)
    assert not again.has("other", 0.1)


def test_what_two_processes_find_is_kept_of_both(tmp_path, fake_measures):
    file = tmp_path / "dials.json"
    first, second = Dials(file, {}), Dials(file, {})
    first.find(Row("a", Adaptive()), [0.1], [])
    second.find(Row("b", Adaptive()), [0.1], [])
    second.find(Row("a", Adaptive()), [0.3], [])
    again = Dials(file, {})
    assert [again.has(*each) for each in (("a", 0.1), ("a", 0.3), ("b", 0.1))] == [True] * 3


def test_dials_of_other_conditions_are_not_taken(tmp_path, fake_measures):
    file = tmp_path / "dials.json"
    Dials(file, {"steps": 3}).find(Row("default", Adaptive()), [0.1], [])
    with pytest.raises(ValueError, match="other conditions"):
        Dials(file, {"steps": 4})


def test_an_option_may_be_turned_by_a_rule_of_its_own():
    row = Row("static", S2Attention(), "stride", lambda position: round(1 / position))
    assert row.at(0.1) == S2Attention(stride=10)


@pytest.mark.parametrize("contents", ["", "[]", "{}"])
def test_a_damaged_file_is_named(tmp_path, contents):
    file = tmp_path / "dials.json"
    file.write_text(contents)
    with pytest.raises(ValueError, match=r"--dials .*dials\.json holds no dials that can be read"):
        Dials(file, {})


@pytest.mark.parametrize("setting", [None, {}, {"position": "0.1"}, {"position": float("nan")}, {"error": ...}])
def test_a_damaged_dial_is_named(tmp_path, fake_measures, setting):
    file = tmp_path / "dials.json"
    Dials(file, {}).find(Row("default", Adaptive()), [0.1], [])
    contents = json.loads(file.read_text())
    dial = setting and {k: v for k, v in (contents["settings"]["default"]["0.1"] | setting).items() if v is not ...}
    contents["settings"]["default"]["0.1"] = dial if setting else setting
    file.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=r"--dials .*dials\.json holds no dials .* it\.settings\.default\.0\.1"):
        Dials(file, {})
