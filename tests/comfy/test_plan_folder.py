from __future__ import annotations

import sys

import pytest

from diffsparse.comfy.plan_folder import find_plans, new_plans, plan_names


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "models" / "diffsparse" / "wan").mkdir(parents=True)
    return tmp_path / "models" / "diffsparse"


def test_plan_files_in_the_folders_of_comfyui_are_listed(folder):
    for name in ("a.safetensors", "wan/b.safetensors", "notes.txt", ".a.12.unfinished.safetensors"):
        (folder / name).touch()
    assert plan_names() == ("none", "a.safetensors", "wan/b.safetensors")
    assert find_plans("wan/b.safetensors") == folder / "wan" / "b.safetensors"


def test_a_folder_that_the_user_has_named_is_searched_first(folder, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "mine.safetensors").touch()
    sys.modules["folder_paths"].add_model_folder_path("diffsparse", str(other))
    assert plan_names() == ("none", "mine.safetensors")
    assert new_plans("new").parent == other


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "gone.safetensors", "none", ""])
def test_nothing_outside_of_them_is_read(folder, name):
    (folder.parent / "secret.safetensors").touch()
    with pytest.raises(ValueError, match=r"is no plan file in .*models/diffsparse.*press R"):
        find_plans(name)


def test_without_comfyui_there_are_no_files(monkeypatch):
    monkeypatch.delitem(sys.modules, "folder_paths")
    assert plan_names() == ("none",)
    with pytest.raises(ValueError, match="no ComfyUI runs here"):
        new_plans("a")


@pytest.mark.parametrize("name", ["plan", " plan ", "plan.safetensors"])
def test_a_new_file_goes_into_the_folder_which_is_made(tmp_path, name):
    assert new_plans(name) == tmp_path / "models" / "diffsparse" / "plan.safetensors"
    assert list((tmp_path / "models" / "diffsparse").iterdir()) == []


@pytest.mark.parametrize("name", ["", " ", "../plan", "a/b", "a\\b", ".hidden", "C:plan", "a\nb", "a.", "plan?"])
def test_a_name_that_is_more_than_a_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is no name of a file"):
        new_plans(name)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", ["con", "NUL.safetensors", " Aux ", "com1", "lpt³.a", "prn .b"])
def test_a_name_that_windows_keeps_for_a_device_is_refused_everywhere(tmp_path, name):
    with pytest.raises(ValueError, match=r"is a device in Windows.* such as \S+_plan\."):
        new_plans(name)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", ["console", "con-1", "com", "com10", "my con"])
def test_a_name_that_only_begins_like_a_device_is_one(tmp_path, name):
    assert new_plans(name).name == f"{name}.safetensors"


def test_a_folder_that_cannot_be_written_to_is_found_before_the_sampling(tmp_path):
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cannot write .*diffsparse.*plan"):
        new_plans("plan")


def test_a_name_that_is_too_long_is_found_before_the_sampling(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*nnn.safetensors.*: File name too long"):
        new_plans("n" * 250)
