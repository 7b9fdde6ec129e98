"""Enable, disable, report: on a pipeline or on a transformer."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsparse.config import SparseAttentionConfig, as_config
from diffsparse.describe import attention_patterns, family_to_start_from
from diffsparse.pipelines.families import FAMILIES, find_family
from diffsparse.pipelines.family import Family
from diffsparse.pipelines.left_alone import LEFT_ALONE
from diffsparse.processors import make_sparse, make_stock
from diffsparse.report import SparseAttentionReport, make_report
from diffsparse.steps import CacheContextReceiver
from diffsparse.transformer_session import TransformerSession

logger = logging.getLogger(__name__)

UNKNOWN = Family(name="unknown", transformers=(), layers=(), layout=lambda transformer, call: None)
"""Stands for a transformer that no family describes: it has no sparse layer."""


@dataclass(frozen=True, eq=False)
class _Enabled:
    """What has to be undone on one transformer."""

    session: TransformerSession
    hooks: tuple[Any, ...]


_ENABLED: weakref.WeakKeyDictionary[nn.Module, _Enabled] = weakref.WeakKeyDictionary()


def enable_sparse_attention(
    model: Any, config: SparseAttentionConfig | str | Path | None = None, family: Family | None = None
) -> None:
    """Make the self-attention of a pipeline's transformers sparse, until `disable_sparse_attention`.

    Works before or after offloading, compiling, or loading adapters. A transformer of no known family stays dense,
    with a warning that says how to describe it.

    Args:
        model: a diffusers pipeline, a modular pipeline, or a transformer.
        config: None or the name of a preset, "quality", "balanced" (the default) or "fast", a plan file of
            `diffsparse calibrate`, *.safetensors, or a `SparseAttentionConfig`.
        family: your own description of transformers, which goes before the known families.

    Raises:
        ValueError: sparse attention is enabled already, the config is wrong, its plans are for another model, there is
            no transformer, or `family` names none of them, other modules than attention, or a mask of text that is no
            argument of theirs.
        TypeError: `config`, `model` or `family` is of another type.
    """
    chosen = as_config(config)
    if family is not None and not isinstance(family, Family):
        raise TypeError(f"`family` must be None or a diffsparse.Family, got {family!r}.")
    own = () if family is None else (family,)
    transformers = _transformers(model, own)
    if not transformers:
        unloaded = [name for name, part in model.components.items() if part is None and name.startswith("transformer")]
        way_out = "diffsparse works on pipelines whose denoiser is a transformer, not a UNet."
        if unloaded:
            way_out = f"Its `{unloaded[0]}` is None: load it first, in a modular pipeline by `load_components()`."
        raise ValueError(
            f"{type(model).__name__} has no diffusion transformer among its components, so there is no attention to "
            f"make sparse. {way_out}"
        )
    active = next((name for name, t in transformers.items() if t in _ENABLED), None)
    if active is not None:
        raise ValueError(
            f"sparse attention is already enabled on `{active}` with "
            f"{_ENABLED[transformers[active]].session.config}. Call `disable_sparse_attention()` first."
        )
    pipeline = None if isinstance(model, nn.Module) else model
    families = {name: find_family(t, own) or find_family(t) for name, t in transformers.items()}
    if family is not None and family not in families.values():
        raise ValueError(
            f"`family` describes {', '.join(family.transformers) or 'no transformer'}, but {type(model).__name__} has "
            f"{', '.join(sorted({type(t).__name__ for t in transformers.values()}))}. Name its class in `transformers`."
        )
    sessions = {name: _open_session(t, families[name], chosen, pipeline, name) for name, t in transformers.items()}
    for name, transformer in transformers.items():
        _attach(transformer, sessions[name])


def disable_sparse_attention(model: Any) -> None:
    """Give a pipeline's transformers their own attention back, exactly. A warning says so if it was not enabled."""
    enabled = [t for t in _transformers(model).values() if t in _ENABLED]
    if not enabled:
        logger.warning("Sparse attention was not enabled, so there is nothing to disable.")
    for transformer in enabled:
        _detach(transformer)


