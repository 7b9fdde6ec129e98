from __future__ import annotations

import copy
import json
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest
from commands import run_command

from diffsparse.eval import bench
from diffsparse.eval.bench_plot import draw
from diffsparse.eval.bench_table import title_of

PUBLISHED = json.loads((Path(__file__).parents[2] / "docs/benchmarks/h200.json").read_text())


def test_every_point_of_every_geometry_is_in_the_picture(tmp_path):
    file = tmp_path / "p.png"

    def picture(record):
        draw(record, file)
        return matplotlib.image.imread(file)

    before = picture(PUBLISHED)
    for name, call in (("Wan 2.1 14B, 720p, 81 frames", "native 0.5"), ("FLUX.1, 1024 x 1024", "torch")):
        changed = copy.deepcopy(PUBLISHED)
        changed["attention"][name]["calls"][call]["speed_up"] *= 1.5
        after = picture(changed)
        assert after.shape == before.shape
        assert (after != before).any()


def test_a_kind_with_one_density_has_its_point_and_every_kind_a_colour_of_its_own(tmp_path):
    name, published = next(iter(PUBLISHED["attention"].items()))
    calls = copy.deepcopy(published["calls"])
    kinds = {title_of(*call) for call in calls.items()}
    # Far above all others, where nothing else is drawn.
    calls |= {f"kind {number} 0.25": {"density": 0.25, "speed_up": 30.0 * 2**number, "error": 0.0} for number in (0, 1)}
    draw({"attention": {name: {"calls": calls}}}, tmp_path / "p.png")
    picture = (255 * matplotlib.image.imread(tmp_path / "p.png")[..., :3]).round().astype(int)
    assert len(coloured(picture)) == len(kinds) + 2
    assert len(coloured(picture[30:125, 60:500])) == 2


def coloured(picture):
    """Which colours for kinds there are in a picture [H, W, 3], but for grey, which text has too."""
    known = {tuple(round(255 * part) for part in colour) for colour in matplotlib.colormaps["tab20"].colors}
    found = known & set(map(tuple, picture.reshape(-1, 3).tolist()))
    return {colour for colour in found if len(set(colour)) > 1}


def test_panels_without_a_geometry_are_left_out(tmp_path):
    names = list(PUBLISHED["attention"])
    for count, rows in ((1, 1), (3, 2)):
        record = {"attention": {name: PUBLISHED["attention"][name] for name in names[:count]}}
        draw(record, tmp_path / f"{count}.png")
        height, width = 450 * rows, 1000
        picture = matplotlib.image.imread(tmp_path / f"{count}.png")
        assert picture.shape == (height, width, 4)
        # In the last row only the left half has ink, above the legend; a line of text may come a little over.
        panels = picture[height - 450 : height - 120, :, :3]
        assert panels[:, : width // 2].min() == 0
        assert panels[:, width // 2 + 30 :].min() == 1


def test_the_command_draws_what_its_table_shows(tmp_path, capsys):
    results, plot = tmp_path / "r.json", tmp_path / "p.png"
    results.write_text(json.dumps(PUBLISHED))
    assert run("--table", results, "--plot", plot) == 0
    assert "### FLUX.1" in capsys.readouterr().out
    assert matplotlib.image.imread(plot).shape == (900, 1000, 4)
    plot.unlink()
    results.write_text('{"machine": {}}')
    with pytest.raises(ValueError, match="holds no results of a suite"):
        run("--table", results, "--plot", plot)
    with pytest.raises(ValueError, match="draws the results that `--table` names"):
        run("--plot", plot)
    assert not plot.exists()


def test_a_picture_that_cannot_be_written_is_no_fault_of_the_table(tmp_path, monkeypatch):
    results = tmp_path / "r.json"
    results.write_text(json.dumps(PUBLISHED))

    def full(record, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(bench, "draw", full)
    with pytest.raises(OSError, match="No space left on device"):
        run("--table", results, "--plot", tmp_path / "p.png")


def run(*words):
    return run_command("bench", *words)
