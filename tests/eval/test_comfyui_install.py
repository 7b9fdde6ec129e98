from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

import diffsparse
from diffsparse.comfy.nodes import NODE_CLASS_MAPPINGS
from diffsparse.eval import cli
from diffsparse.eval.comfyui_install import SOURCE


@pytest.fixture
def comfyui(tmp_path):
    (tmp_path / "custom_nodes" / "another").mkdir(parents=True)
    (tmp_path / "custom_nodes" / "another" / "__init__.py").write_text("")
    return tmp_path


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def load(folder):
    """The folder as ComfyUI loads it: by its path."""
    spec = importlib.util.spec_from_file_location("custom_nodes_shim", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_installed_shows_the_nodes_and_is_removed_again(comfyui, capsys):
    before = listing(comfyui)
    for _ in range(2):  # The second time is an update.
        assert cli.main(["comfyui-install", str(comfyui)]) == 0
    folder = comfyui / "custom_nodes" / "comfyui-diffsparse"
    module = load(folder)
    assert module.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS
    for name in NODE_CLASS_MAPPINGS:
        assert (folder / module.WEB_DIRECTORY / "docs" / f"{name}.md").read_text().startswith("# DiffSparse ")
    assert cli.main(["comfyui-uninstall", str(comfyui)]) == 0
    assert listing(comfyui) == before
    told = capsys.readouterr().out
    assert sys.executable in told
    # No package index has it.
    assert "checkout of diffsparse" in told
    assert "-m pip install --no-deps .\n" in told


def test_the_portable_version_for_windows_is_found(comfyui):
    portable = comfyui / "portable"
    (portable / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    assert cli.main(["comfyui-install", str(portable)]) == 0
    assert (portable / "ComfyUI" / "custom_nodes" / "comfyui-diffsparse" / "__init__.py").is_file()


def test_files_of_the_user_stay(comfyui, capsys):
    cli.main(["comfyui-install", str(comfyui)])
    own = comfyui / "custom_nodes" / "comfyui-diffsparse" / "example_workflows" / "mine.json"
    own.write_text("{}")
    assert cli.main(["comfyui-uninstall", str(comfyui)]) == 0
    assert listing(own.parent.parent) == ["example_workflows", "example_workflows/mine.json"]
    assert str(own) in capsys.readouterr().out


@pytest.mark.parametrize("command", ["comfyui-install", "comfyui-uninstall"])
def test_a_folder_without_comfyui_is_refused(command, tmp_path, capsys):
    assert cli.main([command, str(tmp_path)]) == cli.USER_ERROR
    assert "is no ComfyUI: it has no folder custom_nodes" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["comfyui-install", "comfyui-uninstall"])
def test_a_folder_of_somebody_else_is_left_alone(command, comfyui, capsys):
    other = comfyui / "custom_nodes" / "comfyui-diffsparse"
    other.mkdir()
    (other / "pyproject.toml").write_text('[tool.comfy]\nDisplayName = "Another"')
    assert cli.main([command, str(comfyui)]) == cli.USER_ERROR
    assert "is not DiffSparse's" in capsys.readouterr().err
    assert listing(other) == ["pyproject.toml"]


@pytest.mark.parametrize("command", ["comfyui-install", "comfyui-uninstall"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_link_and_what_it_leads_to_are_left_alone(command, broken, comfyui, tmp_path, capsys):
    checkout = tmp_path / "checkout"
    if not broken:
        shutil.copytree(SOURCE, checkout)
    link = comfyui / "custom_nodes" / "comfyui-diffsparse"
    link.symlink_to(checkout, target_is_directory=True)
    before = listing(tmp_path)
    assert cli.main([command, str(comfyui)]) == cli.USER_ERROR
    assert "is not DiffSparse's" in capsys.readouterr().err
    assert listing(tmp_path) == before
    assert link.is_symlink()


@pytest.mark.parametrize("command", ["comfyui-install", "comfyui-uninstall"])
def test_a_junction_of_windows_is_a_link_too(command, comfyui, tmp_path, monkeypatch):
    shutil.copytree(SOURCE, tmp_path / "checkout")
    link = comfyui / "custom_nodes" / "comfyui-diffsparse"
    link.symlink_to(tmp_path / "checkout", target_is_directory=True)
    before = listing(tmp_path)
    monkeypatch.setattr(Path, "is_symlink", lambda path: False)
    assert cli.main([command, str(comfyui)]) == cli.USER_ERROR
    assert listing(tmp_path) == before


def test_where_the_package_is_missing_the_folder_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffsparse.comfy", None)
    with pytest.raises(ImportError, match=r"checkout.* -m pip install --no-deps \.$") as error:
        load(SOURCE)
    assert sys.executable in str(error.value)


def test_the_folder_has_the_version_of_the_package():
    assert f'\nversion = "{diffsparse.__version__}"\n' in (SOURCE / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", sorted((SOURCE / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_workflows_fit_the_nodes(path):
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, entry, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][entry]["link"] == link
        assert nodes[source]["outputs"][output]["type"] == kind
    ours = [node for node in nodes.values() if node["type"] in NODE_CLASS_MAPPINGS]
    assert ours
    for node in ours:
        types = NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
        inputs = types["required"] | types.get("optional", {})
        widgets = [options["default"] for _, options in inputs.values() if "default" in options]
        assert [type(value) for value in node.get("widgets_values", [])] == [type(value) for value in widgets]
        assert {entry["name"] for entry in node["inputs"]} <= set(inputs)
