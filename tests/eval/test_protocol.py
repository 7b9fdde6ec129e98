from __future__ import annotations

import json
import re

import pytest
from commands import parsed, run_command

from diffsparse import Adaptive, SparseAttentionConfig
from diffsparse.eval import run, run_videos
from diffsparse.eval.protocol import PROTOCOLS, PublishedRow, choose_protocol

WAN, HUNYUAN = "Wan-AI/Wan2.1-T2V-14B-Diffusers", "hunyuanvideo-community/HunyuanVideo"


def read_job(*words):
    return run.read_job(parsed("eval", "run", "--protocol", "scope", "--steps", 50, *words))


@pytest.mark.parametrize(
    ("model", "frames", "dense_steps"), [(WAN, 81, 0.2), ("Wan-AI/Wan2.2-T2V-A14B", 81, 0.2), (HUNYUAN, 129, 0.1)]
)
def test_size_frames_and_dense_steps_are_the_papers(model, frames, dense_steps):
    job = read_job("--model", model, "--config", "quality", "adaptive:density=0.5", "--baseline", "seacache")
    sampling = job.model.sampling
    assert (sampling.width, sampling.height, sampling.num_frames, sampling.num_inference_steps) == (
        *(1280, 720),
        frames,
        50,
    )
    # So that no run of other settings goes on in its folder.
    assert run._settings(job)["protocol"] == choose_protocol(model)
    cache, quality, adaptive = job.configs
    assert cache.kind == "cache"
    assert quality.parts == (SparseAttentionConfig(Adaptive(density=0.4), dense_steps, (0,)),)
    assert adaptive.parts == (SparseAttentionConfig(Adaptive(density=0.5), dense_steps, (0,)),)


def test_a_folder_is_known_by_its_pipeline(tiny_model, own_tiny_model):
    assert choose_protocol(str(tiny_model)) == "scope-wan"
    (own_tiny_model / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanVideoPipeline"}))
    assert choose_protocol(str(own_tiny_model)) == "scope-hunyuanvideo"


@pytest.mark.parametrize(
    "model",
    [
        "demo",
        "THUDM/CogVideoX-5b",
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
        "hunyuanvideo-community/HunyuanVideo-I2V",
    ],
)
def test_a_model_that_the_paper_has_not_measured_is_refused(model):
    with pytest.raises(ValueError, match=f"--protocol scope is for Wan 2.1, .*--model {model}"):
        read_job("--model", model)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--size", "832x480"], "--size 832x480 goes against --protocol scope, which has 1280x720"),
        (["--frames", "129"], "--frames 129 goes against --protocol scope, which has 81"),
        (["--config", "fast:dense_steps=0.1"], "--config fast:dense_steps=0.1: dense_steps=0.1 goes .* has 0.2"),
        (["--config", "fast:dense_layers=()"], r"dense_layers=\(\) goes against --protocol, which has \(0,\)"),
        (["--config", "fast", "adaptive:density=0.15"], "are the same"),
    ],
)
def test_what_goes_against_the_protocol_is_refused(more, says, monkeypatch):
    monkeypatch.setattr(run_videos, "Studio", None)
    with pytest.raises(ValueError, match=says):
        read_job("--model", WAN, *more)


def test_what_says_the_same_as_the_protocol_may_be_said():
    more = "--size", "1280x720", "--frames", "81", "--config", "fast:dense_steps=0.2,dense_layers=(0,)"
    assert (
        read_job("--model", WAN, *more).configs[0].parts
        == read_job("--model", WAN, "--config", "fast").configs[0].parts
    )


def test_the_report_has_the_published_rows_beside_ours_and_says_so(fake_run, tmp_path, capsys):
    folder = fake_run(["a cat"])
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, protocol in PROTOCOLS.items():
        manifest["settings"]["protocol"] = name
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert run_command("eval", "report", folder, "--max-megabytes", 0) == 0
        markdown = (folder / "report.md").read_text()
        rows = [line.split(" | ") for line in markdown.splitlines() if "published, not measured here" in line]
        assert len(rows) == len(protocol.rows)
        for row, published in zip(rows, protocol.rows):
            assert row[0] == f"| {published.method} on {published.model}: published, not measured here"
            found = [row[2], row[3], row[5], row[9].rstrip("×")]
            assert list(map(float, found)) == [
                published.psnr_db,
                published.ssim,
                published.lpips,
                published.speed_up,
            ]
        headline = markdown.split("\n\n")[1]
        assert headline.count("\n") == 2 + len(rows)
        page = (folder / "report.html").read_text()
        assert page.count(": published, not measured here<") == len(rows)
        in_json = json.loads((folder / "report.json").read_text())["published"]
        assert [row["source"] for row in in_json] == [protocol.source] * len(rows)
        assert [PublishedRow(**{key: row[key] for key in PublishedRow._fields}) for row in in_json] == [*protocol.rows]
        terminal = capsys.readouterr().out
        _, table = terminal.split("\nPublished, not measured here")[:2]
        for published in protocol.rows:
            numbers = f"{published.psnr_db:.2f}.*{published.ssim:.3f}.*{published.lpips:.3f}.*{published.speed_up:.2f}×"
            assert re.search(numbers, table)
        for shown in (markdown, page, terminal):
            assert "Published, not measured here: SCOPE, Tables 1 and 2" in shown
    del manifest["settings"]["protocol"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run_command("eval", "report", folder, "--max-megabytes", 0) == 0
    assert "published" not in ((folder / "report.md").read_text() + capsys.readouterr().out).lower()
    assert json.loads((folder / "report.json").read_text())["published"] == []
