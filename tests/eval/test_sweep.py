from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math

import numpy as np
import pytest

from diffsparse.eval import sweep
from diffsparse.eval.generate import Generation
from diffsparse.eval.lpips_metric import Lpips
from diffsparse.eval.metrics import psnr_db, ssim
from diffsparse.eval.sweep_results import Pair, Score, SweepResults, Variant
from diffsparse.strategies.adaptive import Adaptive

VARIANTS = {
    Variant("row", density, tail): Adaptive(density=density, tail=tail)
    for tail in (False, True)
    for density in (0.2, 0.5)
}
DENSE = np.full((2, 16, 16, 3), 0.5, dtype=np.float32)


@pytest.fixture
def generated(monkeypatch):
    """Stands for models and their videos: what was asked for, prompt by prompt; `stop_at` interrupts at that video."""
    calls, enabled = [], []
    monkeypatch.setattr(sweep, "load_pipeline", lambda folder, device: None)

    @contextlib.contextmanager
    def sparse_attention(pipe, config):
        enabled.append(config.strategy)
        yield lambda: argparse.Namespace(density=0.25)
        enabled.pop()

    monkeypatch.setattr(sweep, "sparse_attention", sparse_attention)

    def generate(pipe, prompt, seed, sampling):
        strategy = enabled[-1] if enabled else None
        if len(calls) == generate.stop_at:
            raise KeyboardInterrupt
        calls.append((prompt, seed, strategy))
        noise = np.random.default_rng(len(prompt)).uniform(0, 0.2, DENSE.shape).astype(np.float32)
        frames = DENSE if strategy is None else DENSE + noise * (1 - strategy.density)
        return Generation(frames, (1.0, 2.0) if strategy is None else (0.5, 0.25), 5.0)

    generate.stop_at = -1
    generate.calls = calls
    monkeypatch.setattr(sweep, "generate", generate)
    return generate


def run(model, *words, strategies=VARIANTS, others=()):
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser, prompts=3, densities=[0.5])
    args = parser.parse_args(["--model", str(model), "--device", "cpu", *map(str, words)])
    return sweep.carry_out(args, "name", lambda sampling, load: (strategies, dict(others)))


def test_a_prompt_has_all_its_videos_before_the_next_and_they_are_scored_against_its_dense_one(
    tiny_model, tmp_path, generated
):
    results = run(tiny_model, "--output", tmp_path / "r.json")
    assert [strategy for _, _, strategy in generated.calls] == 3 * [None, *VARIANTS.values()]
    assert all(len({prompt for prompt, _, _ in generated.calls[i * 5 : i * 5 + 5]}) == 1 for i in range(3))
    pair, variant = next(iter(results.scores))
    sparse = DENSE + np.random.default_rng(len(pair.prompt)).uniform(0, 0.2, DENSE.shape).astype(np.float32) * (
        1 - variant.density
    )
    score = results.scores[pair, variant]
    assert score.psnr_db == pytest.approx(np.mean(psnr_db(DENSE, sparse)))
    assert score.ssim == pytest.approx(np.mean(ssim(DENSE, sparse)))
    assert (score.density, score.seconds, score.dense_seconds) == (0.25, 0.75, 3.0)
    assert SweepResults.read(tmp_path / "r.json").scores == results.scores


def test_lpips_judges_where_its_backbone_is_at_hand_and_the_file_says_on_which(
    tiny_model, tmp_path, generated, random_backbones, capsys
):
    file, backbone = tmp_path / "r.json", random_backbones.file("vgg")
    with random_backbones.trusted():
        results = run(tiny_model, "--output", file, "--lpips-net", "vgg", "--lpips-backbone", backbone)
        judge = Lpips(backbone, "vgg")
    assert "LPIPS" not in capsys.readouterr().out
    assert results.settings["lpips_net"] == "vgg"
    (pair, variant), score = next(iter(results.scores.items()))
    noise = np.random.default_rng(len(pair.prompt)).uniform(0, 0.2, DENSE.shape).astype(np.float32)
    assert score.lpips == pytest.approx(np.mean(judge(DENSE, DENSE + noise * (1 - variant.density))))
    assert SweepResults.read(file).scores == results.scores
    with pytest.raises(ValueError, match="lpips_net: vgg instead of None"):
        run(tiny_model, "--output", file)


def test_without_lpips_the_reason_is_said(tiny_model, tmp_path, generated, empty_cache, capsys):
    results = run(tiny_model, "--output", tmp_path / "r.json")
    assert "LPIPS n/a: AlexNet is not at hand" in capsys.readouterr().out
    assert "lpips_net" not in results.settings
    assert {score.lpips for score in results.scores.values()} == {None}


