from __future__ import annotations

import json
import shutil

import pytest
from commands import run_command
from noise_videos import Killed, fake_videos

from diffsparse.eval import run, run_videos
from diffsparse.eval.generate import Sampling

CONFIGS = ["fast:min_tokens=0", "adaptive:density=0.5,min_tokens=0,query_block_size=2,key_block_size=2"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\n")
    return file


def start(model, prompts, output, *more):
    argv = ["--model", model, "--prompts", prompts, "--steps", 2, "--device", "cpu", "--output", output, *more]
    return run_command("eval", "run", *argv)


def contents(folder):
    """Checksums of all videos, which files there are, and what was recorded that is not a time."""
    records = {}
    for file in folder.glob("*/*.json"):
        record = json.loads(file.read_text())
        records[file.relative_to(folder)] = (record["sha256"], record["prompt"], record["attention"])
    return records


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(tiny_model, prompts, tmp_path, monkeypatch, capsys):
    def kill_at_3(made):
        if len(made) == 3:
            raise Killed

    with monkeypatch.context() as patch:
        fake_videos(patch, kill_at_3)
        with pytest.raises(Killed):
            start(tiny_model, prompts, tmp_path / "killed", "--config", *CONFIGS)
    made = fake_videos(monkeypatch)
    assert start(tiny_model, prompts, tmp_path / "killed", "--config", *CONFIGS) == 0
    assert made == ["a cat", "a dog", "a dog", "a dog"]
    assert start(tiny_model, prompts, tmp_path / "whole", "--config", *CONFIGS) == 0
    assert len(contents(tmp_path / "whole")) == 6
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    made.clear()
    assert start(tiny_model, prompts, tmp_path / "whole", "--config", *CONFIGS) == 0
    assert made == []


def test_a_damaged_video_is_made_again_and_a_new_config_uses_the_dense_ones(tiny_model, prompts, tmp_path, monkeypatch):
    made = fake_videos(monkeypatch)
    output = tmp_path / "run"
    assert start(tiny_model, prompts, output, "--config", CONFIGS[0]) == 0
    before = contents(output)
    frame = next((output / "dense" / "001-seed0").iterdir())
    frame.write_bytes(frame.read_bytes()[:-3])
    made.clear()
    assert start(tiny_model, prompts, output, "--config", CONFIGS[0]) == 0
    assert made == ["a dog"]
    assert contents(output) == before
    (output / "dense" / "001-seed0.json").write_text("")
    made.clear()
    assert start(tiny_model, prompts, output, "--config", CONFIGS[0]) == 0
    assert made == ["a dog"]
    assert contents(output) == before
    assert start(tiny_model, prompts, output, "--config", CONFIGS[1], "--num-prompts", 2) == 0
    assert made == ["a dog", "a cat", "a dog"]


def test_a_video_that_fails_leaves_the_rest_to_be_made(tiny_model, prompts, tmp_path, monkeypatch, capsys):
    def fail_at_2(made):
        if len(made) == 2:
            raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        made = fake_videos(patch, fail_at_2)
        assert start(tiny_model, prompts, tmp_path / "run", "--config", CONFIGS[0]) == 1
        assert made == ["a cat", "a cat", "a dog", "a dog"]
    fake_videos(monkeypatch)
    shown = capsys.readouterr().out
    assert "failed: RuntimeError: out of memory" in shown
    assert "1 of 4 videos could not be made" in shown
    assert start(tiny_model, prompts, tmp_path / "run", "--config", CONFIGS[0]) == 0


def test_a_disk_that_cannot_hold_all_videos_is_told_by_numbers_before_the_first(
    tiny_model, prompts, tmp_path, monkeypatch
):
    made = fake_videos(monkeypatch)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage._replace(free=200_000))
    # 9 frames of 64 x 64 x 3 bytes a video.
    with pytest.raises(ValueError, match=r"4 videos may need 0\.4 MB, the disk has 0\.2 MB free\. Make room"):
        start(tiny_model, prompts, tmp_path / "run", "--config", CONFIGS[0])
    assert made == []


