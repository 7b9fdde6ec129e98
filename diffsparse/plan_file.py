"""Plan files: a calibration as *.safetensors, which hold numbers and text and nothing that runs.

The metadata has one key, "diffsparse", with all of a `Calibration` but its tensors as JSON. The tensors are

    maps    [N, Q, ceil(K / 8)] uint8   the block maps, a bit for each key block
    heads   [E, H, 6] int32             the `HeadPlan` of each entry and head; 0 for dense entries
    orders  [M, S] int32                the token orders that have no name; missing where all have one
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsparse.block_mask import num_blocks
from diffsparse.calibration import NAMED_ORDERS, Calibration, Entry, HeadPlan
from diffsparse.grid import TokenGrid
from diffsparse.heads import HeadClass
from diffsparse.kernels.quantization import PRECISIONS
from diffsparse.packed_bits import count_bits
from diffsparse.whole_file import whole_file

SCHEMA = 1
KEY = "diffsparse"
LONGEST_TEXT = 10_000
SETTINGS = ("dense_steps", "dense_layers", "min_tokens", "replan_every", "quantization", "dense_quantization")
"""Fields of `SparseAttentionConfig` that say when plans are made and used."""


def save_plans(path: str | Path, calibration: Calibration) -> None:
    """Write a plan file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save

    no_heads = (HeadPlan(0, 0, 0, 0, 0, 0),) * calibration.num_heads
    tensors = {
        "maps": calibration.maps.contiguous(),
        "heads": torch.tensor([entry.heads or no_heads for entry in calibration.entries], dtype=torch.int32),
    }
    unnamed = [order for order in calibration.orders if isinstance(order, Tensor)]
    if unnamed:
        tensors["orders"] = torch.stack(unnamed).to(torch.int32)
    text = {field.name: getattr(calibration, field.name) for field in dataclasses.fields(Calibration)}
    text |= {
        "schema": SCHEMA,
        "grid": dataclasses.asdict(calibration.grid),
        "orders": [order if isinstance(order, str) else None for order in calibration.orders],
        "entries": [(entry.layer, entry.from_step, entry.precision) for entry in calibration.entries],
    }
    del text["maps"]
    with whole_file(Path(path)) as unfinished:
        unfinished.write_bytes(save(tensors, {KEY: json.dumps(text)}))


