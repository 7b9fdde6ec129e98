"""The command: what it writes, that it is true, and what it refuses before a model is loaded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from page_reader import HOSTILE, Page

import diffsparse.config
from diffsparse.eval import cli, inspect_command
from diffsparse.eval.generate import Sampling, generate, load_pipeline
from diffsparse.eval.named_config import read_config
from diffsparse.speed_check import SpeedCheck

SMALL = "min_tokens=0,dense_steps=0.4"
CONFIG = f"adaptive:density=0.3,query_block_size=8,key_block_size=8,sampled_rows=8,{SMALL}"


def run(model, output, *more, config=CONFIG):
    argv = ["inspect", "--model", model, "--config", config, "--device", "cpu", "--output", output, *more]
    return cli.main([str(word) for word in argv])


def names_in(folder):
    return {file.name for file in folder.iterdir()}


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect") / "out"
    folder.mkdir()
    # Of an earlier run, and something else.
    (folder / "map_transformer_layer7_head7_step7.png").touch()
    (folder / "mine.png").touch()
    assert run(tiny_model, folder, "--prompt", HOSTILE, "--seed", 3, "--at-steps", "0.2", "0.5") == 0
    return folder


def test_a_run_writes_page_pictures_and_numbers(written):
    data = json.loads((written / "inspect.json").read_text())
    maps = {shown["file"] for shown in data["maps"]}
    assert names_in(written) == {"inspect.html", "inspect.json", "heads.png", "mine.png"} | maps
    assert {shown["step"] for shown in data["maps"]} == {1}  # 0.5 of 3 steps; 0.2 is a dense one
    assert data["map_steps"] == [0, 1]
    assert data["prompt"] == HOSTILE.strip()


def test_the_numbers_are_those_of_the_run(written, tiny_model):
    data = json.loads((written / "inspect.json").read_text())
    pipe = load_pipeline(tiny_model, "cpu")
    pipe.enable_sparse_attention(read_config(CONFIG))
    generate(pipe, HOSTILE.strip(), 3, Sampling.read(tiny_model))
    report = pipe.sparse_attention_report()
    assert data["summary"]["density"] == report.density
    assert data["summary"]["overall_density"] == report.overall_density
    (transformer,) = data["transformers"]
    assert transformer["dense_reasons"] == report.transformers[0].dense_reasons
    assert [layer["dense"] for layer in transformer["steps"][0]["layers"]] == ["early step"] * 2
    sparse = [layer for step in transformer["steps"][1:] for layer in step["layers"]]
    recalls = [head["recall"] for layer in sparse for head in layer["heads"]]
    errors = [head["error"] for layer in sparse for head in layer["heads"]]
    assert len(recalls) == 2 * 2 * 2
    assert data["summary"]["recall"] == pytest.approx(sum(recalls) / 8)
    assert data["summary"]["error"] == pytest.approx(sum(errors) / 8)
    assert 0 < min(recalls) < max(recalls) < 1
    for name in ("incoherence_own_order", "incoherence_plan_order"):
        incoherences = [head[name] for layer in sparse for head in layer["heads"]]
        assert data["summary"][name] == pytest.approx(sum(incoherences) / 8)
        assert min(incoherences) > 1
    assert data["summary"]["incoherence_own_order"] != data["summary"]["incoherence_plan_order"]
    last_classes = [[head["class"] for head in layer["heads"]] for layer in transformer["steps"][2]["layers"]]
    assert last_classes == report.transformers[0].head_classes
    worst = max(transformer["heads"], key=lambda head: head["error"])
    assert data["summary"]["worst_head"] == {name: worst[name] for name in ("transformer", "layer", "head", "error")}


def test_nothing_is_timed_or_left_dense_for_being_slow_here(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(SpeedCheck, "time", lambda *args: pytest.fail("timed"))
    monkeypatch.setattr(diffsparse.config, "MIN_TOKENS", 0)
    assert run(tiny_model, tmp_path, config=CONFIG.replace("min_tokens=0,", "")) == 0
    assert json.loads((tmp_path / "inspect.json").read_text())["summary"]["density"] < 1


def test_plans_from_a_file_with_an_umlaut_have_a_page_in_the_locale_c(tiny_model, tmp_path):
    plans = str(tmp_path / "plän.safetensors")
    made_by = ["--strategy", CONFIG, "--prompts", "1", "--device", "cpu", "--output", plans]
    assert cli.main(["calibrate", "--model", str(tiny_model), *made_by]) == 0
    words = ["inspect", "--model", tiny_model, "--config", plans, "--device", "cpu", "--output", tmp_path / "out"]
    # There Python makes no letter of its two bytes.
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-m", "diffsparse.eval", *words], env=os.environ | locale, check=False)
    assert done.returncode == 0
    for name in ("inspect.html", "inspect.json"):
        assert r"pl\udcc3\udca4n" in (tmp_path / "out" / name).read_text("utf-8")


def test_the_page_stands_alone_and_a_hostile_prompt_is_only_text(written):
    html = (written / "inspect.html").read_text()
    page = Page(html)
    outside = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(outside) == len(json.loads((written / "inspect.json").read_text())["maps"])
    assert all(value.startswith("data:image/png;base64,") for value in outside)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", html)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert [dict(a).get("type") for tag, a in page.tags if tag == "script"] == ["application/json", None]
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.tags for name in attributes)
    assert HOSTILE.strip() in page.text


def test_a_run_without_sparse_attention_says_why(tiny_model, tmp_path, capsys):
    assert run(tiny_model, tmp_path, config=f"dense:{SMALL}") == 0
    assert "Sparse attention never ran: early step; the strategy keeps it dense." in capsys.readouterr().out
    data = json.loads((tmp_path / "inspect.json").read_text())
    assert data["summary"]["recall"] is data["summary"]["incoherence_plan_order"] is None
    heads = data["transformers"][0]["heads"]
    assert {(head["class"], head["density"], head["recall"], head["error"]) for head in heads} == {("dense", 1, 1, 0)}
    text = Page((tmp_path / "inspect.html").read_text()).text
    assert "Sparse attention never ran" in text
    assert "8 of 12 attention calls were dense: the strategy keeps it dense." in text
    assert "no chosen head ran sparse" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--heads", "3"], "--heads 3: expected LAYER:HEAD"),
        (["--heads", "0:1", "1:x"], "--heads 1:x: expected LAYER:HEAD"),
        (["--at-steps", "3"], "--at-steps 3: with 3 steps the last one is 2"),
        (["--at-steps", "1.5"], "--at-steps 1.5: a fraction is from 0.0 to 1.0"),
        (["--at-steps", "half"], "--at-steps half: expected a step such as 7, or a fraction"),
        (["--at-steps", "nan"], "--at-steps nan: expected"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", os.fsdecode(b"caf\xe9")], r"--prompt 'caf\udce9' has bytes that are no text in this locale"),
        (["--seed", "-1"], "--seed must be between 0"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--config", "adaptiv"], "--config adaptiv: 'adaptiv' is neither"),
        (["--model", "./none"], "--model ./none is no folder"),
        (["--device", "abacus"], "There is no device 'abacus'"),
        (["--output", "/proc/none"], "Nothing can be written to --output /proc/none"),
    ],
)
def test_what_is_wrong_is_found_before_the_model_is_loaded(tiny_model, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.setattr("diffsparse.eval.model_choice.load_pipeline", lambda *args: pytest.fail("loaded"))
    assert run(tiny_model, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--heads", "9:0"], "--heads 9:0: transformer has layers 0 to 1 with heads 0 to 1 each"),
        (["--heads", "0:1", "1:99"], "--heads 1:99: transformer has layers 0 to 1 with heads 0 to 1 each"),
        (["--config", "adaptive:dense_layers=(7,)"], "`dense_layers` names layer 7"),
    ],
)
def test_what_does_not_fit_the_model_is_found_before_it_runs(tiny_model, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.setattr(inspect_command, "generate", lambda *args: pytest.fail("ran"))
    assert run(tiny_model, tmp_path, *more) == 2
    assert message in capsys.readouterr().err
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("during", ["generate", "draw_heads"])
def test_ctrl_c_leaves_no_half_page(tiny_model, tmp_path, monkeypatch, capsys, during):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_command, during, stop)
    assert run(tiny_model, tmp_path, "--at-steps", "1", "--heads", "0:0") == 130
    assert not {"inspect.html", "inspect.json"} & names_in(tmp_path)
    assert not [name for name in names_in(tmp_path) if "unfinished" in name]


def test_steps_are_fractions_or_numbers():
    assert inspect_command._steps(["0.0", "0.5", "1.0", "3", "3"], 10) == (0, 3, 5, 9)
    assert inspect_command._steps(["1"], 2) == (1,)
    assert inspect_command._steps([f"0.{percent:02}" for percent in range(100)], 100) == tuple(range(100))
    assert inspect_command._steps(list(inspect_command.AT_STEPS), 20) == (4, 10, 18)
