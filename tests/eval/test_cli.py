from __future__ import annotations

import argparse
import os
import runpy
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffsparse.eval import cli, doctor


def fail_with(error, monkeypatch):
    def run(args):
        raise error

    monkeypatch.setattr(doctor, "run", run)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["demo"],
        ["inspect"],
        ["calibrate"],
        ["bench"],
        ["stress"],
        ["plan"],
        ["doctor"],
        ["families"],
        ["comfyui-install"],
        ["comfyui-uninstall"],
        ["eval"],
        ["eval", "compare"],
        ["eval", "fetch-lpips"],
    ],
)
def test_every_command_has_help(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, "--help"])
    assert stop.value.code == 0
    assert "usage: diffsparse" in capsys.readouterr().out


def test_every_option_has_a_help_text():
    parsers = [cli.make_parser()]
    while parsers:
        parser = parsers.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            else:
                name = f"{parser.prog} {action.option_strings or action.dest}"
                assert action.help, name
                # It would be shown as Python writes it, not as it is typed.
                assert not (isinstance(action.default, list) and "%(default)s" in action.help), name


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda args: print("to nobody") or 0)
    # As Python has it after `>&-` in a shell.
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["doctor"]) == 0


def test_the_exit_code_is_the_commands(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda args: 7)
    assert cli.main(["doctor"]) == 7


@pytest.mark.parametrize("error", [ValueError("`x` is wrong.\n  Say y."), OSError("`x` is wrong. Say y.")])
def test_what_the_user_can_mend_is_told_in_one_line(monkeypatch, capsys, error):
    fail_with(error, monkeypatch)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "diffsparse: error: `x` is wrong. Say y.\n"


def of_the_cpu():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        of_the_cpu(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),  # in Windows
        torch.OutOfMemoryError("CUDA out of memory.\nTried."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GiB)."),
        MemoryError(),
    ],
)
def test_too_little_memory_is_told_in_one_line(monkeypatch, capsys, error):
    fail_with(error, monkeypatch)
    assert cli.main(["doctor"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("diffsparse: error: out of memory: ask for something smaller")
    assert told.endswith(f"{' '.join(str(error).split())}\n")
    assert told.count("\n") == 1
    with pytest.raises(type(error)):
        cli.main(["--traceback", "doctor"])


def test_traceback_shows_where_it_comes_from(monkeypatch):
    fail_with(ValueError("wrong"), monkeypatch)
    with pytest.raises(ValueError, match="wrong"):
        cli.main(["--traceback", "doctor"])


def test_our_own_mistakes_are_not_hidden(monkeypatch):
    for error in (AttributeError("a mistake of ours"), RuntimeError("another")):
        fail_with(error, monkeypatch)
        with pytest.raises(type(error)):
            cli.main(["doctor"])


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "diffsparse: interrupted\n"


def test_ctrl_c_while_a_command_loads_ends_in_one_line_too(monkeypatch, capsys):
    def load(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", load)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "diffsparse: interrupted\n"


def run_ended_by(number, folder, prefix=()):
    """A process that gets a signal while its command writes a file into this folder."""
    code = (
        "import os, pathlib, sys\n"
        "from diffsparse.eval import cli, doctor\n"
        "from diffsparse.whole_file import whole_file\n"
        "def run(args):\n"
        f"    with whole_file(pathlib.Path({str(folder)!r}) / 'file.txt') as unfinished:\n"
        f"        unfinished.write_text('all'); os.kill(os.getpid(), {int(number)})\n"
        "    return 0\n"
        "doctor.run = run; sys.exit(cli.main(['doctor']))"
    )
    return subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("number", cli.ENDINGS)
def test_who_is_told_to_end_leaves_no_half_of_a_file(number, tmp_path):
    done = run_ended_by(number, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (done.returncode, done.stderr) == (128 + number, "diffsparse: interrupted\n")


@pytest.mark.skipif(shutil.which("nohup") is None, reason="no nohup here")
def test_under_nohup_a_terminal_that_closes_ends_nothing(tmp_path):
    done = run_ended_by(signal.SIGHUP, tmp_path, ["nohup"])
    assert ([file.name for file in tmp_path.iterdir()], done.returncode) == (["file.txt"], 0)


def test_other_threads_may_run_commands_and_signals_are_as_before(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda args: 7)
    before = [signal.getsignal(number) for number in cli.ENDINGS]
    with ThreadPoolExecutor() as threads:
        assert threads.submit(cli.main, ["doctor"]).result() == 7
    assert cli.main(["doctor"]) == 7
    assert [signal.getsignal(number) for number in cli.ENDINGS] == before


def run_printing(text, stdout, **environment):
    """A process whose command prints this."""
    code = (
        "import sys; from diffsparse.eval import cli, doctor; "
        f"doctor.run = lambda args: print({text!r}) or 0; sys.exit(cli.main(['doctor']))"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=os.environ | environment, check=False)


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"64 ? 64 ?"), ("latin-1", b"64 \xd7 64 ?"), ("utf-8", None)]
)
def test_an_output_that_lacks_a_sign_has_a_question_mark_for_it(encoding, shown):
    done = run_printing("64 × 64 −", subprocess.PIPE, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines() == [shown or "64 × 64 −".encode()]


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_reader_who_has_read_enough_is_no_error(length):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run_printing("x" * length, writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("argv", [[], ["eval"], ["no-such-command"], ["eval", "compare", "only-one.mp4"]])
def test_a_wrong_command_line_is_an_error_with_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: diffsparse" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["eval", "compare"], ["compare"]])
def test_python_m_is_the_same_command_with_or_without_eval(tmp_path, monkeypatch, capsys, words):
    missing = str(tmp_path / "none.mp4")
    monkeypatch.setattr(sys, "argv", ["", *words, missing, missing])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("diffsparse.eval", run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"diffsparse: error: {missing} does not exist.\n"
