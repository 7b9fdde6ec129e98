from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from diffsparse.calibration import Calibration, Entry, HeadPlan
from diffsparse.grid import TokenGrid
from diffsparse.packed_bits import pack_bits
from diffsparse.plan_file import load_plans, save_plans

GRID = TokenGrid(2, 3, 5, text_before=1, text_after=2)
BLOCKS = 9  # of 33 tokens in fours
OWN_LAST_TWO = [*range(30, -1, -1), 31, 32]
SETTINGS = {"dense_steps": 0.2, "dense_layers": (0, -1), "min_tokens": None, "replan_every": 4, "quantization": None}
SETTINGS |= {"dense_quantization": "int8"}
HEAD = HeadPlan(block_map=0, order=0, key_order=0, tail=0, head_class=-1, skipped=0)
CALIBRATION = Calibration(
    model="Example",
    num_layers=3,
    num_heads=2,
    grid=GRID,
    query_block_size=4,
    key_block_size=4,
    strategy="Adaptive(density=0.25)",
    num_prompts=2,
    num_steps=20,
    settings=SETTINGS,
    library_version="0.1.0",
    maps=pack_bits(torch.stack([torch.eye(BLOCKS).bool(), torch.ones(BLOCKS, BLOCKS).bool()])),
    orders=("own", torch.tensor(OWN_LAST_TWO, dtype=torch.int32), "height width frame"),
    entries=(
        Entry(0, 4, "native", (HEAD, HeadPlan(1, 1, 2, 1, 2, 1))),
        Entry(2, 4, "int8", (HEAD, HEAD)),
        Entry(2, 8, None, ()),
    ),
)


@pytest.fixture
def file(tmp_path):
    save_plans(tmp_path / "plan.safetensors", CALIBRATION)
    return tmp_path / "plan.safetensors"


def contents(file):
    with safe_open(file, "pt") as opened:
        text = json.loads(opened.metadata()["diffsparse"])
    return text, safetensors.torch.load_file(file)


def rewrite(file, change_text=lambda text: None, change_tensors=lambda tensors: None):
    text, tensors = contents(file)
    change_text(text)
    change_tensors(tensors)
    safetensors.torch.save_file(tensors, file, {"diffsparse": json.dumps(text)})


def test_a_file_from_before_dense_calls_could_be_quantized_is_read(file):
    rewrite(file, lambda text: text["settings"].pop("dense_quantization"))
    assert load_plans(file).settings == SETTINGS | {"dense_quantization": None}


def refuses(file, message):
    with pytest.raises(ValueError, match=message) as refused:
        load_plans(file)
    assert str(file) in str(refused.value)
    assert "diffsparse calibrate" in str(refused.value)


def test_what_is_written_is_read(file):
    read = load_plans(file)
    for field in dataclasses.fields(Calibration):
        if field.name not in ("maps", "orders"):
            assert getattr(read, field.name) == getattr(CALIBRATION, field.name)
    assert torch.equal(read.maps, CALIBRATION.maps)
    assert (read.orders[0], read.orders[2]) == ("own", "height width frame")
    assert read.orders[1].tolist() == OWN_LAST_TWO


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()

    def write_half(path, contents):
        path.write_text("half of the n")
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="disk"):
        save_plans(file, CALIBRATION)
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(file, share):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    refuses(file, "cannot be read as safetensors")


def test_no_damaged_byte_raises_anything_else(file):
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        file.write_bytes(damaged)
        # Some bytes only change a number into another that is allowed.
        with contextlib.suppress(ValueError):
            load_plans(file)


def test_a_claimed_size_beyond_the_file_is_refused(file):
    """A header that claims a terabyte; nothing of it may be allocated."""
    claims = {"maps": {"dtype": "U8", "shape": [10**6, 10**6], "data_offsets": [0, 10**12]}}
    header = json.dumps(claims).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    refuses(file, "cannot be read as safetensors")


def test_what_is_no_plan_file_is_refused(tmp_path, file):
    refuses(tmp_path / "none.safetensors", "There is no plan file")
    refuses(tmp_path, "There is no plan file")
    safetensors.torch.save_file({"a": torch.zeros(1)}, file, {"format": "pt"})
    refuses(file, "holds no plans.*'format'")
    safetensors.torch.save_file({"a": torch.zeros(1)}, file)
    refuses(file, "holds no plans")
    for text in ("{", "[" * 100_000, "7", "9" * 5000):
        safetensors.torch.save_file({"a": torch.zeros(1)}, file, {"diffsparse": text})
        refuses(file, "metadata")


