from __future__ import annotations

import pytest
import torch
from rich.console import Console

from diffsparse.eval.backend_states import BackendState, SelfTest
from diffsparse.eval.doctor_tables import as_ranges, backends_table, self_tests_table
from diffsparse.kernels.capabilities import Capability

HALVES = (torch.bfloat16, torch.float16)
NATIVE = Capability(HALVES, (64, 128), (128,), (64, 128), "fast")


def shown(table):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def state_of(*self_tests, **capabilities):
    return BackendState("fast", {"native": NATIVE} | capabilities, ("pooled tail",), self_tests, None)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((64,), "64"), ((64, 128), "64, 128"), ((1, 2), "1, 2"), ((1, 2, 3, 5, 7, 8, 9), "1 to 3, 5, 7 to 9")],
)
def test_three_in_a_row_are_a_range(numbers, text):
    assert as_ranges(numbers) == text


def test_precisions_that_differ_say_in_what():
    state = state_of(
        int8=Capability(HALVES, (64, 128), (128,), (64, 128), "fast"),
        fp8=Capability(HALVES[:1], (64,), (128,), (128,), "slow"),
        int8_fp8=Capability(HALVES, (64, 128), (128,), (64, 128), "slow"),
        int4=Capability(reason="not here"),
    )
    table = shown(backends_table({"cuda:0, sm_90": [state]}))
    takes = [line.split("│")[3].strip() for line in table.splitlines() if line.startswith("│")]
    assert takes == [
        "bfloat16, float16",
        "head dims 64, 128",
        "query blocks of 128; key blocks of 64, 128",
        "native, int8",
        "fp8: bfloat16; head dims 64; key blocks of 128; computed by slow",
        "int8_fp8: computed by slow",
        "pooled tail",
    ]


def test_a_long_reason_is_cut():
    message = "failed with RuntimeError: [gcc] " + "is missing " * 100
    table = shown(self_tests_table({"cuda:0, sm_90": [state_of(SelfTest("native", HALVES[0], None, 1e-2, message))]}))
    assert "[gcc]" in table
    assert 10 < table.count("missing") < 30


def test_no_line_is_wider_than_the_terminal():
    state = state_of(SelfTest("int8_fp8", torch.bfloat16, 1.0, 1e-2, "wrong"), int8_fp8=NATIVE)
    for table in (backends_table, self_tests_table):
        text = shown(table({"cuda:10, sm_120": [state]}))
        assert "…" not in text
        assert "int8_fp8" in text
