"""diffusers' classes get their methods whenever diffusers is loaded, and importing diffsparse loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffsparse
from diffsparse.methods import OLDEST_TORCH

ROOT = Path(__file__).parent.parent

SHOW_METHODS = """
for owner in (pipeline_utils.DiffusionPipeline, modeling_utils.ModelMixin, modular_pipeline.ModularPipeline):
    print(callable(owner.enable_sparse_attention), isinstance(owner.is_sparse_attention_enabled, property))
import sys
print(*(type(finder).__name__ for finder in sys.meta_path if type(finder).__module__.startswith("diffsparse")))
"""
IMPORT_ALL = """
from diffusers.pipelines import pipeline_utils
from diffusers.models import modeling_utils
from diffusers.modular_pipelines import modular_pipeline
"""


# What the methods do is tested elsewhere, and needs torch.
WITHOUT_TORCH = """
import types
sys.modules["torch"] = torch = types.ModuleType("torch")
torch.__version__ = "2.10.0+cu130"
sys.modules["diffsparse.enable"] = stand_in = types.ModuleType("diffsparse.enable")
for name in ("enable_sparse_attention", "disable_sparse_attention", "is_sparse_attention_enabled"):
    setattr(stand_in, name, lambda model: None)
stand_in.sparse_attention_report = lambda model: None
"""


def python(code, *paths):
    """What a fresh interpreter prints, by lines."""
    path = [*map(str, paths), str(ROOT)]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture
def stand_in(tmp_path):
    """A folder with a package that has diffusers' three modules and loads at once."""
    for module, owner in (
        ("pipelines/pipeline_utils", "DiffusionPipeline"),
        ("modular_pipelines/modular_pipeline", "ModularPipeline"),
        ("models/modeling_utils", "ModelMixin"),
    ):
        file = tmp_path / "diffusers" / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        for package in (file.parent, file.parent.parent):
            (package / "__init__.py").touch()
        file.write_text(f"class {owner}: pass\n")
    return tmp_path


@pytest.mark.parametrize("first", ["diffsparse", "diffusers", "half of diffusers"])
def test_the_order_of_imports_does_not_matter(first, stand_in):
    before = {
        "diffsparse": "",
        "diffusers": IMPORT_ALL,
        "half of diffusers": "from diffusers.models import modeling_utils",
    }[first]
    lines = python(f"{WITHOUT_TORCH}{before}\nimport diffsparse{IMPORT_ALL}{SHOW_METHODS}", stand_in)
    assert lines == ["True True"] * 3 + [""]


def test_what_diffusers_never_loads_is_awaited_and_not_loaded(stand_in):
    watching = 'print(*(type(finder).__name__ for finder in sys.meta_path if "diffsparse" in type(finder).__module__))'
    code = f"""{WITHOUT_TORCH}
import diffsparse
from diffusers.models import modeling_utils
print(*sorted(name for name in sys.modules if name.startswith("diffusers.") and name.count(".") == 2))
{watching}
"""
    assert python(code, stand_in) == ["diffusers.models.modeling_utils", "_AfterLoading"]


def test_diffusers_loads_with_a_torch_that_is_too_old_for_the_methods(stand_in):
    code = f"""{WITHOUT_TORCH}
torch.__version__ = "2.8.1"
import diffsparse, warnings
warnings.simplefilter("default")
with warnings.catch_warnings(record=True) as caught:
    {IMPORT_ALL.strip().replace(chr(10), "; ")}
print(*{{str(warning.message) for warning in caught}})
print(hasattr(pipeline_utils.DiffusionPipeline, "enable_sparse_attention"), sys.meta_path[0].__module__)
"""
    said, methods = python(code, stand_in)
    assert "needs torch 2.9 or newer, this is 2.8.1" in said
    assert methods.split()[0] == "False"
    assert "diffsparse" not in methods


def test_the_oldest_torch_is_that_of_the_setup():
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert f"\n    torch>={'.'.join(map(str, OLDEST_TORCH))}\n" in setup


def test_importing_diffsparse_and_asking_for_help_load_no_heavy_library():
    code = """
import diffsparse
from diffsparse.eval import cli
try:
    cli.main(["--help"])
except SystemExit as stop:
    print("exit", stop.code)
print(*sorted({"torch", "diffusers", "transformers", "numpy"} & set(sys.modules)))
"""
    assert python(code)[-2:] == ["exit 0", ""]


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(diffsparse, name) is not None for name in diffsparse.__all__)
    assert set(diffsparse.__all__) <= set(dir(diffsparse))
    with pytest.raises(AttributeError, match="no attribute 'turbo'"):
        _ = diffsparse.turbo


def test_type_checkers_see_the_names_that_are_there():
    source = (ROOT / "diffsparse" / "__init__.py").read_text(encoding="utf-8")
    imports = next(node for node in ast.parse(source).body if isinstance(node, ast.If)).body
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    assert seen == {name: f"diffsparse.{home}" for name, home in diffsparse._HOMES.items()}
