from __future__ import annotations

import pytest

from diffsparse import Adaptive, SparseAttentionConfig
from diffsparse.eval.config_file import config_texts
from diffsparse.eval.run_config import read_run_configs

FILE = """\
- fast
- adaptive: {density: 0.2, dense_steps: 0.1, tile: [2, 4, 8], tail: false}
- firstblockcache:threshold=0.1+balanced
- sparsevideogen:
    density: 0.3
    dense_layers: [0]
    backend: eager
"""


def test_a_file_stands_for_the_configs_that_it_lists(tmp_path):
    path = tmp_path / "configs.yaml"
    path.write_text(FILE)
    texts = config_texts(["quality", str(path)])
    assert texts[:2] == ["quality", "fast"]
    configs = read_run_configs(texts)
    assert configs[2].parts == (
        SparseAttentionConfig(Adaptive(density=0.2, tile=(2, 4, 8), tail=False), dense_steps=0.1),
    )
    assert [config.kind for config in configs][3] == "cache, sparse attention"
    assert configs[4].parts[0].dense_layers == (0,)
    assert configs[4].parts[0].backend == "eager"


def test_what_is_no_file_of_configs_is_left_as_it_is():
    texts = ["balanced", "plan.safetensors", "adaptive:density=0.2"]
    assert config_texts(texts) == texts


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("balanced", "must be a list of configs"),
        ("", "must be a list of configs"),
        ("[]", "must be a list of configs"),
        ("- {adaptive: {density: 0.2}, radial: {}}", "is no config"),
        ("- adaptive: 0.2", "is no config"),
        ("- 3", "is no config"),
        ("- [", "cannot be read"),
        ("[" * 2000, "cannot be read"),
        ("- adaptive: {density: 2020-13-45}", "cannot be read"),
        ("- !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_a_file_that_lists_no_configs_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "bad.yml"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"bad.yml.*{said}"):
        config_texts([str(path)])


def test_a_missing_file_is_refused_by_name():
    with pytest.raises(ValueError, match=r"nowhere\.yaml cannot be read"):
        config_texts(["nowhere.yaml"])
