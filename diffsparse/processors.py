"""The drop-in attention processor: a layer's own processor, its one attention call handed to the session.

diffusers calls attention by a name in the module of each processor: `dispatch_attention_fn`, or
`F.scaled_dot_product_attention`. A sparse processor is an instance of a subclass of the layer's own processor
class, whose `__call__` is the very same code with these names bound to the functions below. So projections, norms,
rotary embedding and everything a new release changes stay diffusers' own.
"""

from __future__ import annotations

import dis
import functools
import importlib
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from diffsparse.autocast import as_autocast
from diffsparse.key_mask import KeyMask
from diffsparse.transformer_session import TransformerSession, find_layer

ATTENTION_NAMES = frozenset({"dispatch_attention_fn", "scaled_dot_product_attention"})
# The module of the first.
DISPATCH = "diffusers.models.attention_dispatch"


def make_sparse(module: nn.Module, handle: Tensor, spreads_mask: bool = False) -> bool:
    """Give an attention module a sparse processor for the layer of `handle`; False where it cannot have one.

    Where the processor `spreads_mask`, it is given a `KeyMask` to spread.
    """
    processor: Any = getattr(module, "processor", None)
    # One that was put aside while enabled comes back after disabling, as `unfuse_qkv_projections` does. Another model's
    # may be enabled.
    if isinstance(processor, _SparseProcessor) and (processor._is_idle() or processor._handle_in(module) is None):
        processor = processor._as_stock()
    sparse_class = _sparse_class_for(processor, spreads_mask)
    if sparse_class is None:
        return False
    # Past what a class of the user's own does when it is made, copied or changed: frozen ones cannot be.
    sparse: Any = object.__new__(sparse_class)
    sparse.__dict__.update(processor.__dict__, _diffsparse_handle=handle, _diffsparse_module=weakref.ref(module))
    module.processor = sparse
    return True


def attention_calls(module: nn.Module) -> frozenset[str]:
    """By which of `ATTENTION_NAMES` a module's processor calls attention; none where it cannot be made sparse."""
    processor = getattr(module, "processor", None)
    if _sparse_class_for(processor) is None:
        return frozenset()
    return ATTENTION_NAMES & frozenset(type(processor).__call__.__code__.co_names)


def make_stock(module: nn.Module) -> None:
    """Give an attention module its own processor back, with what was set on it meanwhile."""
    processor = getattr(module, "processor", None)
    if isinstance(processor, _SparseProcessor):
        module.processor = processor._as_stock()


class _SparseProcessor:
    """What the sparse subclass adds. Made without a handle, as diffusers' loaders do, it runs dense."""

    _diffsparse_handle: Tensor | None = None
    _diffsparse_module: Callable[[], nn.Module | None]
    _diffsparse_stock_class: type

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # diffusers looks processors up by their exact class, which is not ours: guiders that skip layers, loaders.
        return self._diffsparse_stock_class

    def _is_idle(self) -> bool:
        """Whether no session is behind it."""
        return self._diffsparse_handle is None or find_layer(self._diffsparse_handle) is None

    def _handle_in(self, attn: nn.Module) -> Tensor | None:
        """The handle; None in the layers of another model, which was given this one's processors, unless compiled."""
        if self._diffsparse_handle is None or torch.compiler.is_compiling():
            return self._diffsparse_handle
        return self._diffsparse_handle if self._diffsparse_module() is attn else None

    def _as_stock(self) -> Any:
        stock: Any = object.__new__(self._diffsparse_stock_class)
        stock.__dict__.update({k: v for k, v in self.__dict__.items() if not k.startswith("_diffsparse_")})
        return stock

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or pickle is the stock processor: it belongs to another model, which nobody enabled.
        return _itself, (self._as_stock(),)


def _itself(processor: Any) -> Any:
    return processor


def _sparse_class_for(processor: Any, spreads_mask: bool = False) -> type | None:
    """The sparse class for a stock processor; None where there cannot be one."""
    # A processor that is an nn.Module (IP-Adapter) carries weights of its own and is left alone.
    if processor is None or isinstance(processor, (nn.Module, _SparseProcessor)):
        return None
    stock: type = type(processor)
    return _sparse_class(stock, spreads_mask)


class _Plain:
    """What an instance of a class like this holds is in its `__dict__`: not in slots, nor in a builtin type."""


