from __future__ import annotations

import sys

from diffsparse.eval import cli


def test_without_triton_it_is_told_where_there_is_one(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert cli.main(["kernels", "--capabilities", "90"]) == cli.USER_ERROR
    told = capsys.readouterr()
    assert told.out == ""
    assert "triton, which is not installed" in told.err
