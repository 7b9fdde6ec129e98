"""What the videos of a run are does not depend on who makes them, how often they are killed, or what fails beside."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time

import pytest
from commands import run_command
from noise_videos import Killed, fake_videos
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from diffsparse.eval import run, run_folder, run_videos
from diffsparse.eval.run_folder import Pair, RunFolder

CONFIGS = [f"adaptive:density={d},min_tokens=0,query_block_size=2,key_block_size=2" for d in (0.3, 0.5, 0.7)]
PROMPTS = ["a cat", "a dog", "a cow", "a hen"]


@pytest.fixture
def arguments(tiny_model, tmp_path):
    """Of a run of two steps by three configs into a folder of this name."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def make(output, *more):
        words = ["--model", tiny_model, "--prompts", prompts, "--steps", 2, "--device", "cpu"]
        return list(map(str, [*words, "--config", *CONFIGS, "--output", tmp_path / output, *more]))

    return make


def report_of(folder):
    """What the report says, but for times, memory, processes and paths, which differ from run to run."""
    code = run_command("eval", "report", folder, "--max-megabytes", 0)
    data = json.loads((folder / "report.json").read_text())
    videos = [
        {key: video[key] for key in ("config", "prompt", "seed", "scores", "density", "attention")}
        for video in data["videos"]
    ]
    configs = [{key: config[key] for key in ("name", "text", "kind", "scores", "density")} for config in _kinds(data)]
    return {"code": code, "videos": videos, "configs": configs, "missing": data["missing"]}


def _kinds(data):
    of = data["runs"][0]["settings"]["configs"]
    return [config | {"kind": of[config["name"]]["kind"]} for config in data["configs"]]