def is_sparse_attention_enabled(model: Any) -> bool:
    """Whether sparse attention is enabled on a pipeline or transformer."""
    return any(transformer in _ENABLED for transformer in _transformers(model).values())


def sparse_attention_report(model: Any) -> SparseAttentionReport:
    """What ran since sparse attention was enabled: density, head classes, every dense fallback and its reason.

    Raises:
        ValueError: sparse attention is not enabled.
    """
    sessions = {name: _ENABLED[t].session for name, t in _transformers(model).items() if t in _ENABLED}
    if not sessions:
        raise ValueError(
            f"sparse attention is not enabled on this {type(model).__name__}, so nothing was recorded. "
            f"Call `enable_sparse_attention()`, then run the pipeline."
        )
    return make_report(sessions)


def _transformers(model: Any, own: tuple[Family, ...] = ()) -> dict[str, nn.Module]:
    """The diffusion transformers of a pipeline by component name, or the model itself by its class name.

    They are those of a known family or of the user's `own`, those that are enabled, and what the pipeline calls so.
    A module that is there under several names comes once, by the first.
    """
    if isinstance(model, nn.Module):
        inner = _unwrapped(model, own)
        return {type(inner).__name__: inner}
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(f"`model` must be a diffusers pipeline or a transformer, got {type(model).__name__}.")
    names: dict[nn.Module, str] = {}
    for name, part in components.items():
        if isinstance(part, nn.Module):
            names.setdefault(_unwrapped(part, own), name)
    return {
        name: module
        for module, name in names.items()
        if find_family(module, (*own, *FAMILIES)) is not None or module in _ENABLED or name.startswith("transformer")
    }


def _unwrapped(module: nn.Module, own: tuple[Family, ...]) -> nn.Module:
    """The transformer inside what torch.compile, peft, DDP or FSDP made of it; the module itself where there is none.

    Each of these has it as its only child. One that nobody has described is looked for in torch.compile's alone.
    """
    inner = uncompiled = _uncompiled(module)
    while (
        find_family(inner, (*own, *FAMILIES)) is None
        and type(inner).__name__ not in LEFT_ALONE
        and inner not in _ENABLED
    ):
        children = list(inner.children())
        if len(children) != 1:
            return uncompiled
        inner = _uncompiled(children[0])
    return inner


def _uncompiled(module: nn.Module) -> nn.Module:
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


def _open_session(
    transformer: nn.Module, family: Family | None, config: SparseAttentionConfig, pipeline: Any, name: str
) -> TransformerSession:
    if family is not None:
        _check_text_mask(transformer, family)
        if pipeline is None and config.dense_steps > 0:
            _warn_of_missing_timestep(transformer, family)
        return TransformerSession(transformer, family, _layer_names(transformer, family), config, pipeline, name)
    class_name = type(transformer).__name__
    if (reason := LEFT_ALONE.get(class_name)) is not None:
        logger.warning("%s stays dense: %s.", class_name, reason)
    else:
        logger.warning(
            "%s is of no model family that diffsparse knows, so it stays dense. To make it sparse, describe it; "
            "start from this, and read diffsparse/pipelines for examples:\n\n%s",
            class_name,
            family_to_start_from(transformer),
        )
    return TransformerSession(transformer, UNKNOWN, (), config, pipeline)


def _check_text_mask(transformer: nn.Module, family: Family) -> None:
    """Raise ValueError where the transformer is given no mask by the family's name of it: hidden text would be seen."""
    argument = (family.text_mask or "").split(".")[0]
    if argument and not _takes(transformer, argument):
        _, *taken = inspect.signature(type(transformer).forward).parameters
        raise ValueError(
            f"`text_mask` {family.text_mask!r} of the family {family.name!r} is no argument of "
            f"{type(transformer).__name__}, which takes {', '.join(taken)}. Name the one that holds the mask of text, "
            f"or None if there is none."
        )


