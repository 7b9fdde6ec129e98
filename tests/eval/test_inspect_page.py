from __future__ import annotations

import json

import pytest
from page_reader import HOSTILE, Page

from diffsparse.eval.inspect_page import as_page, in_both_orders, in_words, percent

MEASURE = {"class": "spatial", "density": 0.25, "recall": 0.875, "error": 0.0123, "tail": True, "skipped": False}
MEASURE |= {"incoherence_own_order": 8.256, "incoherence_plan_order": 7.5}
DENSE = {"class": "dense", "density": 1.0, "recall": 1.0, "error": 0.0, "tail": False, "skipped": False}
DENSE |= {"incoherence_own_order": None, "incoherence_plan_order": None}


def head(transformer, layer, number, error):
    more = {"classes": {"spatial": 2, "textural": 1}, "largest_error": error, "largest_error_at_step": 1}
    more |= {"tail_steps": 1, "sparse_steps": 1, "dense_reasons": {"early step": 1}}
    return {"transformer": transformer, "layer": layer, "head": number, **MEASURE, "error": error, **more}


def transformer(name, layers=2, heads=3):
    first = [{"dense": HOSTILE, "heads": [DENSE] * heads}] * layers
    second = [{"dense": None, "heads": [MEASURE] * heads}] * layers
    return {
        "name": name,
        "num_layers": layers,
        "num_heads": heads,
        "sparse_calls": layers,
        "dense_calls": layers,
        "dense_reasons": {HOSTILE: layers},
        "unreached_layers": {},
        "heads": [head(name, layer, number, 0.01 * number) for layer in range(layers) for number in range(heads)],
        "steps": [{"step": 0, "layers": first}, {"step": 1, "layers": second}],
    }


def data_of(names=("transformer",), outside="a cat"):
    shown = {"transformer": names[0], "layer": 1, "head": 2, "step": 1, "file": "map.png", "why": "the largest error"}
    return {
        "command": outside,
        "model": outside,
        "prompt": outside,
        "seed": 0,
        "config": outside,
        "config_in_full": outside,
        "sampling": {"width": 64, "height": 32, "num_frames": 9, "num_inference_steps": 2},
        "sampled_rows": 64,
        "seconds": 1.5,
        "device": outside,
        "machine": {"cpu": outside},
        "versions": {"torch": outside},
        "summary": {
            "density": 0.25,
            "overall_density": 0.625,
            "recall": 0.875,
            "recall_5th_percentile": 0.5,
            "error": 0.0123,
            "incoherence_own_order": 9.0,
            "incoherence_plan_order": 8.5,
            "worst_head": {"transformer": names[-1], "layer": 1, "head": 2, "error": 0.02},
        },
        "transformers": [transformer(name) for name in names],
        "map_steps": [1],
        "maps": [shown | MEASURE],
    }


def page_of(**changes):
    return Page(as_page(data_of(**changes), {"map.png": b"PNG"}))


def test_every_head_is_in_the_grid_the_table_and_the_data_of_the_script():
    page = page_of()
    cells = [attributes for tag, attributes in page.tags if "data-layer" in attributes]
    assert [(int(cell["data-layer"]), int(cell["data-head"])) for cell in cells] == [
        (layer, number) for layer in range(2) for number in range(3)
    ]
    (compact,) = json.loads(page.data)["transformers"]
    assert len(compact["means"]) == len(compact["steps"][1]["heads"]) == 6
    assert compact["steps"][1]["heads"][5] == ["spatial", 0.25, 0.875, 0.0123]
    assert sum(tag == "td" and attributes.get("data-value") == "0.02" for tag, attributes in page.tags) == 2 * 2
    for shown in ("88 %", "5th percentile 50\u00a0%", "2 of 4 attention calls were dense", "layer 1, head 2"):
        assert shown in page.text


def test_several_transformers_are_told_apart_and_one_needs_no_name():
    assert "transformer_2, layer 1, head 2" in page_of(names=("transformer", "transformer_2")).text
    assert "transformer, layer" not in page_of().text


def test_each_transformer_says_at_which_step_its_heads_were_chosen():
    data = data_of(names=("transformer", "transformer_2"))
    of_second = data["maps"][0] | {"transformer": "transformer_2", "step": 7}
    data["maps"] += [of_second, of_second | {"step": 8}]
    text = Page(as_page(data, {"map.png": b"PNG"})).text
    assert "Transformer, layer 1, head 2: the largest error, at step 1" in text
    assert "Transformer_2, layer 1, head 2: the largest error, at step 7" in text


def test_incoherence_is_shown_in_both_orders_and_sorted_by_the_plans():
    page = page_of()
    assert "Incoherence: in the tokens’ own order → in the plan’s" in page.text
    assert page.text.count("8.26 → 7.50") == 2 * 3
    assert sum(tag == "td" and attributes.get("data-value") == "7.5" for tag, attributes in page.tags) == 2 * 3
    assert "Mean of all: 9.00 → 8.50." in page.text


def test_nothing_dense_has_an_incoherence():
    data = data_of()
    none = {"incoherence_own_order": None, "incoherence_plan_order": None}
    data["summary"] |= none | {"worst_head": None}
    for of_head in data["transformers"][0]["heads"]:
        of_head |= none
    text = Page(as_page(data, {"map.png": b"PNG"})).text
    assert "Mean of all" not in text
    assert "None" not in text
    assert "→ 7" not in text
    assert in_both_orders(none) == "–"


def test_what_comes_from_outside_stays_text():
    plain, hostile = page_of(), page_of(outside=HOSTILE)
    kinds = [{(tag, name) for tag, attributes in page.tags for name in attributes or [""]} for page in (plain, hostile)]
    assert kinds[1] == kinds[0]
    assert hostile.text.count(HOSTILE) == plain.text.count(HOSTILE) + 8
    assert HOSTILE in json.loads(hostile.data)["transformers"][0]["steps"][0]["dense"]


def test_the_grid_is_painted_however_many_numbers_there_are(browser_page, tmp_path):
    """As many as of two experts of 40 layers, 40 heads and 50 steps: a function does not take so many arguments."""
    data = data_of()
    (large,) = data["transformers"] = [transformer("transformer", layers=8, heads=16)]
    sparse = {"dense": None, "heads": [MEASURE] * 16}
    large["steps"] = [{"step": step, "layers": [sparse] * 8} for step in range(1250)]
    data["sampling"]["num_inference_steps"] = 1250
    (tmp_path / "inspect.html").write_text(as_page(data, {"map.png": b"PNG"}))
    browser_page.goto((tmp_path / "inspect.html").as_uri())
    for measure, shown in (("recall", "pale is 88 %"), ("error", "strong is 15 %")):
        browser_page.locator(f"[data-measure={measure}]").click()
        browser_page.locator("[data-role=legend]", has_text=shown).wait_for(timeout=10_000)


@pytest.mark.parametrize(
    ("share", "shown"),
    [(None, "–"), (0.0, "0.0 %"), (0.0812, "8.1 %"), (0.0996, "10 %"), (0.25, "25 %"), (1.0, "100 %")],
)
def test_shares_are_written_with_what_they_need(share, shown):
    assert percent(share) == shown


def test_a_head_in_words():
    assert in_words(MEASURE) == ("spatial, density 25 %, recall 88 %, error 1.2 %, skipped blocks enter as their mean")
    assert in_words(MEASURE | {"skipped": True}).endswith("error 1.2 %, output skipped")
