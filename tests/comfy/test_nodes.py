from __future__ import annotations

import pytest

from diffsparse.comfy.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_every_input_says_what_it_does(name):
    node = NODE_CLASS_MAPPINGS[name]
    assert node.DESCRIPTION
    assert NODE_DISPLAY_NAME_MAPPINGS[name].startswith("DiffSparse ")
    types = node.INPUT_TYPES()
    for inputs in (types["required"], types.get("optional", {})):
        for name, (kind, options) in inputs.items():
            assert options["tooltip"].endswith("."), name
            assert kind in ("MODEL", "LATENT") or "default" in options, name


def test_choices_are_lists_as_comfyui_checks_no_others():
    types = NODE_CLASS_MAPPINGS["DiffSparseAttention"].INPUT_TYPES()
    inputs = types["required"] | types["optional"]
    for name in ("preset", "quantize"):
        choices, options = inputs[name]
        assert isinstance(choices, list)
        assert options["default"] in choices
