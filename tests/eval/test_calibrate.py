from __future__ import annotations

import pytest
import torch
from commands import run_command

import diffsparse.config
from diffsparse.eval import calibrate
from diffsparse.eval.generate import Sampling, generate, load_pipeline
from diffsparse.eval.named_config import read_config
from diffsparse.plan_file import load_plans
from diffsparse.speed_check import SpeedCheck

SMALL = "min_tokens=0,query_block_size=8,key_block_size=8"
LASTING = f"sparsed:density=0.3,dense_steps=0.4,{SMALL}"
RENEWED = f"adaptive:density=0.3,dense_steps=0,replan_every=2,sampled_rows=8,{SMALL}"


def start(model, output, *more, prompts=1, strategy=LASTING):
    argv = ["--model", model, "--prompts", prompts, "--strategy", strategy, "--device", "cpu", "--output", output]
    return run_command("calibrate", *argv, *more)


def video(model, config, prompt="a red striped circle moves right over a blue checkered background"):
    pipe = load_pipeline(model, "cpu")
    pipe.enable_sparse_attention(config)
    made = generate(pipe, prompt, 0, Sampling.read(model))
    return torch.from_numpy(made.frames), pipe.sparse_attention_report()


@pytest.mark.parametrize("strategy", [LASTING, RENEWED], ids=["lasting", "renewed"])
def test_the_file_makes_the_video_of_the_strategy_it_was_made_by(tiny_model, tmp_path, strategy):
    file = tmp_path / "plan.safetensors"
    assert start(tiny_model, file, strategy=strategy) == 0
    (of_strategy, expected), (of_file, report) = (
        video(tiny_model, each) for each in (read_config(strategy), str(file))
    )
    assert torch.equal(of_file, of_strategy)
    assert report.as_dict() == expected.as_dict()
    assert report.density < 0.9


def test_nothing_is_timed_or_left_dense_for_being_slow_here(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(SpeedCheck, "time", lambda *args: pytest.fail("timed"))
    monkeypatch.setattr(diffsparse.config, "MIN_TOKENS", 0)
    file = tmp_path / "plan.safetensors"
    assert start(tiny_model, file, strategy=LASTING.replace("min_tokens=0,", "")) == 0
    # Where the file is used it may well be timed.
    assert load_plans(file).settings["min_tokens"] is None


def test_the_file_says_what_it_was_made_for(tiny_model, tmp_path):
    start(tiny_model, tmp_path / "plan.safetensors", prompts=2)
    made = load_plans(tmp_path / "plan.safetensors")
    assert (made.model, made.num_layers, made.num_heads) == ("WanTransformer3DModel", 2, 2)
    assert (made.num_prompts, made.num_steps) == (2, 3)
    assert made.strategy == repr(read_config(LASTING).strategy)
    assert made.settings["dense_steps"] == 0.4
    assert made.library_version == diffsparse.__version__
    assert {entry.from_step for entry in made.entries} == {1}


def test_an_interruption_leaves_the_plans_of_whole_prompts_or_nothing(tiny_model, tmp_path, monkeypatch, capsys):
    real, prompts = calibrate.generate, []

    def stop_at(number):
        def generate(pipe, prompt, seed, sampling, on_step):
            prompts.append(prompt)

            def step():
                on_step()
                if len(prompts) == number:
                    raise KeyboardInterrupt

            return real(pipe, prompt, seed, sampling, step)

        prompts.clear()
        monkeypatch.setattr(calibrate, "generate", generate)

    file = tmp_path / "plan.safetensors"
    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        start(tiny_model, file, prompts=3)
    assert list(tmp_path.iterdir()) == []
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        start(tiny_model, file, prompts=3)
    assert list(tmp_path.iterdir()) == [file]
    assert load_plans(file).num_prompts == 1
    assert "plans of the first 1 of 3 prompts" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts", 0], "--prompts must be 1 to"),
        (["--prompts", 10**6], "--prompts must be 1 to"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file must be demo or general or a file, got nowhere.txt"),
        (["--prompt-file", ""], "--prompt-file must be demo or general or a file, got nothing"),
        (["--strategy", "adaptiv"], "--strategy adaptiv: 'adaptiv' is neither"),
        (["--strategy", "sparsed:density=2"], "--strategy sparsed:density=2: `density`"),
        (["--seed", -1], "--seed"),
        (["--output", "plan.pt"], "--output must be a file that ends in .safetensors, got plan.pt"),
        (["--steps", 0], "--steps"),
        (["--model", "./none"], "--model"),
    ],
)
def test_what_is_wrong_is_found_before_the_model_is_loaded(tiny_model, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr("diffsparse.eval.model_choice.load_pipeline", lambda *args: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        start(tiny_model, tmp_path / "plan.safetensors", *more)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["dense", "sparsed:dense_steps=1.0,min_tokens=0", "balanced"])
def test_without_a_sparse_call_nothing_is_written(tiny_model, tmp_path, strategy):
    with pytest.raises(ValueError, match=f"--strategy {strategy} leaves nothing to write.*min_tokens=0"):
        start(tiny_model, tmp_path / "plan.safetensors", strategy=strategy)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_a_config_of_a_run(tiny_model, tmp_path):
    file = tmp_path / "plan.safetensors"
    start(tiny_model, file)
    config = read_config(f"{file}:replan_every=7")
    assert config.replan_every == 7
    assert config.strategy.path == str(file)
    with pytest.raises(ValueError, match="no option 'density'"):
        read_config(f"{file}:density=0.2")