def test_frames_that_are_too_small_for_lpips_are_judged_without(
    own_tiny_model, tmp_path, generated, random_backbones, capsys
):
    sampling = json.loads((own_tiny_model / "demo.json").read_text())
    (own_tiny_model / "demo.json").write_text(json.dumps(sampling | {"height": 16}))
    backbone = random_backbones.file("squeeze")
    with random_backbones.trusted():
        results = run(
            *(own_tiny_model, "--output", tmp_path / "r.json"),
            *("--lpips-net", "squeeze", "--lpips-backbone", backbone),
        )
    assert "LPIPS n/a: it needs frames of at least 17 pixels a side, got 64 × 16." in capsys.readouterr().out
    assert "lpips_net" not in results.settings
    assert {score.lpips for score in results.scores.values()} == {None}


def test_what_began_without_lpips_goes_on_without_it(tiny_model, tmp_path, generated, random_backbones, capsys):
    file = tmp_path / "r.json"
    generated.stop_at = 7
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, "--output", file)
    generated.stop_at = -1
    with random_backbones.trusted():
        results = run(
            tiny_model, "--output", file, "--lpips-net", "vgg", "--lpips-backbone", random_backbones.file("vgg")
        )
    assert f"LPIPS n/a: {file} began without it, and goes on so." in capsys.readouterr().out
    assert len(results.scores) == 12
    assert {score.lpips for score in results.scores.values()} == {None}


def test_results_from_before_lpips_are_read(tiny_model, tmp_path, generated):
    file = tmp_path / "r.json"
    results = run(tiny_model, "--output", file)
    contents = json.loads(file.read_text())
    for video in contents["videos"]:
        del video["lpips"]
    file.write_text(json.dumps(contents))
    assert SweepResults.read(file).scores == results.scores


@pytest.mark.parametrize("others", [{}, {"dials": 1}])
def test_what_another_process_has_written_meanwhile_is_not_written_over(
    tiny_model, tmp_path, generated, monkeypatch, others
):
    file, make = tmp_path / "r.json", sweep.generate
    one = {Variant("of another", 0.5, True): Adaptive(density=0.5)}

    def generate(*args):
        monkeypatch.setattr(sweep, "generate", make)
        run(tiny_model, "--output", file, "--prompts", 1, strategies=one, others=others)
        return make(*args)

    monkeypatch.setattr(sweep, "generate", generate)
    if others:
        with pytest.raises(ValueError, match=r"r\.json holds results of other settings \(dials.*Name another --output"):
            run(tiny_model, "--output", file)
        assert {variant for _, variant in SweepResults.read(file).scores} == set(one)
    else:
        assert len(run(tiny_model, "--output", file).scores) == 1 + 3 * len(VARIANTS)
        assert len(SweepResults.read(file).scores) == 1 + 3 * len(VARIANTS)


def test_an_interrupted_run_goes_on_where_it_was(tiny_model, tmp_path, generated):
    file = tmp_path / "r.json"
    generated.stop_at = 7
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, "--output", file)
    assert len(SweepResults.read(file).scores) == 4 + 1
    generated.stop_at = -1
    generated.calls.clear()
    results = run(tiny_model, "--output", file)
    assert len(results.scores) == 12
    assert len(generated.calls) == (1 + 3) + (1 + 4)  # a dense video of each prompt that lacks some
    generated.calls.clear()
    run(tiny_model, "--output", file)
    assert generated.calls == []


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_share_the_work_out_and_merged_are_the_whole(tiny_model, tmp_path, generated, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    seeds = "--seeds", 0, 7
    for number in range(1, count + 1):
        run(tiny_model, *seeds, "--shard", f"{number}/{count}")
    assert len(generated.calls) == 6 * 5  # each prompt and seed once
    merged = run(tiny_model, "--merge", *tmp_path.glob(f"name-*-of-{count}.json"), "--output", tmp_path / "all.json")
    whole = run(tiny_model, *seeds, "--output", tmp_path / "whole.json")
    assert merged.scores == whole.scores
    assert SweepResults.read(tmp_path / "all.json").scores == whole.scores


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "1/0", "a/b", "-1/3"])
def test_a_shard_that_is_none_is_refused(tiny_model, shard, capsys):
    with pytest.raises(SystemExit):
        run(tiny_model, f"--shard={shard}")
    assert "expected I/N" in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed(tiny_model, tmp_path, generated):
    files = [tmp_path / f"{name}.json" for name in "abc"]
    run(tiny_model, "--output", files[0])
    run(tiny_model, "--output", files[1], "--steps", 4)
    run(tiny_model, "--output", files[2], others={"dials": 1})
    for words, others in ((["--steps", 2], {}), (["--dense-steps", 0.5], {}), ([], {"dials": 2})):
        with pytest.raises(ValueError, match="of other settings"):
            run(tiny_model, "--output", files[0], *words, others=others)
    for other in files[1:]:
        with pytest.raises(ValueError, match="of different settings"):
            run(tiny_model, "--merge", files[0], other)


