"""Give diffusers' pipelines and models the functions of `enable.py` as methods, without importing diffusers for it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

OWNERS = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
    "diffusers.models.modeling_utils": "ModelMixin",
}
"""Modules of diffusers, and the class in each that gets the methods."""
OLDEST_TORCH = (2, 9)
"""Of `setup.cfg`. ComfyUI's nodes run on older ones, where diffusers may be installed as well."""


def add_methods() -> None:
    """Give each class in `OWNERS` its methods: now where its module is loaded, else when something loads it."""
    # ComfyUI has no diffusers, and needs none.
    if importlib.util.find_spec("diffusers") is None:
        return
    finder = _AfterLoading()
    # First, so that no module is loaded unseen between the look and the watch.
    sys.meta_path.insert(0, finder)
    for name in OWNERS:
        if name in sys.modules:
            # Another thread may be loading it; importing it waits for that.
            finder.loaded(importlib.import_module(name))


class _AfterLoading(MetaPathFinder):
    """Finds the modules in `OWNERS` as Python does, and is told when they are loaded. Goes away after the last."""

    def __init__(self) -> None:
        self._awaited = set(OWNERS)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self._awaited:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        loader: Any = spec and spec.loader
        if loader is None:
            return None
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            self.loaded(module)

        loader.exec_module = exec_module
        return spec

    def loaded(self, module: ModuleType) -> None:
        """Give the class of a loaded module its methods; a torch that is too old for them gets a warning instead."""
        import torch

        self._awaited.discard(module.__name__)
        if not self._awaited and self in sys.meta_path:
            sys.meta_path.remove(self)
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= OLDEST_TORCH:
            from diffsparse import enable

            owner: Any = getattr(module, OWNERS[module.__name__])
            owner.enable_sparse_attention = enable.enable_sparse_attention
            owner.disable_sparse_attention = enable.disable_sparse_attention
            owner.is_sparse_attention_enabled = property(enable.is_sparse_attention_enabled)
            owner.sparse_attention_report = enable.sparse_attention_report
        else:
            warnings.warn(
                f"diffsparse: the pipelines of diffusers get no `enable_sparse_attention`, which needs torch "
                f"{'.'.join(map(str, OLDEST_TORCH))} or newer, this is {torch.__version__}.",
                stacklevel=2,
            )
