from __future__ import annotations

import argparse
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffsparse.eval import backend_states, doctor, environment
from diffsparse.eval.environment import versions
from diffsparse.kernels import block_sparse, block_sparse_eager, self_test

GIB = 2**30


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """So that no word is broken over two lines."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(autouse=True)
def nothing_known_of_devices():
    block_sparse._why_not_trusted.cache_clear()
    yield
    block_sparse._why_not_trusted.cache_clear()


@pytest.fixture
def gpus(monkeypatch):
    """A function that puts GPUs into this machine: (name, architecture, ...). Their tensors hold nothing."""

    def put(*found):
        def properties(index):
            name, major, minor = found[index]
            return SimpleNamespace(name=name, major=major, minor=minor, total_memory=80 * GIB)

        def architecture(device):
            return found[torch.device(device).index][1:]

        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", architecture)

    pytest.importorskip("triton")
    with FakeTensorMode():
        yield put


@pytest.fixture
def tried(monkeypatch):
    """Every self-test that was asked for. They give what `errors` has for backend and precision, else 0."""
    asked = SimpleNamespace(calls=[], errors={})

    def stand_in(backend, device, dtype, precision):
        asked.calls.append((backend, str(device), dtype, precision))
        error = asked.errors.get((backend, precision), 0.0)
        if isinstance(error, Exception):
            raise error
        return error

    for user in (backend_states, block_sparse):
        monkeypatch.setattr(user, "self_test", stand_in)
    return asked


def run(json=None):
    return doctor.run(argparse.Namespace(json=json))


def rows_of(shown, *words):
    """Lines of a table that have all of these cells."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    return [row for row in rows if set(words) <= set(row)]


def test_this_machine_can_run_and_says_what_within_seconds(capsys):
    begin = time.monotonic()
    assert run() == 0
    assert time.monotonic() - begin < 60
    shown = capsys.readouterr().out
    for word in ("torch", "diffusers", "eager", "cpu", "wan", "Sparse attention can run here"):
        assert word in shown
    assert "cpu: bfloat16 of head dim 128 runs in eager." in shown
    assert "query blocks of 1 to 256" in shown
    assert "pooled tail, key lengths, logsumexp" in shown
    assert rows_of(shown, "gluon", "cpu")[0][2].startswith("nothing: it needs a CUDA GPU")


def test_what_is_compared_with_itself_is_not_said_to_have_passed(capsys):
    run()
    (row,) = rows_of(capsys.readouterr().out, "eager", "int4")
    assert row[4:] == ["", "", "the reference itself"]


def test_a_backend_that_cannot_run_is_not_tried_and_its_reason_shown(only_backends, tried, capsys):
    only_backends(fancy=(lambda *query: "needs a GPU", None))
    assert run() == 1
    assert not tried.calls
    shown = capsys.readouterr().out
    assert "nothing: needs a GPU" in shown
    assert "runs in no backend" in shown


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_a_wrong_backend_does_not_count_as_working(only_backends, tried, capsys, tmp_path, error):
    only_backends(eager=(block_sparse_eager.why_not, block_sparse_eager.attend))
    tried.errors["eager", "native"] = error
    # That it agrees with itself in other precisions is no excuse.
    assert run(tmp_path / "doctor.json") == 1
    assert [row[-3:] for row in rows_of(capsys.readouterr().out, "eager", "native", "wrong")] == [
        [f"{error:.1e}", f"{self_test.largest_error(dtype, 'native'):.1e}", "wrong"]
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
    ]
    # Strict parsers know no NaN.
    found = json.loads((tmp_path / "doctor.json").read_text(), parse_constant=pytest.fail)
    (backend,) = found["kinds_of_devices"]["cpu"]["backends"]
    tests = [(test["error"], test["reason"]) for test in backend["self_tests"] if test["precision"] == "native"]
    assert tests == [(None if math.isnan(error) else error, "wrong")] * 3


def test_a_backend_that_breaks_is_reported_and_the_others_still_tried(only_backends, tried, capsys):
    attend = block_sparse_eager.attend
    only_backends(broken=(lambda *query: None, attend), good=(lambda *query: None, attend))
    tried.errors["broken", "native"] = RuntimeError("no compiler [/usr/bin/cc]\n" + "at line 3\n" * 1000)
    assert run() == 0
    shown = capsys.readouterr().out
    assert "failed with RuntimeError: no compiler [/usr/bin/cc]" in shown
    assert 0 < shown.count("at line 3") < 100
    assert len(rows_of(shown, "good", "passed")) == 3


def test_on_hopper_the_default_backend_passes_and_leaves_some_of_8_bits_to_triton(gpus, tried, capsys):
    gpus(("H100", 9, 0))
    assert run() == 0
    shown = capsys.readouterr().out
    here = "cuda:0, sm_90"
    passed = [row[2:4] for row in rows_of(shown, "gluon", here, "passed")]
    assert passed == [
        ["bfloat16", "native"],
        ["float16", "native"],
        *(["bfloat16", name] for name in ("int8", "int8_fp8", "fp8")),
    ]
    for precision in ("int8_int8", "int4"):
        (row,) = rows_of(shown, "gluon", here, precision)
        assert row[4:] == ["", "", "left to triton"]
        assert ("gluon", "cuda:0", torch.bfloat16, precision) not in tried.calls
    for precision in ("int8", "int8_int8", "int8_fp8", "fp8", "int4"):
        assert len(rows_of(shown, "triton", here, "bfloat16", precision, "passed")) == 1
    assert "│ int8_int8, int4: computed by triton " in shown
    assert f"{here}: bfloat16 of head dim 128 runs in gluon in blocks of 128 x 64, in triton in blocks of 64 x 64." in (
        shown
    )