def load_plans(path: str | Path) -> Calibration:
    """The calibration in a plan file. Every number in it is checked before anything relies on it.

    Raises:
        ValueError: there is no such file, or it is damaged, of a newer diffsparse, or no plan file; with what is wrong.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if not file.is_file():
        raise ValueError(f"There is no plan file {file}. `diffsparse calibrate --output {file}` makes one.")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            text = _read_text(opened.metadata())
            calibration = _Checked(text).calibration(opened)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error}). {_WAY_OUT}") from error
    except _Wrong as error:
        raise ValueError(f"{file} cannot be used: {error}") from error
    return calibration


_WAY_OUT = "Fetch it again, or make it anew with `diffsparse calibrate` (in ComfyUI with DiffSparse Calibrate)."


class _Wrong(Exception):
    """What is wrong with a file."""


def _expect(right: bool, name: str, value: Any, expected: str) -> None:
    if not right:
        raise _Wrong(f"`{name}` must be {expected}, got {_short(value)}. {_WAY_OUT}")


def _expect_keys(name: str, value: Any, keys: set[str]) -> None:
    _expect(isinstance(value, dict), name, value, "an object")
    for wrong, what in ((value.keys() - keys, "no other key than"), (keys - value.keys(), "all of the keys")):
        _expect(not wrong, name, sorted(wrong)[:1], f"an object with {what} {', '.join(sorted(keys))}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _read_text(metadata: dict[str, str] | None) -> dict[str, Any]:
    """The JSON of the metadata, of a schema that is known here."""
    if metadata is None or KEY not in metadata:
        raise _Wrong(
            f"it holds no plans, as its metadata has no key {KEY!r}, only {_short(list(metadata or ()))}. "
            f"Name a file that `diffsparse calibrate` has made."
        )
    try:
        text = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"its metadata is no JSON ({error}). {_WAY_OUT}") from error
    _expect(isinstance(text, dict), "metadata", text, "an object")
    schema = text.get("schema")
    _expect(type(schema) is int and schema >= 1, "schema", schema, "an integer of at least 1")
    if schema > SCHEMA:
        raise _Wrong(
            f"its schema is {schema}, written by diffsparse {_short(text.get('library_version'))}, and this diffsparse "
            f"reads up to {SCHEMA}. Install a newer diffsparse, or make the file anew with `diffsparse calibrate`."
        )
    expected = {"schema", *(field.name for field in dataclasses.fields(Calibration))} - {"maps"}
    _expect_keys("metadata", text, expected)
    return text


_INTEGERS = ("num_layers", "num_heads", "query_block_size", "key_block_size", "num_prompts")


class _Checked:
    """Reads values out of the JSON and tensors out of the file, each only after it is found to be right."""

    def __init__(self, text: dict[str, Any]) -> None:
        self._text = text

    def calibration(self, opened: Any) -> Calibration:
        """All of it. No tensor is read before its size is found to be that which grid, layers and heads ask for."""
        grid = self._grid()
        numbers = {name: self._integer(name, self._text[name], 1) for name in _INTEGERS}
        steps = self._text["num_steps"]
        names = self._order_names()
        places = self._places(numbers["num_layers"])
        query_blocks, key_blocks = (
            num_blocks(grid.num_tokens, numbers[f"{kind}_block_size"]) for kind in ("query", "key")
        )
        shapes: dict[str, tuple[str, tuple[int | None, ...]]] = {
            "maps": ("U8", (None, query_blocks, num_blocks(key_blocks, 8))),
            "heads": ("I32", (len(places), numbers["num_heads"], len(HeadPlan._fields))),
        }
        if None in names:
            shapes["orders"] = ("I32", (names.count(None), grid.num_tokens))
        tensors = _read_tensors(opened, shapes)
        _check_maps(tensors["maps"], key_blocks)
        _check_heads(tensors["heads"], len(tensors["maps"]), len(names))
        unnamed = iter(_checked_orders(tensors["orders"], grid) if None in names else ())
        return Calibration(
            model=self._string("model"),
            strategy=self._string("strategy"),
            library_version=self._string("library_version"),
            **numbers,
            grid=grid,
            num_steps=None if steps is None else self._integer("num_steps", steps, 1),
            settings=self._settings(),
            maps=tensors["maps"],
            orders=tuple(next(unnamed) if name is None else name for name in names),
            entries=tuple(
                Entry(layer, step, precision, () if precision is None else tuple(HeadPlan(*head) for head in heads))
                for (layer, step, precision), heads in zip(places, tensors["heads"].tolist())
            ),
        )

    def _integer(self, name: str, value: Any, least: int) -> int:
        _expect(type(value) is int and value >= least, name, value, f"an integer of at least {least}")
        return int(value)

    def _string(self, name: str) -> str:
        value = self._text[name]
        # Errors and reports print it.
        right = isinstance(value, str) and value.isprintable() and len(value) <= LONGEST_TEXT
        _expect(right, name, value, f"text of at most {LONGEST_TEXT} printable characters")
        return str(value)

    def _grid(self) -> TokenGrid:
        sizes = self._text["grid"]
        _expect_keys("grid", sizes, {field.name for field in dataclasses.fields(TokenGrid)})
        try:
            return TokenGrid(**sizes)
        except ValueError as error:
            raise _Wrong(f"{error} {_WAY_OUT}") from error

    def _settings(self) -> dict[str, Any]:
        settings = self._text["settings"]
        if isinstance(settings, dict):
            # Older files do not have it.
            settings = {"dense_quantization": None} | settings
        _expect_keys("settings", settings, set(SETTINGS))
        layers = settings["dense_layers"]
        _expect(isinstance(layers, list), "dense_layers", layers, "a list of layer indices")
        return settings | {"dense_layers": tuple(layers)}

    def _order_names(self) -> list[str | None]:
        names = self._text["orders"]
        _expect(isinstance(names, list) and len(names) > 0, "orders", names, "a list of at least one")
        for name in names:
            known = name is None or (isinstance(name, str) and name in NAMED_ORDERS)
            _expect(known, "orders", name, f"null or one of {NAMED_ORDERS}")
        return list(names)

    def _places(self, num_layers: int) -> list[tuple[int, int, str | None]]:
        """Layer, first step and precision of each entry."""
        entries = self._text["entries"]
        _expect(isinstance(entries, list) and len(entries) > 0, "entries", entries, "a list of at least one")
        before = (-1, 0)
        for entry in entries:
            _expect(isinstance(entry, list) and len(entry) == 3, "entries", entry, "layer, first step and precision")
            layer, step, precision = entry
            self._integer("layer", layer, 0)
            self._integer("from_step", step, 0)
            _expect(layer < num_layers, "layer", layer, f"below {num_layers}, the number of layers")
            _expect((layer, step) > before, "entries", entry, f"in order of layer and step, after {before}")
            known = precision is None or (isinstance(precision, str) and precision in PRECISIONS)
            _expect(known, "precision", precision, f"null or one of {', '.join(PRECISIONS)}")
            before = (layer, step)
        return [(layer, step, precision) for layer, step, precision in entries]


def _read_tensors(opened: Any, shapes: dict[str, tuple[str, tuple[int | None, ...]]]) -> dict[str, Tensor]:
    """The tensors of these names, each of its dtype and shape; None is a size of at least 1."""
    names = sorted(opened.keys())
    _expect(names == sorted(shapes), "tensors", names, f"{sorted(shapes)}, no more and no less")
    for name, (dtype, shape) in shapes.items():
        found = opened.get_slice(name)
        _expect(found.get_dtype() == dtype, f"{name}.dtype", found.get_dtype(), dtype)
        sizes = tuple(found.get_shape())
        right = len(sizes) == len(shape) and all(
            size > 0 if wanted is None else size == wanted for size, wanted in zip(sizes, shape)
        )
        wanted = ", ".join("N" if size is None else str(size) for size in shape)
        _expect(right, f"{name}.shape", sizes, f"({wanted}) for the grid, layers and heads that it names")
    # Copied, since the file may change while it is mapped.
    return {name: opened.get_tensor(name).clone() for name in shapes}


def _check_maps(maps: Tensor, key_blocks: int) -> None:
    """Every row of maps [N, Q, P] sees a key block, and none that does not exist."""
    fewest = int(count_bits(maps).min())
    _expect(fewest > 0, "maps", f"a row with {fewest}", "at least one key block in every row")
    beyond = int((maps[..., -1] >> (key_blocks - 1) % 8 >> 1).max())
    _expect(beyond == 0, "maps", f"a bit beyond block {key_blocks - 1}", f"blocks below {key_blocks} in every row")


def _check_heads(heads: Tensor, num_maps: int, num_orders: int) -> None:
    """Every number in heads [E, H, 6] is in the range of its column."""
    most = HeadPlan(num_maps - 1, num_orders - 1, num_orders - 1, 1, max(HeadClass), 1)
    for column, (name, largest) in enumerate(most._asdict().items()):
        least = -1 if name == "head_class" else 0
        low, high = (int(x) for x in heads[..., column].aminmax())
        _expect(least <= low and high <= largest, f"heads.{name}", (low, high), f"between {least} and {largest}")


def _checked_orders(orders: Tensor, grid: TokenGrid) -> list[Tensor]:
    """Orders [M, S], each an arrangement of 0..S-1 with the text behind the grid, which may be padded, last."""
    tokens = torch.arange(grid.num_tokens, dtype=torch.int32)
    for number, order in enumerate(orders):
        right = torch.equal(order.sort().values, tokens)
        _expect(right, f"orders[{number}]", order.tolist()[:8], f"an arrangement of 0 to {grid.num_tokens - 1}")
        last = grid.num_tokens - grid.text_after
        right = torch.equal(order[last:], tokens[last:])
        _expect(right, f"orders[{number}]", order.tolist()[-8:], f"an order that ends in the tokens {last} and on")
    return list(orders)