def test_processes_of_a_launcher_make_what_one_makes_and_each_video_once(arguments, tmp_path, monkeypatch, capfd):
    """As `torchrun` and `accelerate launch` start them, but forked: nothing has to be imported again."""
    fewer = "--num-prompts", 2, "--seeds", 0, 1, "--config", CONFIGS[0]
    fake_videos(monkeypatch)
    assert run_command("eval", "run", *arguments("one", *fewer)) == 0
    capfd.readouterr()
    # One alone would be done before the other begins.
    both, have_met = multiprocessing.get_context("fork").Barrier(2), []

    def meet(made):
        if not have_met:
            have_met.append(both.wait(60))

    fake_videos(monkeypatch, meet)
    two = LaunchConfig(1, 1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
    assert elastic_launch(two, run_command)("eval", "run", *arguments("two", *fewer)) == {0: 0, 1: 0}
    made = re.findall(r"of 8: (.+): [\d.]+ s", capfd.readouterr().out)
    assert len(made) == len(set(made)) == 8
    processes = {json.loads(file.read_text())["process"] for file in (tmp_path / "two").glob("*/*.json")}
    assert len(processes) == 2
    assert report_of(tmp_path / "two") == report_of(tmp_path / "one")


@pytest.mark.parametrize(
    ("option", "warm_up"), [("", [(4, {})]), (",dense_quantization=int8", [(0, {"early step, in int8": 4}), (4, {})])]
)
def test_the_first_video_follows_after_a_step_of_each_kind(arguments, monkeypatch, option, warm_up):
    ran, generate = [], run_videos.generate

    def generate_and_count(pipe, *args):
        made = generate(pipe, *args)
        if pipe.is_sparse_attention_enabled:
            (counted,) = pipe.sparse_attention_report().transformers
            ran.append((counted.sparse_calls, counted.dense_reasons))
        return made

    monkeypatch.setattr(run_videos, "generate", generate_and_count)
    one = "--num-prompts", 1, "--config", f"{CONFIGS[0]},dense_steps=0.5{option}"
    assert run_command("eval", "run", *arguments("one", *one)) == 0
    assert ran[:-1] == warm_up


def test_who_is_left_makes_the_rest_when_the_other_is_killed(arguments, tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")
    reached = fork.Event()

    def stop(made):
        # The second process hangs in its second prompt until it is killed.
        if os.environ["RANK"] == "1" and made[-1] == PROMPTS[3]:
            reached.set()
            signal.pause()

    def rank(number):
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2"}
        sys.exit(run_command("eval", "run", *arguments("killed")))

    with monkeypatch.context() as patch:
        fake_videos(patch, stop)
        ranks = [fork.Process(target=rank, args=(number,)) for number in (0, 1)]
        ranks[1].start()
        try:
            assert reached.wait(60)
            ranks[0].start()
            # It comes to the pair that the other holds when all else is done.
            deadline = time.monotonic() + 60
            while len(list((tmp_path / "killed").glob("*/*.json"))) < 12:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert ranks[0].is_alive()
        finally:
            os.kill(ranks[1].pid, signal.SIGKILL)
        ranks[0].join(60)
        assert ranks[0].exitcode == 0
        ranks[1].join()
    fake_videos(monkeypatch)
    with RunFolder(tmp_path / "killed").claim(Pair(3, 0), wait=False) as mine:
        assert mine
    assert run_command("eval", "run", *arguments("whole")) == 0
    killed = report_of(tmp_path / "killed")
    assert killed == report_of(tmp_path / "whole")
    assert (killed["code"], len(killed["videos"])) == (0, 12)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_twice_anywhere_ends_as_an_uninterrupted_one(arguments, tmp_path, monkeypatch, seed):
    anywhere = random.Random(seed)
    left = anywhere.randrange(1, 60)

    def count_down():
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    def before_it(function):
        def counted(*args, **kwargs):
            count_down()
            return function(*args, **kwargs)

        return counted

    fake_videos(monkeypatch)
    assert run_command("eval", "run", *arguments("whole")) == 0
    with monkeypatch.context() as patch:
        fake_videos(patch, lambda made: count_down())
        for name in ("write_images", "write_json", "_checksum"):
            patch.setattr(run_folder, name, before_it(getattr(run_folder, name)))
        num_kills = 0
        while num_kills < 2:
            try:
                assert run_command("eval", "run", *arguments("killed")) == 0
                pytest.fail("it was to be killed")
            except Killed:
                num_kills += 1
                left = anywhere.randrange(1, 20)
    assert run_command("eval", "run", *arguments("killed")) == 0
    assert report_of(tmp_path / "killed") == report_of(tmp_path / "whole")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_more_costs_no_video_but_its_own(arguments, tmp_path, monkeypatch, capsys, code):
    fake_videos(monkeypatch)
    write_images = run_folder.write_images

    def write(folder, frames):
        if "001-seed0" in str(folder):
            raise OSError(code, os.strerror(code))
        write_images(folder, frames)

    def no_reason(*args):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_images", write)
        patch.setattr(RunFolder, "note_failure", no_reason)
        assert run_command("eval", "run", *arguments("run")) == 1
    shown = capsys.readouterr().out
    assert os.strerror(code) in shown
    assert "4 of 16 videos could not be made" in shown
    assert len(list((tmp_path / "run").glob("*/*.json"))) == 12
    assert not list((tmp_path / "run").glob("*/.*unfinished*"))
    assert run_command("eval", "run", *arguments("run")) == 0


def test_no_hour_is_spent_on_a_video_that_the_disk_cannot_hold(arguments, monkeypatch, capsys):
    made = fake_videos(monkeypatch)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(run, "_check_room", lambda *of: None)
    monkeypatch.setattr(run_videos.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert run_command("eval", "run", *arguments("run")) == 1
    assert made == []
    # 9 frames of 64 x 64 x 3 bytes.
    assert "failed: OSError: the video may need 0.1 MB, the disk has 0.0 MB free" in capsys.readouterr().out


def test_a_config_that_the_model_cannot_have_is_found_before_the_first_video(arguments, tmp_path, monkeypatch):
    made = fake_videos(monkeypatch)
    for config in ("fast:dense_layers=(99,)", "taylorseercache:cache_identifiers=['nowhere']"):
        with pytest.raises(ValueError, match=r"--config .* does not go with --model .*(99|nothing to keep)"):
            run_command("eval", "run", *arguments("run", "--config", config))
    assert made == []
    # Nor does the folder wait for its videos.
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_model_that_cannot_be_loaded_is_one_error_and_not_one_a_video(own_tiny_model, arguments):
    (own_tiny_model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="broken-model"):
        run_command("eval", "run", *arguments("run", "--model", own_tiny_model))
