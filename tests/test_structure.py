"""The house: which folder may import what, and what has to work where little is installed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS_WITH_LINKS = ("kernels", "pipelines", "eval")
OPTIONAL_PACKAGES = ("triton", "imageio", "lpips", "matplotlib", "rich", "torchmetrics")

# Each imports only from those to its right.
STORY = (
    "enable",
    "processors",
    "transformer_session",
    "session",
    "config",
    "strategies",
    "heads",
    "plan",
    "block_mask",
    "permutation",
    "grid",
)


class Import(NamedTuple):
    """One name that a file imports, whole: `diffsparse.grid`, `torch.nn`."""

    name: str
    on_loading: bool
    """Whether loading the file imports it, or only calling a function of it."""


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(file): file for file in sorted((ROOT / "diffsparse").rglob("*.py"))}


def imports_of(file: Path) -> set[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    later = {id(node) for function in functions for node in ast.walk(function)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: imports are absolute here"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in SOURCES else str(node.module) for name in whole]
        else:
            continue
        found |= {Import(name, id(node) not in later) for name in names}
    return found


IMPORTS = {name: imports_of(file) for name, file in SOURCES.items()}


def ours(name: str) -> set[str]:
    return {found.name for found in IMPORTS[name] if found.name.split(".")[0] == "diffsparse"}


def others(name: str, on_loading: bool = False) -> set[str]:
    """Packages that are neither ours nor Python's, imported anywhere in the module or only when it is loaded."""
    packages = {found.name.split(".")[0] for found in IMPORTS[name] if found.on_loading or not on_loading}
    return packages - sys.stdlib_module_names - {"diffsparse"}


def folder(name: str) -> str:
    """The part of the house that a module belongs to, by its folder; the "core" has none."""
    part = name.split(".")[1] if "." in name else ""
    return part if part in {*FOLDERS_WITH_LINKS, "comfy", "integrations"} else "core"


def test_the_reader_sees_imports():
    assert ours("diffsparse.plan") == {
        "diffsparse.block_mask",
        "diffsparse.kernels.block_sparse",
        "diffsparse.permutation",
    }
    assert others("diffsparse.processors") == {"torch", "diffusers"}
    assert others("diffsparse.processors", on_loading=True) == {"torch"}


@pytest.mark.parametrize("name", SOURCES)
def test_imports_run_one_way(name):
    allowed = {
        "kernels": {"kernels"},
        "pipelines": {"pipelines"},
        "core": {"core", "kernels", "pipelines"},
        "eval": {"eval", "core", "kernels", "pipelines"},
        "comfy": {"comfy", "core", "kernels", "pipelines"},
        "integrations": {"integrations", "core", "kernels", "pipelines"},
    }[folder(name)]
    assert {imported for imported in ours(name) if folder(imported) not in allowed} == set()


def test_no_imports_in_a_circle():
    order = TopologicalSorter({name: ours(name) - {name} for name in SOURCES}).static_order()
    assert set(order) >= set(SOURCES)


def test_core_imports_in_the_order_of_a_call():
    def place(name: str) -> int | None:
        part = name.split(".")[1] if "." in name else ""
        return STORY.index(part) if part in STORY else None

    backwards = [
        (name, imported)
        for name in SOURCES
        for imported in ours(name)
        if (here := place(name)) is not None and (there := place(imported)) is not None and there < here
    ]
    assert backwards == []


@pytest.mark.parametrize("name", [name for name in SOURCES if folder(name) in ("kernels", "pipelines")])
def test_leaves_import_torch_only(name):
    assert others(name) <= {"torch", "triton"}


@pytest.mark.parametrize("name", [name for name in SOURCES if folder(name) == "core"])
def test_core_loads_with_torch_only(name):
    assert others(name, on_loading=True) <= {"torch"}


@pytest.mark.parametrize("name", [name for name in SOURCES if folder(name) == "integrations"])
def test_integrations_import_torch_and_their_engine(name):
    assert others(name) <= {"torch", "vllm", "vllm_omni"}


def test_triton_is_imported_where_it_is_launched():
    kernels = {name for name in SOURCES if name.endswith(("_triton", "_gluon"))}
    assert {name for name in SOURCES if "triton" in others(name)} <= kernels
    at_loading = {
        name
        for name in set(SOURCES) - kernels
        for found in IMPORTS[name]
        if found.on_loading and found.name.endswith(("_triton", "_gluon"))
    }
    assert at_loading == set()


def test_every_launch_says_that_products_and_sums_are_fused():
    launches = [
        call
        for file in (ROOT / "diffsparse" / "kernels").glob("*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Subscript)
        and ast.unparse(call.func.value).endswith("_kernel")
    ]
    assert launches
    silent = [ast.unparse(call.func) for call in launches if "**FUSION" not in ast.unparse(call)]
    assert not silent


@pytest.mark.parametrize("name", FOLDERS_WITH_LINKS)
def test_a_folder_with_a_link_is_no_package_of_its_own(name):
    # With an __init__.py, `import kernels` from the root would find ours and not Hugging Face's.
    assert not (ROOT / "diffsparse" / name / "__init__.py").exists()


@pytest.mark.parametrize("name", FOLDERS_WITH_LINKS)
def test_links_point_into_the_package(name):
    link = ROOT / name
    if not link.is_symlink():
        pytest.skip("a checkout without symbolic links")
    assert link.readlink() == Path("diffsparse", name)


def test_no_file_hides_a_module_of_python():
    # Python looks in the folder of the script that it runs before it looks among its own modules.
    assert {file.name for file in SOURCES.values() if file.stem in sys.stdlib_module_names} == set()


def test_nothing_is_imported_through_a_link():
    files = [*SOURCES.values(), *(ROOT / "tests").rglob("*.py")]
    through = {(file.name, found.name) for file in files for found in imports_of(file)}
    assert {pair for pair in through if pair[1].split(".")[0] in FOLDERS_WITH_LINKS} == set()


@pytest.mark.parametrize(
    "missing", [OPTIONAL_PACKAGES, ("diffusers", *OPTIONAL_PACKAGES)], ids=["optional", "diffusers"]
)
def test_importing_diffsparse_needs_only(missing):
    hidden = f"import sys; sys.modules.update(dict.fromkeys({missing!r}))"  # None makes an import fail
    shown = "import diffsparse; print(*diffsparse.PRESETS)"
    result = subprocess.run(
        [sys.executable, "-c", f"{hidden}; {shown}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stdout.split()) == (0, ["quality", "balanced", "fast"]), result.stderr


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_python_on_a_page_can_be_read(page):
    for block in re.findall(r"^ *```python\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        ast.parse(textwrap.dedent(block))
