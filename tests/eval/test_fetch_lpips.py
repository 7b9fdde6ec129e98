from __future__ import annotations

import dataclasses

import pytest

from diffsparse.eval import cli
from diffsparse.eval.lpips_backbone import BACKBONES
from diffsparse.eval.lpips_metric import Lpips, lpips_or_reason


@pytest.fixture
def server(random_backbones, tmp_path):
    """A folder that stands for torchvision's server, with SqueezeNet in it."""
    folder = tmp_path / "server"
    # Undone in this order: pytest's own monkeypatch, the last to end, would put the trusted ones back for good.
    with random_backbones.trusted(), pytest.MonkeyPatch.context() as patch:
        for net, backbone in BACKBONES.items():
            there = dataclasses.replace(backbone, folder_address=folder.as_uri() + "/")
            patch.setitem(BACKBONES, net, there)
        random_backbones.put_into(folder, "squeeze")
        yield folder


def test_what_was_fetched_is_found_and_not_fetched_again(server, empty_cache, capsys):
    assert cli.main(["eval", "fetch-lpips", "--net", "squeeze"]) == 0
    file = empty_cache / BACKBONES["squeeze"].file_name
    assert str(file) in capsys.readouterr().out
    assert file.read_bytes() == (server / file.name).read_bytes()
    assert isinstance(lpips_or_reason("squeeze"), Lpips)
    (server / file.name).unlink()
    assert cli.main(["eval", "fetch-lpips", "--net", "squeeze"]) == 0
    assert "there already" in capsys.readouterr().out


def test_a_damaged_file_in_the_cache_is_replaced(server, empty_cache):
    empty_cache.mkdir(parents=True)
    file = empty_cache / BACKBONES["squeeze"].file_name
    file.write_bytes(b"half a download")
    assert cli.main(["eval", "fetch-lpips", "--net", "squeeze"]) == 0
    assert file.read_bytes() == (server / file.name).read_bytes()


def test_another_file_is_thrown_away(server, empty_cache, capsys):
    (server / BACKBONES["squeeze"].file_name).write_bytes(b"<html>log in first</html>")
    assert cli.main(["eval", "fetch-lpips", "--net", "squeeze"]) == 2
    message = capsys.readouterr().err
    assert "is not SqueezeNet 1.1: invalid hash" in message
    assert "Traceback" not in message
    assert list(empty_cache.iterdir()) == []


def test_without_a_network_it_says_how_else(server, empty_cache, capsys):
    assert cli.main(["eval", "fetch-lpips", "--net", "vgg"]) == 2
    message = capsys.readouterr().err
    for part in (BACKBONES["vgg"].address, "could not be downloaded", "copy it to", str(empty_cache)):
        assert part in message
    assert list(empty_cache.iterdir()) == []
