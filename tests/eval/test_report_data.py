from __future__ import annotations

import json

import pytest

from diffsparse.eval.lpips_metric import NoLpips
from diffsparse.eval.report_data import collect
from diffsparse.eval.run_folder import Pair, RunFolder

NO_LPIPS = NoLpips("alex", "n/a: none")


def test_means_worst_and_times_are_over_the_videos_of_a_config(fake_run):
    run = fake_run(["a", "b"], ["fast", "slow"], seeds=[0, 1], error=lambda config, p, seed: 0.1 + p / 10 + seed / 20)
    data = collect([run], NO_LPIPS)
    assert json.loads(json.dumps(data, allow_nan=False))["videos"]
    fast = next(config for config in data["configs"] if config["name"] == "fast")
    videos = [video for video in data["videos"] if video["config"] == "fast"]
    psnr = [video["scores"]["psnr_db"] for video in videos]
    assert fast["num_videos"] == 4
    assert fast["scores"]["psnr_db"]["mean"] == pytest.approx(sum(p["mean"] for p in psnr) / 4)
    assert fast["scores"]["psnr_db"]["worst"] == min(min(p["per_frame"]) for p in psnr)
    assert fast["scores"]["psnr_db"]["worst_of"].items() >= {"prompt_index": 1, "seed": 1}.items()
    assert fast["scores"]["lpips"] == NO_LPIPS.reason
    assert fast["speed_up"] == pytest.approx((10 / 5 + 10 / 6) / 2)
    assert (fast["attention_seconds"], fast["dense_attention_seconds"]) == ((1.5 + 2.5) / 2, 4)
    assert fast["overall_density"] == 0.4
    assert fast["dense_reasons"] == {"early step": 8}


def test_configs_are_compared_on_the_same_prompts_and_seeds(fake_run):
    run = fake_run(["a", "b", "c"], ["fast", "slow"], error=lambda config, p, s: 0.2 if config == "fast" else 0.1)
    data = collect([run], NO_LPIPS)
    psnr = {(v["config"], v["prompt_index"]): v["scores"]["psnr_db"]["mean"] for v in data["videos"]}
    difference = next(d for d in data["differences"] if d["metric"] == "psnr_db")
    assert (difference["first"], difference["second"], difference["num_pairs"]) == ("fast", "slow", 3)
    assert difference["mean"] == pytest.approx(sum(psnr["fast", p] - psnr["slow", p] for p in range(3)) / 3)
    assert difference["interval"][0] <= difference["mean"] <= difference["interval"][1] < 0
    assert difference["sign_test"] == pytest.approx(2 / 2**3)


def test_equal_videos_are_counted_and_left_out_of_the_mean(fake_run):
    run = fake_run(["a", "b"], error=lambda config, prompt, seed: 0.1 * prompt)
    (config,) = collect([run], NO_LPIPS)["configs"]
    psnr = config["scores"]["psnr_db"]
    assert psnr["num_identical"] == 1
    assert 20 < psnr["mean"] < 40
    assert psnr["interval"] is None


def test_missing_videos_are_listed_with_why(fake_run):
    run = fake_run(["a", "b", "c"])
    folder = RunFolder(run)
    folder.remove("fast", Pair(0, 0))
    folder.note_failure("fast", Pair(0, 0), "it was dark")
    folder.remove("dense", Pair(2, 0))
    data = collect([run], NO_LPIPS)
    assert [(m["prompt"], m["reason"]) for m in data["missing"]] == [
        ("a", "it was dark"),
        ("c", "the dense video is not made yet"),
    ]
    assert [video["prompt"] for video in data["videos"]] == ["b"]


@pytest.mark.parametrize("is_scored", [True, False])
@pytest.mark.parametrize(("names", "blamed"), [(["dense"], "dense"), (["fast"], "fast"), (["dense", "fast"], "fast")])
def test_a_video_that_lost_a_frame_is_missing_and_the_others_are_there(fake_run, names, blamed, is_scored):
    run = fake_run(["a", "b"])
    if is_scored:
        collect([run], NO_LPIPS)
    for name in names:
        (RunFolder(run).frames(name, Pair(0, 0)) / "00001.png").unlink()
    data = collect([run], NO_LPIPS)
    assert [(m["prompt"], m["reason"]) for m in data["missing"]] == [
        ("a", f"the frames of the {blamed} video are not those that were made: the run's own command makes it anew")
    ]
    assert [video["prompt"] for video in data["videos"]] == ["b"]


