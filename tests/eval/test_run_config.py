from __future__ import annotations

import dataclasses

import pytest
from enabled import config
from tiny_models import generate, tiny_wan_pipeline

import diffsparse.config
from diffsparse import Adaptive, SparseAttentionConfig
from diffsparse.eval.baseline import AttentionBackend, Cache
from diffsparse.eval.named_config import read_config
from diffsparse.eval.run_config import RunConfig, read_run_config, read_run_configs
from diffsparse.speed_check import SpeedCheck


@pytest.mark.parametrize("text", ["fast", "adaptive:density=0.2,dense_steps=1e-1", "dense:backend=eager"])
def test_a_sparse_config_is_read_as_everywhere(text):
    config = read_run_config(text)
    assert config.parts == (read_config(text),)
    assert config.kind == "sparse attention"


def test_backends_and_caches_are_configs_too():
    backend, cache = read_run_configs(["backend:_native_math", "FirstBlockCache:threshold=0.1"])
    assert backend.parts == (AttentionBackend("_native_math"),)
    assert backend.kind == "dense attention by another backend"
    assert cache.parts == (Cache("FirstBlockCacheConfig", {"threshold": 0.1}),)
    assert cache.kind == "cache"
    assert not backend.has_sparse_attention
    assert not cache.has_sparse_attention


def test_a_plus_joins_what_is_used_at_once_and_is_left_alone_inside_of_a_number():
    config = read_run_config("backend:native+firstblockcache:threshold=1e+3+adaptive:density=0.2")
    assert config.parts == (
        AttentionBackend("native"),
        Cache("FirstBlockCacheConfig", {"threshold": 1000.0}),
        SparseAttentionConfig(Adaptive(density=0.2)),
    )
    assert config.kind == "dense attention by another backend, cache, sparse attention"
    assert config.has_sparse_attention


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fats", "'fats' is neither a preset .*fast.* strategy .*adaptive.* cache .*firstblockcache.* backend:sage"),
        ("", "'' is neither"),
        ("adaptive:densty=0.2", "no option 'densty'"),
        ("fast+adaptive", "fast.adaptive: two of a kind"),
        ("firstblockcache+seacache", "two of a kind"),
        ("backend:toaster", "backend:toaster: 'toaster' is no attention backend of diffusers.*sage"),
        ("fast+backend:", "no attention backend"),
        ("firstblockcache:threshhold=0.1", "no option 'threshhold'.*threshold"),
        ("firstblockcache:threshold=high", "`threshold` of FirstBlockCacheConfig must be float, got 'high'"),
        ("firstblockcache:threshold", "OPTION=VALUE"),
        ("nowhere.safetensors", "nowhere.safetensors"),
        (r"C:\plans\mine.safetensors:dense_steps=0.1", r"no plan file C:\\plans\\mine\.safetensors\."),
    ],
)
def test_what_is_wrong_is_said(text, says):
    with pytest.raises(ValueError, match=says):
        read_run_config(text)


def test_a_plus_in_a_path_with_a_drive_joins_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A name like any other, but in Windows.
    (tmp_path / r"C:\a+b.safetensors").touch()
    with pytest.raises(ValueError, match=r"C:\\a\+b\.safetensors cannot be read as safetensors"):
        read_run_config(r"C:\a+b.safetensors:dense_steps=0.1")


@pytest.mark.parametrize(
    "texts",
    [["fast", "fast"], ["balanced", "adaptive:density=0.25"], ["fast", "dense"], ["seacache", "SeaCache"]],
)
def test_two_configs_that_are_one_are_refused(texts):
    with pytest.raises(ValueError, match="--config"):
        read_run_configs(texts)


def test_a_folder_name_holds_nothing_that_a_file_system_refuses():
    assert read_run_config("adaptive:tile=(1, 2, 2), tail=False").folder == "adaptive_tile=_1,_2,_2_,_tail=False"
    assert read_run_config("fast+backend:native").folder == "fast+backend_native"


def test_long_options_have_short_folder_names_that_differ_as_they_do(tmp_path):
    ratios = [f"{1 + step / 1000}" for step in range(50)]
    texts = [f"magcache:mag_ratios=[{','.join([*ratios[:-1], last])}]" for last in ("1.5", "1.6")]
    folders = [config.folder for config in read_run_configs(texts)]
    assert len(set(folders)) == 2
    for folder in folders:
        assert folder.startswith("magcache_mag_ratios=_1.0,1.001,")
        (tmp_path / folder).mkdir()


def test_what_a_run_compares_is_not_timed(monkeypatch):
    monkeypatch.setattr(diffsparse.config, "MIN_TOKENS", 0)
    monkeypatch.setattr(SpeedCheck, "time", lambda *args: pytest.fail("timed"))
    pipe = tiny_wan_pipeline()
    with RunConfig("small", (dataclasses.replace(config(), min_tokens=None),)).on(pipe, num_steps=2):
        generate(pipe)
        assert pipe.sparse_attention_report().density < 1