@functools.cache
def _sparse_class(stock: type, spreads_mask: bool) -> type | None:
    """The subclass of a processor class that hands its attention to a session; None if it calls no attention."""
    call = stock.__call__
    if not isinstance(call, types.FunctionType) or not ATTENTION_NAMES & set(call.__code__.co_names):
        return None
    if (stock.__basicsize__, stock.__dictoffset__) != (_Plain.__basicsize__, _Plain.__dictoffset__):
        return None
    shadow = _shadow_globals(call.__globals__.get("__name__"))
    if shadow is None or not shadow.rebound & _global_names(call):
        return None
    twin = _with_globals(call, shadow.names)

    def __call__(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if spreads_mask and kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = KeyMask(kwargs["attention_mask"])
        outer = _CURRENT.handle
        _CURRENT.handle = self._handle_in(attn)
        try:
            return twin(self, attn, *args, **kwargs)
        finally:
            _CURRENT.handle = outer

    # Attention modules read the parameters of `__call__` and pass on only what it names.
    functools.update_wrapper(__call__, stock.__call__)
    # torch 2.13 takes the length of a function's defaults to guard them, and fails on None.
    __call__.__defaults__ = ()
    members = {"__call__": __call__, "__module__": __name__, "_diffsparse_stock_class": stock}
    return type(f"Sparse{stock.__name__}", (_SparseProcessor, stock), members)


def _with_globals(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    """The very code of a function, which finds its globals in `names`."""
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _global_names(function: types.FunctionType) -> set[str]:
    """The globals that a function reads, and no attribute of the same name."""
    return {step.argval for step in dis.get_instructions(function) if step.opname == "LOAD_GLOBAL"}


class _Shadow(NamedTuple):
    """The globals of a processor's module, and which of them stand for attention there and are bound to ours."""

    names: dict[str, Any]
    rebound: frozenset[str]


def _shadow_globals(module_name: str | None) -> _Shadow | None:
    """The globals of a processor's module, with the attention functions re-bound; None where there is no such module.

    They live in a real module of their own name: torch.compile finds a function's globals through `sys.modules`,
    and would guard the wrong objects otherwise.
    """
    module = sys.modules.get(module_name or "")
    if module is None:
        return None
    shadow, functional = _shadow_module(module), _shadow_module(F)
    _fill(functional, F, {"scaled_dot_product_attention": scaled_dot_product_attention, "pad": pad})
    rebound: dict[str, Any] = {name: functional for name, value in vars(module).items() if value is F}
    if hasattr(module, "dispatch_attention_fn"):
        # Ours looks it up and does not import it: torch.compile of 2.10 traces no import out of a package that loads
        # its modules when they are used.
        importlib.import_module(DISPATCH)
        rebound["dispatch_attention_fn"] = dispatch_attention_fn
    # What processors share, as those of FLUX.2 Klein do with kept keys, calls attention for them.
    shared = {
        name: _with_globals(value, vars(shadow))
        for name, value in vars(module).items()
        if _calls_attention(value, vars(module), rebound)
    }
    _fill(shadow, module, rebound | shared)
    return _Shadow(vars(shadow), frozenset(rebound))


def _calls_attention(value: Any, names: dict[str, Any], rebound: dict[str, Any]) -> bool:
    """Whether this is a function of the module with these names that calls attention, and no attention itself."""
    return (
        isinstance(value, types.FunctionType)
        and value.__globals__ is names
        and value.__name__ not in rebound
        and bool(ATTENTION_NAMES & set(value.__code__.co_names))
        and bool(rebound.keys() & _global_names(value))
    )


def _shadow_module(module: types.ModuleType) -> types.ModuleType:
    name = f"diffsparse._shadow.{module.__name__}"
    return sys.modules.setdefault(name, types.ModuleType(name))


def _fill(shadow: types.ModuleType, module: types.ModuleType, ours: dict[str, Any]) -> None:
    """Give a shadow the names that its module has now: those of a notebook grow. Ours come in place of its own.

    At once: processors of another thread may be running by them.
    """
    kept = {"__name__", "__spec__", "__loader__"}
    vars(shadow).update({k: v for k, v in vars(module).items() if k not in kept} | ours)


class _Current(threading.local):
    """The layer whose processor runs in this thread."""

    def __init__(self) -> None:
        # Set here, not on the class: torch.compile guards where it found the attribute.
        self.handle: Tensor | None = None


_CURRENT = _Current()


def dispatch_attention_fn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """diffusers' function of this name, by the session of the running layer: query [B, S, H, D] to [B, S, H, D]."""
    attention_dispatch: Any = sys.modules[DISPATCH]
    if isinstance(attn_mask, KeyMask):
        attn_mask = attn_mask.as_tensor()
    handle = _CURRENT.handle
    # Gives each rank the whole sequence of some of the heads, and the results back. Private to diffusers.
    exchange: Any = getattr(attention_dispatch, "_templated_context_parallel_attention", None)
    obstacle = _obstacle((query, key, value), attn_mask, dropout_p, is_causal, parallel_config)
    if enable_gqa and parallel_config is not None and obstacle is None:
        obstacle = "grouped queries under context parallelism"
    if attention_kwargs and obstacle is None:
        obstacle = "attention_kwargs, which mean something to the model's own backend alone"
    if parallel_config is not None and obstacle is None and exchange is None:
        obstacle = "context parallelism of this release of diffusers"
    if handle is not None and obstacle is None:
        query, key, value = (as_autocast(x) for x in (query, key, value))
        attn_mask = None if attn_mask is None else as_autocast(attn_mask)
        if parallel_config is None:
            heads_first = (x.transpose(1, 2) for x in (query, key, value))
            return _attend(*heads_first, attn_mask, scale, enable_gqa, True, 1, handle)
        output: Tensor = exchange(
            query,
            key,
            value,
            attn_mask,
            scale=scale,
            forward_op=_attend_between_exchanges,
            backward_op=None,
            _parallel_config=parallel_config,
        )
        return output
    if handle is not None:
        _count_fallback(handle, obstacle, key.shape[1] * _num_ranks(parallel_config))
    return attention_dispatch.dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        attention_kwargs,
        backend=backend,
        parallel_config=parallel_config,
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's function of this name, by the session of the running layer: query [B, H, S, D] to [B, H, S, D]."""
    handle = _CURRENT.handle
    obstacle = _obstacle((query, key, value), attn_mask, dropout_p, is_causal, None)
    if handle is not None and obstacle is None:
        query, key, value = (as_autocast(x) for x in (query, key, value))
        attn_mask = None if attn_mask is None else as_autocast(attn_mask)
        return _attend(query, key, value, attn_mask, scale, enable_gqa, False, 1, handle).transpose(1, 2)
    if handle is not None:
        _count_fallback(handle, obstacle, key.shape[2])
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def pad(input: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's function of this name. torch.compile of 2.10 does not trace that it takes a `KeyMask` too."""
    return input.pad(*args, **kwargs) if isinstance(input, KeyMask) else F.pad(input, *args, **kwargs)


def _obstacle(
    inputs: tuple[Tensor, ...], mask: Any, dropout: float, is_causal: bool, parallel_config: Any
) -> str | None:
    """What no session can handle, seen without looking at any value."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "gradients are required"
    if is_causal or dropout:
        return "causal attention or dropout"
    if parallel_config is not None and parallel_config.context_parallel_config.ring_degree > 1:
        return "context parallelism by a ring"
    if mask is not None and not isinstance(mask, Tensor):
        return "the model's own block mask"
    if not torch.compiler.is_compiling() and _is_watched():
        return "a torch function mode stands in for attention, as in perturbed attention guidance"
    return None


def _num_ranks(parallel_config: Any) -> int:
    """How many ranks share a sequence."""
    if parallel_config is None:
        return 1
    shares = parallel_config.context_parallel_config
    return int(shares.ring_degree * shares.ulysses_degree)


def _is_watched() -> bool:
    """Whether a torch function mode other than a default device sees each call of torch's attention, and not ours."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def _attend_between_exchanges(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> Tensor:
    """Attention of the running layer over a whole sequence of this rank's heads: query [B, S, H, D] to [B, S, H, D]."""
    ranks = _parallel_config.context_parallel_config.ulysses_degree
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    handle = _CURRENT.handle
    assert handle is not None
    return _attend(*heads_first, attn_mask, scale, False, True, ranks, handle)


def _count_fallback(handle: Tensor, obstacle: str | None, num_keys: int) -> None:
    # Inside compiled code this would run while tracing, not at each call.
    if obstacle is not None and not torch.compiler.is_compiling() and (found := find_layer(handle)) is not None:
        session, layer = found
        if not session.is_of_text_alone(num_keys):
            session.fall_back(layer, obstacle)


@torch.library.custom_op(
    "diffsparse::attend",
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale, bool enable_gqa, bool by_dispatch,"
    " int ranks, Tensor handle) -> Tensor",
)
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    by_dispatch: bool,
    ranks: int,
    handle: Tensor,
) -> Tensor:
    """Attention of the layer of `handle`, query, key, value [B, H, S, D]: [B, S, H, D], contiguous.

    Their tokens were put together from what so many `ranks` had. Opaque to torch.compile: layer, step and plan are
    looked up in here, at each call.
    """
    found = find_layer(handle)
    if found is None:
        output = _dense(query, key, value, mask, scale, enable_gqa, by_dispatch, None)
    else:
        session, layer = found
        backend = _user_backend(session, layer)
        dense = functools.partial(_dense, query, key, value, mask, scale, enable_gqa, by_dispatch, backend)
        sparse = session.attend(layer, query, key, value, mask, scale, ranks, dense)
        output = dense() if sparse is None else sparse
    return output.transpose(1, 2).contiguous()


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *inputs: object) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    by_dispatch: bool,
    backend: Any,
) -> Tensor:
    """The model's own attention, [B, H, S, D]."""
    if not by_dispatch:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
    from diffusers.models import attention_dispatch

    tokens_first = (x.transpose(1, 2) for x in (query, key, value))
    return attention_dispatch.dispatch_attention_fn(
        *tokens_first, attn_mask=mask, scale=scale, enable_gqa=enable_gqa, backend=backend
    ).transpose(1, 2)


def _user_backend(session: TransformerSession, layer: int) -> Any:
    """What the user chose by `set_attention_backend` for this layer."""
    return getattr(session.processor(layer), "_attention_backend", None)