def test_a_newer_schema_is_refused_whatever_else_it_has(file):
    rewrite(file, lambda text: text.update(schema=2, library_version="9.0", something=1))
    refuses(file, "schema is 2, written by diffsparse '9.0'.*reads up to 1.*newer diffsparse")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "1"}, "`schema`.*'1'"),
        ({"schema": True}, "`schema`"),
        ({"more": 1}, "`metadata`.*'more'"),
        ({"model": 7}, "`model` must be text of .*, got 7"),
        ({"model": "\x1b[2Jfake"}, r"`model`.*printable characters, got '\\x1b\[2Jfake'"),
        ({"strategy": "a" * 10_001}, "`strategy`"),
        ({"num_layers": 0}, "`num_layers` must be an integer of at least 1, got 0"),
        ({"num_layers": 2}, "`layer` must be below 2"),
        ({"num_heads": 10**30}, "`heads.shape`"),
        ({"num_heads": 1.0}, "`num_heads`"),
        ({"key_block_size": 10**9}, "`maps.shape`"),
        ({"query_block_size": -4}, "`query_block_size`"),
        ({"num_steps": 0}, "`num_steps`"),
        ({"grid": {"frames": 1}}, "`grid`"),
        ({"grid": vars(GRID) | {"frames": 10**12}}, "`maps.shape`.*got \\(2, 9, 2\\)"),
        ({"grid": vars(GRID) | {"frames": "2"}}, "`frames` of a token grid"),
        ({"settings": []}, "`settings`"),
        ({"settings": SETTINGS | {"backend": "eager"}}, "`settings`.*'backend'"),
        ({"settings": SETTINGS | {"dense_layers": 3}}, "`dense_layers`"),
        ({"orders": []}, "`orders`"),
        ({"orders": ["own", None, "../../etc/passwd"]}, "`orders`.*'../../etc/passwd'"),
        ({"orders": ["own", None, ["own"]]}, "`orders`"),
        ({"orders": ["own", None, None]}, "`orders.shape`"),
        ({"orders": ["own", "own", "own"]}, "`tensors`"),
        ({"orders": ["own", None]}, "`heads.order`|`heads.key_order`"),
        ({"entries": []}, "`entries`"),
        ({"entries": [[0, 4, "native"]]}, "`heads.shape`"),
        ({"entries": [[0, 4, "native"], [2, 4, "native"], [2, 4, None]]}, "`entries`.*in order"),
        ({"entries": [[0, 4, "native"], [2, 8, "native"], [1, 4, None]]}, "`entries`.*in order"),
        ({"entries": [[0, -4, "native"], [2, 4, "native"], [2, 8, None]]}, "`from_step`"),
        ({"entries": [[0, 4, "fp64"], [2, 4, "native"], [2, 8, None]]}, "`precision`.*'fp64'"),
        ({"entries": [[0, 4, ["native"]], [2, 4, "native"], [2, 8, None]]}, "`precision`"),
        ({"entries": [[0, 4], [2, 4, "native"], [2, 8, None]]}, "`entries`"),
    ],
)
def test_wrong_metadata_is_named_with_its_value(file, changes, message):
    rewrite(file, lambda text: text.update(changes))
    refuses(file, message)


def test_a_grid_that_only_its_block_size_makes_small_allocates_nothing(file):
    """One block for a trillion tokens: the file is consistent, and no call has such a grid."""

    def change(text):
        text.update(grid=vars(GRID) | {"frames": 10**12}, query_block_size=10**14, key_block_size=10**14)
        text.update(orders=["own"])

    def shrink(tensors):
        tensors["maps"] = torch.ones(1, 1, 1, dtype=torch.uint8)
        tensors["heads"] = torch.zeros_like(tensors["heads"])
        del tensors["orders"]

    rewrite(file, change, shrink)
    assert load_plans(file).grid.frames == 10**12


def set_value(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update(maps=tensors["maps"].int()), "`maps.dtype` must be U8, got 'I32'"),
        (lambda tensors: tensors.update(heads=tensors["heads"].float()), "`heads.dtype`"),
        (lambda tensors: tensors.update(orders=tensors["orders"].long()), "`orders.dtype`"),
        (lambda tensors: tensors.update(maps=tensors["maps"][:, :8].clone()), "`maps.shape`.*\\(N, 9, 2\\)"),
        (lambda tensors: tensors.update(maps=tensors["maps"][:0].clone()), "`maps.shape`"),
        (lambda tensors: tensors.update(maps=tensors["maps"][0].clone()), "`maps.shape`"),
        (lambda tensors: tensors.update({"../../evil": torch.zeros(1)}), "`tensors`.*'../../evil'"),
        (lambda tensors: tensors.pop("orders"), "`tensors`"),
        (set_value("maps", (0, 3), 0), "`maps` must be at least one key block in every row"),
        (set_value("maps", (1, 3, 1), 2), "`maps`.*beyond block 8"),
        (set_value("heads", (0, 0, 0), 2), "`heads.block_map` must be between 0 and 1, got \\(0, 2\\)"),
        (set_value("heads", (0, 0, 1), -1), "`heads.order`"),
        (set_value("heads", (0, 1, 2), 3), "`heads.key_order`"),
        (set_value("heads", (0, 1, 3), 2), "`heads.tail`"),
        (set_value("heads", (0, 1, 4), -2), "`heads.head_class`"),
        (set_value("heads", (0, 1, 5), 2), "`heads.skipped`"),
        (set_value("orders", (0, 0), 29), "`orders\\[0\\]` must be an arrangement of 0 to 32"),
        (set_value("orders", (0, 0), 33), "`orders\\[0\\]`"),
        (set_value("orders", (0, 0), -1), "`orders\\[0\\]`"),
        (set_value("orders", (0, slice(-2, None)), torch.tensor([32, 31])), "ends in the tokens 31 and on"),
    ],
)
def test_wrong_tensors_are_named_with_their_value(file, change, message):
    rewrite(file, change_tensors=change)
    refuses(file, message)


def test_a_long_value_is_cut_short(file):
    rewrite(file, lambda text: text.update(model=["a" * 10_000]))
    with pytest.raises(ValueError, match=re.escape("aaa…")) as refused:
        load_plans(file)
    assert len(str(refused.value)) < 1000