def test_baselines_stand_beside_the_configs(tiny_model, prompts, tmp_path):
    baselines = ["dense", "backend:_native_math", "firstblockcache:threshold=1e9", f"backend:native+{CONFIGS[1]}"]
    more = "--baseline", *baselines, "--config", CONFIGS[1], "--num-prompts", 1
    assert start(tiny_model, prompts, tmp_path / "run", *more, "--steps", 4) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    kinds = {config["text"]: config["kind"] for config in manifest["settings"]["configs"].values()}
    assert kinds == {
        "backend:_native_math": "dense attention by another backend",
        "firstblockcache:threshold=1e9": "cache",
        f"backend:native+{CONFIGS[1]}": "dense attention by another backend, sparse attention",
        CONFIGS[1]: "sparse attention",
    }
    assert "--baseline dense backend:_native_math" in manifest["made_by"][0]["command"]
    records = {file.parent.name: json.loads(file.read_text()) for file in (tmp_path / "run").glob("*/*.json")}
    # The same attention by another kernel differs in the last bits, if at all; a cache that skips all but two steps
    # does not.
    assert records["firstblockcache_threshold=1e9"]["sha256"] != records["dense"]["sha256"]
    assert records["firstblockcache_threshold=1e9"]["attention"]["density"] is None
    sparse = [record for name, record in records.items() if "adaptive" in name]
    assert len(sparse) == 2
    assert all(record["attention"]["density"] < 1 for record in sparse)


def test_a_record_tells_time_memory_density_and_where(tiny_model, prompts, tmp_path):
    smaller = "--num-prompts", 1, "--size", "32x32", "--frames", 5
    assert start(tiny_model, prompts, tmp_path / "run", "--config", CONFIGS[1] + ",dense_steps=0.5", *smaller) == 0
    record = json.loads(next((tmp_path / "run").glob("adaptive*/*.json")).read_text())
    assert len(record["step_seconds"]) == 2
    assert record["total_seconds"] > sum(record["step_seconds"]) > record["attention_seconds"] > 0
    dense = json.loads(next((tmp_path / "run").glob("dense/*.json")).read_text())
    assert sum(dense["step_seconds"]) > dense["attention_seconds"] > 0
    assert record["peak_memory_bytes"] is None or record["peak_memory_bytes"] > 1e7
    assert 0 < record["attention"]["overall_density"] < 1
    assert record["attention"]["transformers"][0]["dense_reasons"] == {"early step": 4}
    assert record["environment"]["versions"]["torch"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert "--steps 2 --size 32x32 --frames 5" in manifest["made_by"][0]["command"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--config", "fats"], "fats"),
        (["--baseline", "backend:toaster"], "--baseline backend:toaster: "),
        (["--baseline", "firstblockcache:treshold=1"], "treshold"),
        (["--steps", 0], "--steps"),
        (["--frames", -1], "--frames"),
        (["--size", "64"], "WIDTHxHEIGHT"),
        (["--seeds", 1, 1], "--seeds must differ"),
        (["--seeds", -1], "--seeds"),
        (["--num-prompts", 3], "1 to 2"),
        (["--model", "./nowhere"], "no folder"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", ""], "--prompts must be demo or general or a file, got nothing"),
        (["--output", "/proc/nowhere"], "--output"),
        (["--output", "/dev/full"], "--output"),
        (["--frames", 10**9], "disk"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(tiny_model, prompts, tmp_path, monkeypatch, more, says):
    monkeypatch.setattr(run_videos, "Studio", None)
    with pytest.raises(ValueError, match=says):
        start(tiny_model, prompts, tmp_path / "run", *more)


def test_results_of_other_settings_are_not_mixed_in(tiny_model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "make_videos", lambda *args: 0)
    start(tiny_model, prompts, tmp_path / "run")
    with pytest.raises(ValueError, match="sampling"):
        start(tiny_model, prompts, tmp_path / "run", "--steps", 3)


def test_a_model_that_does_not_say_how_it_is_called_has_to_be_told(own_tiny_model, prompts, tmp_path, monkeypatch):
    (own_tiny_model / "demo.json").unlink()
    with pytest.raises(ValueError, match="--size, --frames and --steps"):
        start(own_tiny_model, prompts, tmp_path / "run")
    told = []
    monkeypatch.setattr(run, "make_videos", lambda job, *rest: told.append(job.model.sampling) or 0)
    assert start(own_tiny_model, prompts, tmp_path / "run", "--size", "64x48", "--frames", 5) == 0
    assert told == [Sampling(height=48, width=64, num_frames=5, num_inference_steps=2)]


@pytest.mark.parametrize(("variable", "value"), [("RANK", "abc"), ("RANK", "-1"), ("WORLD_SIZE", "0")])
def test_what_no_launcher_sets_is_said(tiny_model, prompts, tmp_path, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable} in the environment must be .* got '{value}'. Unset it"):
        start(tiny_model, prompts, tmp_path / "run")


def test_ranks_begin_at_different_pairs(tiny_model, prompts, tmp_path, monkeypatch):
    starts = []
    monkeypatch.setattr(run, "make_videos", lambda job, *rest: starts.append(job.pairs[0].prompt) or 0)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        start(tiny_model, prompts, tmp_path / "run")
    assert starts == [0, 1]