def test_the_error_is_held_against_what_the_library_allows_in_that_dtype(gpus, tried, capsys):
    gpus(("H100", 9, 0))
    # More than is allowed in float16, less than in bfloat16; more than is allowed in INT8, less than in FP8.
    tried.errors |= {("gluon", "native"): 2e-2, ("triton", "native"): 2e-2}
    tried.errors |= {("triton", "int8"): 6e-2, ("triton", "fp8"): 6e-2}
    run()
    shown = capsys.readouterr().out
    assert {row[2]: row[-1] for row in rows_of(shown, "triton", "native")} == {
        "bfloat16": "passed",
        "float16": "wrong",
    }
    for precision, result in (("int8", "wrong"), ("fp8", "passed")):
        (row,) = rows_of(shown, "triton", precision)
        allowed = self_test.largest_error(torch.bfloat16, precision)
        assert row[4:] == ["6.0e-02", f"{allowed:.1e}", result]


def test_where_the_fast_kernel_is_wrong_it_says_what_is_taken_instead(gpus, tried, capsys):
    gpus(("H100", 9, 0))
    tried.errors |= {("gluon", "native"): math.nan, ("triton", "native"): 1.0}
    with pytest.warns(UserWarning, match="the backend (gluon|triton) is left out"):
        assert run() == 0
    assert "cuda:0, sm_90: bfloat16 of head dim 128 runs in eager, slowly." in capsys.readouterr().out


def test_each_kind_of_gpu_is_tested_once(gpus, tried, capsys):
    gpus(("A100", 8, 0), ("H100", 9, 0), ("A100", 8, 0), ("H100 PCIe", 9, 0))
    assert doctor.alike_devices() == {
        "cpu": ("cpu",),
        "cuda:0, sm_80": ("cuda:0", "cuda:2"),
        "cuda:1, sm_90": ("cuda:1",),
        "cuda:3, sm_90": ("cuda:3",),
    }
    run()
    assert {call[1] for call in tried.calls} == {"cpu", "cuda:0", "cuda:1", "cuda:3"}
    shown = capsys.readouterr().out
    assert "cuda:0, sm_80 (and cuda:2): bfloat16 of head dim 128 runs in triton." in shown
    (row,) = rows_of(shown, "triton", "cuda:0, sm_80", "fp8")
    assert row[2:] == ["", "fp8", "", "", "fp8 needs compute capability 8.9 (Ada) or newer, which multiplies FP8"]


def test_the_json_file_has_what_the_tables_have(gpus, tried, tmp_path):
    gpus(("A100", 8, 9), ("A100", 8, 9))
    assert run(tmp_path / "doctor.json") == 0
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["versions"] == versions()
    kind = found["kinds_of_devices"]["cuda:0, sm_89"]
    assert kind["devices"] == ["cuda:0", "cuda:1"]
    assert kind["bfloat16_of_head_dim_128_runs_in"] == {"128 x 64": "triton", "64 x 64": "triton"}
    gluon, triton = kind["backends"][:2]
    assert (gluon["works"], triton["works"]) == (False, True)
    assert "Hopper" in gluon["reason"]
    assert triton["capabilities"]["fp8"]["key_blocks"] == "32, 64, 128"
    assert triton["capabilities"]["native"]["head_dims"] == "1 to 256"
    assert triton["self_tests"][0] == {
        "precision": "native",
        "dtype": "bfloat16",
        "error": 0.0,
        "allowed": self_test.largest_error(torch.bfloat16, "native"),
        "reason": None,
    }


def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_tried(tried, tmp_path):
    with pytest.raises(ValueError, match="`--json` must name a file in a folder that exists"):
        run(tmp_path / "nowhere" / "doctor.json")
    assert not tried.calls


def test_the_backend_taken_is_the_first_that_can(only_backends):
    def takes_large_blocks(query, query_block_size, key_block_size):
        return None if query_block_size == 128 else "it takes blocks of 128 alone"

    def takes_float32(query, query_block_size, key_block_size):
        return None if query.dtype == torch.float32 else "it takes float32 alone"

    only_backends(first=(takes_float32, None), second=(takes_large_blocks, None))
    assert doctor.taken_by_blocks("cpu") == {(128, 64): "second", (64, 64): None}
    assert block_sparse.backend_taken("cpu", torch.float32, 128, 64, 64) == "first"


def test_accelerators_of_other_makers_are_devices(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: SimpleNamespace(get_device_name=["Arc", "Max"].__getitem__)
    )
    found = environment.devices()
    assert {name: found[name] for name in found if name != "cpu"} == {"xpu:0": "Arc", "xpu:1": "Max"}


def test_a_missing_package_is_named_as_such(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert versions()["no-such-package"] == "not installed"


def test_a_package_is_found_by_what_it_brings(tmp_path, monkeypatch):
    """In Windows, triton is of the package triton-windows."""
    made = tmp_path / "toaster_windows-3.5.1.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: toaster-windows\nVersion: 3.5.1\n")
    (made / "top_level.txt").write_text("toaster\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert environment.version_of("toaster") == "3.5.1 (toaster-windows)"
