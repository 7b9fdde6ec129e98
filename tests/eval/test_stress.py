from __future__ import annotations

import functools
import io
import json
import subprocess
import sys

import pytest
import torch
from commands import parsed
from rich.console import Console

from diffsparse.eval import cli, stress
from diffsparse.eval.stress_load import busy_device
from diffsparse.eval.stress_trial import Outcome, Subject
from diffsparse.kernels import backends

CPU = torch.device("cpu")
PRECISIONS = ("native", "int8", "int8_fp8", "fp8")
SUBJECT = Subject("eager", "int8", "small", "cpu")


pytestmark = pytest.mark.usefixtures("children_find_the_standins")


@pytest.fixture
def idle_load(started, monkeypatch):
    """The processes beside only sleep; gives every process that is started."""
    monkeypatch.setattr(stress, "busy_device", functools.partial(busy_device, module="stress_idle_load"))
    return started


def parse(*arguments):
    return parsed("stress", "--processes", 2, *arguments)


def outcome(verdict="right", subject=SUBJECT, **fields):
    given = {"right": 3, "wrong": 0, "differing": 0, "errors": {}, "ended": "", "exit_code": 0, "complaints": []}
    return Outcome(subject=subject, verdict=verdict, seconds=1.0, **(given | fields))


def test_a_right_backend_is_right_beside_a_busy_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    output = tmp_path / "stress.json"
    words = "--backends eager --precisions int8 --sizes small --processes 1 --seconds 0.1 --device cpu"
    assert cli.main(["stress", *words.split(), "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    (result,) = record["outcomes"]
    assert (result["verdict"], result["wrong"], result["busy_processes"]) == ("right", 0, 1)
    # Each of the small calls, the first of them held against the eager backend's own result on the CPU.
    assert result["right"] >= len(result["errors"]) == 8
    assert set(result["errors"].values()) == {0.0}
    assert (record["left"], record["arguments"]["processes"]) == (0, 1)
    assert record["machine"]["torch"] == torch.__version__
    assert record["environment"]["CUDA_LAUNCH_BLOCKING"] == "1"
    assert "right" in capsys.readouterr().out


def test_the_file_has_what_is_done_when_the_rest_is_interrupted(tmp_path, monkeypatch, idle_load):
    outcomes = iter([outcome("died", exit_code=-6)])

    def interrupted(*arguments):
        for done in outcomes:
            return done
        raise KeyboardInterrupt

    monkeypatch.setattr(stress, "try_subject", interrupted)
    output = tmp_path / "stress.json"
    command = ["stress", "--sizes", "full", "--precisions", "native", "--device", "cpu", "--output", str(output)]
    assert cli.main(command) == 130
    record = json.loads(output.read_text())
    assert [result["verdict"] for result in record["outcomes"]] == ["died"]
    assert record["left"] == 1
    assert len(idle_load) == 2
    assert all(process.poll() is not None for process in idle_load)


def test_after_one_that_died_the_next_is_tried(tmp_path, idle_load):
    args = parse("--processes", "1", "--output", str(tmp_path / "stress.json"))
    outcomes = stress.stress([SUBJECT] * 2, args, CPU, Console(file=io.StringIO()), "stress_standins:aborts")
    assert [outcome.verdict for outcome in outcomes] == ["died"] * 2
    # One that keeps the device busy and two that were tried.
    assert len(idle_load) == 3


def test_processes_that_no_longer_keep_the_device_busy_are_told(tmp_path, monkeypatch, idle_load):
    def kill_one(*arguments):
        idle_load[0].kill()
        idle_load[0].wait()
        return outcome()

    monkeypatch.setattr(stress, "try_subject", kill_one)
    args, said = parse("--output", str(tmp_path / "stress.json")), io.StringIO()
    stress.stress([SUBJECT], args, CPU, Console(file=said))
    assert "Only 1 of the 2 processes beside it still run." in said.getvalue()
    assert json.loads(args.output.read_text())["outcomes"][0]["busy_processes"] == 1


def test_what_is_not_right_makes_the_command_fail(tmp_path, monkeypatch, idle_load):
    output = str(tmp_path / "stress.json")
    command = ["stress", "--sizes", "small", "--backends", "eager", "--precisions", "int8", "--output", output]
    for verdict, exit_code in (("right", 0), ("wrong", 1), ("died", 1), ("hung", 1), ("no memory", 1)):
        monkeypatch.setattr(stress, "try_subject", lambda *arguments, is_now=verdict: outcome(is_now))
        assert cli.main([*command, "--device", "cpu"]) == exit_code


def test_the_table_has_all_and_the_last_words_as_they_are(capsys):
    subjects = [Subject(*names, "cpu") for names in (("gluon", "int8", "full"), ("dense",) * 3)]
    bad = outcome(
        "died", subjects[0], ended="[/x] SIGABRT", complaints=["[/bold] is no markup"], errors={"a": 0.1, "b": None}
    )
    stress.show([bad, outcome("wrong", subjects[1], wrong=2, differing=16384)], 7, Console(width=150))
    printed = capsys.readouterr().out
    for words in ("beside 7", "│ int8 ", "[/x] SIGABRT", "[/bold] is no markup", "nan", "2, by up to 16,384 numbers"):
        assert words in printed
    assert "PyTorch's own attention was not right either" in printed
    stress.show([bad], 7, Console(width=150))
    assert "PyTorch's own" not in capsys.readouterr().out


def subjects(*arguments):
    said = []
    found = stress.subjects_of(parse(*arguments), CPU, said.append)
    return [(subject.backend, subject.precision, subject.size) for subject in found], said


def test_without_a_fast_backend_eager_is_tried_and_the_control():
    found, said = subjects()
    eager = [("eager", precision, size) for precision in PRECISIONS for size in ("full", "small")]
    assert found == [("dense", "native", "full"), *eager]
    assert said == []


def with_hopper(monkeypatch):
    """As on a Hopper GPU: gluon and triton run, and leave out eager."""
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "available_backends", lambda *arguments: dict.fromkeys(backends.BACKENDS))


def test_on_hopper_both_kernels_are_tried_in_all_precisions(monkeypatch):
    with_hopper(monkeypatch)
    found, said = subjects("--sizes", "full")
    ours = [(backend, precision, "full") for backend in ("gluon", "triton") for precision in PRECISIONS]
    assert found == [("dense", "native", "full"), *ours]
    assert said == []


def test_what_a_backend_hands_to_another_is_said_and_left_out(monkeypatch):
    with_hopper(monkeypatch)
    monkeypatch.setattr(backends, "left_to", lambda *asked: {("gluon", "int8"): "triton"}.get(asked))
    found, said = subjects("--sizes", "full", "--backends", "gluon")
    assert found == [("gluon", precision, "full") for precision in ("native", "int8_fp8", "fp8")]
    assert said == ["gluon int8 goes to triton"]


def test_what_cannot_run_is_said(monkeypatch):
    def available(device, precision):
        return dict.fromkeys(backends.BACKENDS, None if precision == "native" else f"no {precision}")

    monkeypatch.setattr(backends, "available_backends", available)
    found, said = subjects("--backends", "eager", "--sizes", "small")
    assert found == [("eager", "native", "small")]
    assert said == [f"eager {name} cannot run: no {name}" for name in PRECISIONS[1:]]
    with pytest.raises(ValueError, match="Nothing is left to try"):
        subjects("--backends", "eager", "--precisions", "int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "tritn"], r"`--backends` must be among dense, gluon, .*, got 'tritn'\."),
        (["--backends", "gluon"], r"`--backends` gluon cannot run on cpu: it needs a CUDA GPU"),
        (["--backends", "dense", "--sizes", "small"], r"Nothing is left to try of `--backends`"),
        (["--processes", "-1"], r"`--processes` must be at least 0, got -1\."),
        (["--seconds", "0"], r"`--seconds` must be above 0, got 0\.0\."),
        (["--seconds", "nan"], r"`--seconds` must be above 0, got nan\."),
        (["--limit", "20"], r"`--limit` must be more than `--seconds` 20, got 20\."),
        (["--device", "tpu"], r"There is no device 'tpu' here"),
        (["--output", "no/such/folder.json"], r"`--output` must name a file in a folder that exists"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(arguments, message, idle_load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        cli.main(["--traceback", "stress", "--device", "cpu", *arguments])
    assert idle_load == []
    assert list(tmp_path.iterdir()) == []


def test_the_help_says_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["stress", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for word in ("minutes", "CUDA_LAUNCH_BLOCKING=1", "CUDA_ENABLE_COREDUMP_ON_EXCEPTION=1", "Exit code 1"):
        assert word in text


def test_children_do_not_need_torch_to_start():
    # Else a process that hangs or dies at once would cost seconds in the tests of it.
    code = "import sys, diffsparse.eval.stress_trial, diffsparse.eval.stress_load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