def test_only_pairs_with_every_variant_are_compared(tiny_model, tmp_path, generated):
    file = tmp_path / "r.json"
    generated.stop_at = 12
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, "--output", file)
    results = SweepResults.read(file)
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in generated.calls))
    assert len(prompts) == 3
    assert [pair.prompt for pair in results.complete_pairs()] == prompts[:2]
    assert "1 more left out" in results.coverage()


def test_without_a_complete_pair_there_is_no_table(tmp_path):
    videos = [
        {"prompt": prompt, "seed": 0, "row": row, "at_density": 0.5, "tail": False, "psnr_db": 20.0}
        | {"ssim": 0.9, "density": 0.5, "seconds": 1.0, "dense_seconds": 2.0}
        for prompt, row in zip("ab", "xy")
    ]
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"settings": {}, "videos": videos}))
    with pytest.raises(ValueError, match="nothing to compare"):
        SweepResults.read(file).complete_pairs()


@pytest.mark.parametrize("contents", ["{}", "[", '{"settings": {}, "videos": [{}]}'])
def test_a_damaged_file_is_named(tmp_path, contents):
    file = tmp_path / "damaged.json"
    file.write_text(contents)
    with pytest.raises(ValueError, match=r"damaged\.json holds no results"):
        SweepResults.read(file)


@pytest.mark.parametrize(
    "change", [{"psnr_db": None}, {"ssim": []}, {"density": "x"}, {"seconds": ...}, {"at_density": None}, {"seed": 0.5}]
)
def test_a_damaged_score_is_named(tmp_path, change):
    results, file = SweepResults({}), tmp_path / "damaged.json"
    results.scores[Pair("a fox", 0), Variant("row", 0.5, False)] = Score(20.0, 0.9, 0.5, 1.0, 2.0)
    results.write(file)
    video = json.loads(file.read_text())["videos"][0] | change
    file.write_text(json.dumps({"settings": {}, "videos": [{k: v for k, v in video.items() if v is not ...}]}))
    (name,) = change
    with pytest.raises(ValueError, match=rf"damaged\.json holds no results .* it\.videos\[0\].*{name}"):
        SweepResults.read(file)


def test_settings_of_which_no_table_can_be_made_are_refused_before_one_is_written(tiny_model, tmp_path):
    results, file = SweepResults({"sampling": "20 steps", "device": "cpu"}), tmp_path / "damaged.json"
    results.scores[Pair("a fox", 0), Variant("row", 0.5, False)] = Score(20.0, 0.9, 0.5, 1.0, 2.0)
    results.write(file)
    with pytest.raises(ValueError, match=r"damaged\.json holds no results .*settings has no dense_steps"):
        run(tiny_model, "--merge", file, "--output", tmp_path / "all.json")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.json"]


@pytest.mark.parametrize("count", [0, 17])
def test_prompts_that_there_are_not_are_refused(tiny_model, tmp_path, generated, count):
    with pytest.raises(ValueError, match="--prompts must be 1 to 16"):
        run(tiny_model, "--prompts", count, "--output", tmp_path / "r.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--densities", 0.5, 25], "--densities must be above 0 and at most 1, got 25"),
        (["--dense-steps", 20], "--dense-steps must be a share from 0 to 1, got 20"),
        (["--steps", 0], "--steps must be at least 1, got 0"),
        (["--seeds", 0, -1], "--seeds must be between 0 and"),
        (["--output", "/nowhere/r.json"], "--output must name a file in a folder that exists"),
        (["--merge", "/nowhere/r.json"], "/nowhere/r.json holds no results that can be read"),
    ],
)
def test_what_is_wrong_is_found_before_a_video_is_made(tiny_model, generated, words, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_model, *words)
    assert generated.calls == []


def test_equal_videos_survive_the_file(tiny_model, tmp_path, generated):
    same = {Variant("dense", 1.0, False): Adaptive(density=1.0)}
    results = run(tiny_model, "--output", tmp_path / "r.json", strategies=same)
    found = SweepResults.read(tmp_path / "r.json").scores
    assert found == results.scores
    assert {score.psnr_db for score in itertools.islice(found.values(), 3)} == {float("inf")}


def test_videos_that_are_not_numbers_survive_the_file(tmp_path):
    results, pair = SweepResults({}), Pair("a fox", 0)
    score = Score(math.nan, math.nan, 0.25, 1.0, 2.0, math.nan)
    results.scores[pair, Variant("row", 0.5, False)] = score
    results.write(tmp_path / "a.json")
    (found,) = SweepResults.read(tmp_path / "a.json").scores.values()
    assert repr(found) == repr(score)
