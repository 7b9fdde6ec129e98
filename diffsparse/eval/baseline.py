"""What sparse attention is held against beside dense attention: diffusers' attention backends and its caches."""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffsparse.eval.generate import transformers_of

BACKEND_PREFIX = "backend:"

CACHES = (
    "FasterCacheConfig",
    "FirstBlockCacheConfig",
    "MagCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "SeaCacheConfig",
    "TaylorSeerCacheConfig",
)
"""What `transformer.enable_cache` takes for videos and images; older releases of diffusers lack some."""


@dataclass(frozen=True)
class AttentionBackend:
    """Dense attention by one of diffusers' attention backends, such as sage.

    Raises:
        ValueError: there is no such backend, or a package for it is missing, with what to install.
    """

    name: str
    kind = "dense attention by another backend"

    def __post_init__(self) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName

        names = sorted(backend.value for backend in AttentionBackendName)
        if self.name not in names:
            raise ValueError(f"{self.name!r} is no attention backend of diffusers, which has {', '.join(names)}.")
        if (reason := _why_not(self.name)) is not None:
            # To ask for a kernel from the hub is to download it.
            here = [name for name in names if not name.endswith("_hub") and _why_not(name) is None]
            raise ValueError(f"{reason} Here are the packages for {', '.join(here)}.")

    @contextlib.contextmanager
    def on(self, pipe: Any, num_steps: int) -> Iterator[None]:
        """Put it on the attention of a pipeline inside the block.

        Raises:
            ValueError: no layer of the pipeline's transformers lets diffusers choose a backend.
        """
        from diffusers import attention_backend

        layers = [module for transformer in transformers_of(pipe) for module in transformer.modules()]
        if not any(hasattr(getattr(layer, "processor", None), "_attention_backend") for layer in layers):
            raise ValueError(f"no layer of {type(pipe).__name__} takes an attention backend of diffusers.")
        with attention_backend(self.name):
            yield


@dataclass(frozen=True)
class Cache:
    """A cache of diffusers, which takes parts of a step from an earlier one.

    Args:
        name: of the class of its config in diffusers.
        options: fields of that class, as far as they are given. The number of steps and where to find the timestep are
            filled in.

    Raises:
        ValueError: an option that is unknown or of a wrong type, or what diffusers does not accept.
    """

    name: str
    options: dict[str, Any]
    kind = "cache"

    def __post_init__(self) -> None:
        types_of = _options_of(self.name)
        for option, value in self.options.items():
            if option not in types_of:
                raise ValueError(f"there is no option {option!r}. {self.name} has {', '.join(sorted(types_of))}.")
            if not _is_a(value, types_of[option]):
                shown = getattr(types_of[option], "__name__", None) or str(types_of[option])
                raise ValueError(f"`{option}` of {self.name} must be {shown}, got {value!r}.")
        self._config(None, 1)

    @contextlib.contextmanager
    def on(self, pipe: Any, num_steps: int) -> Iterator[None]:
        """Enable it on the transformers of a pipeline inside the block.

        Raises:
            ValueError: diffusers has no caches for a transformer, or this one finds nothing in it.
        """
        with contextlib.ExitStack() as stack:
            for transformer in transformers_of(pipe):
                if not hasattr(transformer, "enable_cache"):
                    raise ValueError(f"diffusers has no caches for {type(transformer).__name__}.")
                num_hooks = _num_hooks(transformer)
                transformer.enable_cache(self._config(pipe, num_steps))
                stack.callback(transformer.disable_cache)
                # diffusers says nothing when its patterns match no module.
                if _num_hooks(transformer) == num_hooks:
                    identifiers = " or ".join(name for name in _options_of(self.name) if name.endswith("_identifiers"))
                    raise ValueError(
                        f"{self.name} finds nothing to keep in {type(transformer).__name__}. "
                        f"Name modules by {identifiers or 'another cache'}."
                    )
            yield

    def _config(self, pipe: Any, num_steps: int) -> Any:
        """Diffusers' own config."""
        cls = _cache_class(self.name)
        fields = cls.__dataclass_fields__
        filled_in = {
            "num_inference_steps": num_steps,
            "current_timestep_callback": lambda: pipe.current_timestep,
        }
        return cls(**{key: value for key, value in filled_in.items() if key in fields} | self.options)


def cache_names() -> dict[str, str]:
    """The names of caches on a command line, and of their classes in this release of diffusers."""
    import diffusers

    return {name.removesuffix("Config").lower(): name for name in CACHES if hasattr(diffusers, name)}


def _why_not(backend: str) -> str | None:
    """Why a backend cannot be used here, by diffusers' own check of packages; None where it can."""
    from diffusers import attention_backend

    try:
        with attention_backend(backend):
            return None
    # Kernels from the hub may fail to be downloaded, in as many ways as there are networks.
    except Exception as error:
        return f"{error}".rstrip(". ") + "."


def _cache_class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def _num_hooks(transformer: Any) -> int:
    """How many hooks of diffusers hang on its modules."""
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    return sum(len(registry.hooks) for registry in registries if registry is not None)


def _options_of(name: str) -> dict[str, Any]:
    """Types of the options of a cache that can be written on a command line."""
    hints = typing.get_type_hints(_cache_class(name))
    return {option: hint for option, hint in hints.items() if not option.startswith("_") and _can_be_written(hint)}


def _can_be_written(hint: Any) -> bool:
    return any(_plain(part) in (int, float, bool, str, list, tuple) for part in _alternatives(hint))


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a literal is of a type, as far as a container's own."""
    for kind in map(_plain, _alternatives(hint)):
        if kind in (list, tuple) and isinstance(value, (list, tuple)):
            return True
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return True
        if isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) <= (kind is bool):
            return True
    return False


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _plain(hint: Any) -> Any:
    return typing.get_origin(hint) or hint
