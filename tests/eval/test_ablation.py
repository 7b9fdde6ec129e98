from __future__ import annotations

import json
from dataclasses import replace

from diffsparse.eval import cli
from diffsparse.eval.ablation import FIXED_RULES, RULES
from diffsparse.strategies.adaptive import Adaptive


def run(model, output, *more):
    command = ["eval", "ablation", "--model", str(model), "--device", "cpu", "--output", str(output)]
    return cli.main(
        [
            *command,
            "--prompts",
            "1",
            "--densities",
            "0.5",
            "--steps",
            "2",
            "--rules",
            "random blocks",
            "adaptive",
            *more,
        ]
    )


def test_every_rule_is_measured_with_and_without_tail(tiny_model, tmp_path, capsys):
    file = tmp_path / "results.json"
    assert run(tiny_model, file) == 0
    found = [(video["row"], video["tail"]) for video in json.loads(file.read_text())["videos"]]
    assert found == [(rule, tail) for rule in ("random blocks", "adaptive") for tail in (False, True)]
    table = capsys.readouterr().out
    assert "| random blocks | " in table
    assert "| adaptive | " in table


def test_what_nobody_measured_is_a_dash(tmp_path, capsys):
    video = {"prompt": "a", "seed": 0, "row": "adaptive", "at_density": 0.5, "tail": True, "psnr_db": 21.0}
    video |= {"ssim": 0.9, "density": 0.5, "seconds": 1.0, "dense_seconds": 2.0}
    file = tmp_path / "part.json"
    settings = {"sampling": "20 steps", "dense_steps": 0.2, "device": "cpu"}
    file.write_text(json.dumps({"settings": settings, "videos": [video]}))
    assert cli.main(["eval", "ablation", "--merge", str(file)]) == 0
    assert "| adaptive | – / 21.0 |" in capsys.readouterr().out


def test_where_lpips_was_at_hand_it_has_a_table_of_its_own(tmp_path, capsys):
    video = {"prompt": "a", "seed": 0, "row": "adaptive", "at_density": 0.5, "tail": True, "psnr_db": 21.0}
    video |= {"ssim": 0.9, "density": 0.5, "seconds": 1.0, "dense_seconds": 2.0, "lpips": 0.0625}
    file = tmp_path / "part.json"
    settings = {"sampling": "20 steps", "dense_steps": 0.2, "device": "cpu", "lpips_net": "alex"}
    file.write_text(json.dumps({"settings": settings, "videos": [video]}))
    assert cli.main(["eval", "ablation", "--merge", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("| mean LPIPS, alex: dropped / pooled tail | 50 % |") + 2] == "| adaptive | – / 0.062 |"


def test_each_part_of_the_default_is_taken_alone():
    parts = {name: Adaptive(**options) for name, options in RULES.items() if name not in FIXED_RULES}
    default = Adaptive()
    by_pooled_scores = tuple(replace(x, rule="top") if x.rule == "impact" else x for x in default.candidates)
    assert parts == {
        "choice of each head": replace(default, equal_heads=True, front_load=0.0),
        "choice, blocks shared among heads": replace(default, front_load=0.0),
        "choice, more in the first steps": replace(default, equal_heads=True),
        "adaptive by pooled scores": replace(default, candidates=by_pooled_scores),
        "adaptive": default,
    }


def test_a_cell_is_the_mean_of_the_prompts_without_and_with_tail(tmp_path, capsys):
    videos = [
        {"prompt": prompt, "seed": 0, "row": "adaptive", "at_density": 0.5, "tail": tail, "psnr_db": psnr}
        | {"ssim": 0.9, "density": 0.5, "seconds": 1.0, "dense_seconds": 2.0}
        for prompt, tail, psnr in (("a", False, 20.0), ("a", True, 21.0), ("b", False, 30.0), ("b", True, 33.0))
    ]
    settings = {"sampling": "20 steps", "dense_steps": 0.2, "device": "cpu"}
    files = [tmp_path / f"{name}.json" for name in "ab"]
    for file, part in zip(files, (videos[:2], videos[2:])):
        file.write_text(json.dumps({"settings": settings, "videos": part}))
    assert cli.main(["eval", "ablation", "--merge", *map(str, files)]) == 0
    assert "| adaptive | 25.0 / 27.0 |" in capsys.readouterr().out