def _takes(transformer: nn.Module, argument: str) -> bool:
    """Whether a transformer is called with an argument of this name, or with any."""
    parameters = inspect.signature(type(transformer).forward).parameters
    return argument in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _warn_of_missing_timestep(transformer: nn.Module, family: Family) -> None:
    if not _takes(transformer, family.timestep):
        logger.warning(
            "%s takes no argument `%s`, by which the family %r tells its steps where no pipeline does: each call "
            "counts as the first step and stays dense. Name the argument that holds the timestep as `timestep` of the "
            "family, or say dense_steps=0.",
            type(transformer).__name__,
            family.timestep,
            family.name,
        )


def _layer_names(transformer: nn.Module, family: Family) -> tuple[str, ...]:
    """The modules that the family's patterns match.

    Raises:
        ValueError: they match none, or one that is no attention module.
    """
    names = family.layer_names(transformer)
    wrong = next((name for name in names if not hasattr(transformer.get_submodule(name), "processor")), None)
    if not names or wrong is not None:
        found = "no module" if wrong is None else f"`{wrong}`, which has no attention processor,"
        raise ValueError(
            f"`layers` {family.layers} of the family {family.name!r} match {found} of {type(transformer).__name__}. "
            f"Its attention modules are {attention_patterns(transformer)}: describe it by a Family whose `layers` "
            f"match those of self-attention and nothing else, and pass it as `family`."
        )
    return names


def _attach(transformer: nn.Module, session: TransformerSession) -> None:
    for layer, (name, handle) in enumerate(zip(session.layer_names, session.handles)):
        module = session.module(layer)
        if module is None or not make_sparse(module, handle, session.family.spreads_mask):
            session.refused.add(layer)
            logger.warning("%s keeps its own attention: its processor cannot be made sparse.", name)
    if hasattr(type(transformer), "cache_context"):
        transformer.__dict__["cache_context"] = CacheContextReceiver(transformer, session.clock)
    begin = transformer.register_forward_pre_hook(_BeginHook(session), with_kwargs=True)
    end = transformer.register_forward_hook(_EndHook(session))
    _ENABLED[transformer] = _Enabled(session, (begin, end))


def _detach(transformer: nn.Module) -> None:
    enabled = _ENABLED.pop(transformer)
    for hook in enabled.hooks:
        hook.remove()
    transformer.__dict__.pop("cache_context", None)
    for layer in range(len(enabled.session.layer_names)):
        # Gone where the user took a block away meanwhile.
        if (module := enabled.session.module(layer)) is not None:
            make_stock(module)
    enabled.session.close()


# torch.compile of a whole transformer calls the hooks itself and traces each of them, unless it is disabled here, at
# its outermost function: disabled any deeper, it would break the hook's graph and refuse fullgraph=True.
_never_compiled = functools.partial(
    torch.compiler.disable,
    reason="diffsparse has to see each call of an enabled transformer. Compile the transformer itself, "
    "torch.compile(transformer, fullgraph=True), and not a function that calls it; or leave out fullgraph=True.",
)


class _Hook:
    """A hook of an enabled transformer. In a copy or pickle of it, it does nothing."""

    def __init__(self, session: TransformerSession) -> None:
        self._session = session

    def __reduce__(self) -> tuple[Any, ...]:
        return _idle_hook, ()


class _BeginHook(_Hook):
    @_never_compiled
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._session.begin_call(module, args, kwargs)


class _EndHook(_Hook):
    @_never_compiled
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._session.end_call()


def _idle_hook() -> Any:
    return _do_nothing


def _do_nothing(module: nn.Module, args: tuple[Any, ...], kwargs_or_output: Any) -> None:
    pass
