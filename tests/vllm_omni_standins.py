"""Small stand-ins for vLLM-Omni, written for these tests by what its source says, without the engine.

`Dispatcher` behaves like the backend SPARSE_ATTN of pull request 4493, at the revision that calls `geometry_fn`.
`install` puts modules in place that behave like those of release 0.30.0 that an attention backend meets.
"""

from __future__ import annotations

import enum
import re
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F


class Dispatcher:
    """What stands between a layer and a plugin: `options` of the user, then of the call, then `extra`."""

    def __init__(self, plugin, causal=False, softmax_scale=None, **options):
        self.plugin, self.causal, self.softmax_scale, self.options = plugin, causal, softmax_scale, options

    def forward(self, query, key, value, state=None, extra=None, attn_mask=None, full_attn_spans=None):
        params = {**self.options, **(state or {}), **(extra or {})}
        params = {name: value for name, value in params.items() if value is not None}
        if (geometry_fn := getattr(self.plugin, "geometry_fn", None)) is not None:
            params |= geometry_fn(query.shape, params)
        capabilities = getattr(self.plugin, "capabilities", {})
        for name, given, needed in (
            ("attn_mask", attn_mask, "supports_attention_mask"),
            ("full_attn_spans", full_attn_spans, "supports_full_attn_spans"),
        ):
            if given is not None:
                if not capabilities.get(needed, False):
                    raise ValueError(f"the plugin does not advertise {needed}")
                params[name] = given
        return self.plugin(query, key, value, params, is_causal=self.causal, softmax_scale=self.softmax_scale)


@dataclass
class VideoTokenLayout:
    prefix_len: int | None = None
    latent_grid: tuple[int, int, int] | None = None
    used_len: int | None = None
    video_spans: tuple[Any, ...] = ()


@dataclass
class AttentionMetadata:
    attn_mask: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    video_layout: VideoTokenLayout | None = None


class SDPAImpl:
    def __init__(self, softmax_scale, causal=False, **others):
        self.softmax_scale, self.causal = softmax_scale, causal

    def forward_cuda(self, query, key, value, attn_metadata=None):
        mask = getattr(attn_metadata, "attn_mask", None)
        mask = None if mask is None else mask[:, None, None]
        query, key, value = (x.permute(0, 2, 1, 3) for x in (query, key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.causal, scale=self.softmax_scale
        )
        return output.permute(0, 2, 1, 3)


class SDPABackend:
    @staticmethod
    def get_impl_cls():
        return SDPAImpl


def extract_layer_index(prefix):
    (index,) = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", prefix)
    return int(index)


def install(monkeypatch, backends=("TORCH_SDPA", "RAINFUSION_ATTN"), is_npu=False):
    """Put the modules in place; gives what a test looks at: `overrides`, and `context` and `config` to set."""
    state = types.SimpleNamespace(overrides={}, context=None, config=None)
    attention = "vllm_omni.diffusion.attention.backends"
    modules = {
        "vllm.model_executor.models.utils": {"extract_layer_index": extract_layer_index},
        f"{attention}.abstract": {
            "AttentionBackend": object,
            "AttentionImpl": object,
            "AttentionMetadata": AttentionMetadata,
            "VideoTokenLayout": VideoTokenLayout,
        },
        f"{attention}.sdpa": {"SDPABackend": SDPABackend},
        f"{attention}.registry": {
            "DiffusionAttentionBackendEnum": enum.Enum("DiffusionAttentionBackendEnum", list(backends)),
            "register_diffusion_backend": lambda backend, path: state.overrides.update({backend.name: path}),
        },
        "vllm_omni.diffusion.config": {"get_current_diffusion_config_or_none": lambda: state.config},
        "vllm_omni.diffusion.forward_context": {
            "get_forward_context": lambda: state.context,
            "is_forward_context_available": lambda: state.context is not None,
        },
        "vllm_omni.platforms": {"current_omni_platform": types.SimpleNamespace(is_npu=lambda: is_npu)},
    }
    for name, contents in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            if parent not in modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return state