def test_a_run_without_any_video_has_a_report_too(fake_run):
    run = fake_run(["a"])
    for config in ("dense", "fast"):
        RunFolder(run).remove(config, Pair(0, 0))
    (config,) = collect([run], NO_LPIPS)["configs"]
    assert config["num_videos"] == 0
    assert config["speed_up"] is None


def test_times_of_different_processes_make_no_speed_up(fake_run):
    run = fake_run(["a"])
    file = run / "fast" / "000-seed0.json"
    record = json.loads(file.read_text())
    record["process"] = "b"
    file.write_text(json.dumps(record))
    data = collect([run], NO_LPIPS)
    assert data["videos"][0]["speed_up"] is None
    assert data["configs"][0]["speed_up"] is None


def test_a_run_of_before_attention_seconds_were_counted_has_none(fake_run):
    run = fake_run(["a"])
    for config in ("dense", "fast"):
        file = run / config / "000-seed0.json"
        record = json.loads(file.read_text())
        del record["attention_seconds"]
        file.write_text(json.dumps(record))
    (config,) = collect([run], NO_LPIPS)["configs"]
    assert (config["attention_seconds"], config["dense_attention_seconds"]) == (None, None)


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no folder of `diffsparse eval run`"):
        collect([tmp_path], NO_LPIPS)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("dense", {"total_seconds": None}, "it.total_seconds is None"),
        ("fast", {"total_seconds": "5"}, "it.total_seconds is '5'"),
        ("fast", {"total_seconds": 0}, "it.total_seconds is 0"),
        ("fast", {"seconds_per_step": 0.0}, "it.seconds_per_step is 0.0"),
        ("fast", {"total_seconds": 1e-308}, "it.total_seconds is 1e-308"),
        ("dense", {"total_seconds": 1e308}, "it.total_seconds is 1e+308"),
        ("dense", {"process": ...}, "it has no process"),
        ("fast", {"process": ...}, "it has no process"),
        ("dense", {"attention_seconds": "4"}, "it.attention_seconds is '4'"),
        ("fast", {"attention": None}, "it.attention is None"),
        ("fast", {"attention": {"density": 0.25, "transformers": []}}, "it.attention has no overall_density"),
    ],
)
def test_a_video_of_a_damaged_record_is_missing_and_the_others_are_there(fake_run, name, change, says):
    run = fake_run(["a", "b"])
    file = run / name / "000-seed0.json"
    record = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))
    data = collect([run], NO_LPIPS)
    assert [(m["prompt"], m["reason"]) for m in data["missing"]] == [
        ("a", f"{file} is damaged ({says}): remove it, and the run's own command goes on")
    ]
    assert [video["prompt"] for video in data["videos"]] == ["b"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 3}, "head_classes is not of 1 x 3"),
        ({"num_layers": 10**30}, f"head_classes is not of {10**30} x 2"),
        ({"head_densities": [[0.5]]}, "head_densities is not of 1 x 2"),
        ({"head_classes": []}, "head_classes is not of 1 x 2"),
    ],
)
def test_so_is_one_whose_heads_are_fewer_or_more_than_it_says(fake_run, change, says):
    run = fake_run(["a"])
    file = run / "fast" / "000-seed0.json"
    record = json.loads(file.read_text())
    record["attention"]["transformers"][0] |= change
    file.write_text(json.dumps(record))
    (missing,) = collect([run], NO_LPIPS)["missing"]
    assert f"is damaged (it.attention.transformers[0].{says})" in missing["reason"]


@pytest.mark.parametrize(
    ("change", "says"),
    [({"sampling": {}}, "it.settings.sampling has no width"), ({"protocol": ["scope"]}, "it.settings.protocol is")],
)
def test_a_manifest_that_lacks_what_a_report_needs_is_named(fake_run, change, says):
    file = fake_run(["a"]) / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"settings": manifest["settings"] | change}))
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged \(TypeError: {says}"):
        collect([file.parent], NO_LPIPS)
