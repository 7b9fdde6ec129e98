"""Layouts for models that have the attributes which those of ComfyUI 0.3.64 and 0.33 have; no model runs here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffsparse.comfy.models import MODELS, find_model

VIDEO = torch.zeros(2, 16, 5, 12, 21)
# Of LTX, with guides in the last two frames, of which half the tokens are left out.
GUIDED = torch.cat([torch.ones(2, 1, 3, 12, 21), torch.tensor([0.5, -1.0]).repeat(2, 1, 2, 12, 11)[..., :21]], dim=2)
IMAGE = torch.zeros(2, 16, 13, 20)
TEXT = torch.zeros(2, 9, 32)


def layout(class_name, module, **call):
    entry = next(model for model in MODELS if class_name in model.classes)
    return tuple(entry.layout(SimpleNamespace(**module), call))


@pytest.mark.parametrize(
    ("class_name", "module", "call", "expected"),
    [
        ("WanModel", {"patch_size": (1, 2, 2)}, {"x": VIDEO}, (5, 6, 11, 0, None)),
        (
            "WanModel",
            {"patch_size": (1, 2, 2), "ref_conv": nn.Identity()},
            {"x": VIDEO, "reference_latent": torch.zeros(2, 16, 12, 20), "time_dim_concat": VIDEO[:, :, :2]},
            (7, 6, 11, 60, None),
        ),
        (
            "WanModel",
            {"patch_size": (1, 2, 2)},
            {"x": VIDEO, "context_latents": [VIDEO[:, :, :3], VIDEO[..., :5], VIDEO]},
            (8, 6, 11, 0, None),
        ),
        ("HumoWanModel", {"patch_size": (1, 2, 2)}, {"x": VIDEO, "reference_latent": VIDEO}, (5, 6, 11, 0, None)),
        (
            "SCAILWanModel",
            {"patch_size": (1, 2, 2)},
            {"x": VIDEO, "reference_latent": VIDEO[:, :, :1]},
            (6, 6, 11, 0, None),
        ),
        ("HunyuanVideo", {"patch_size": [1, 2, 2], "double_blocks": [object()]}, {"x": VIDEO}, (5, 6, 11, None, 0)),
        (
            "HunyuanVideo",
            {"patch_size": [1, 2, 2], "double_blocks": [SimpleNamespace(flipped_img_txt=True)]},
            {"x": VIDEO},
            (5, 6, 11, 0, None),
        ),
        (
            "HunyuanVideo",
            {"patch_size": [1, 2, 2], "double_blocks": [SimpleNamespace(flipped_img_txt=True)]},
            {"x": VIDEO, "ref_latent": VIDEO[:, :, :1]},
            (5, 6, 11, 66, None),
        ),
        ("HunyuanVideo", {"patch_size": [1, 1], "double_blocks": []}, {"x": IMAGE}, (1, 13, 20, None, 0)),
        ("Flux", {"patch_size": 2}, {"x": IMAGE, "context": TEXT}, (1, 7, 10, None, 0)),
        (
            "Flux",
            {"patch_size": 2},
            {"x": IMAGE, "context": TEXT, "ref_latents": [IMAGE, IMAGE[..., :5]]},
            (2, 7, 10, None, 21),
        ),
        ("Chroma", {"patch_size": 2}, {"x": IMAGE, "context": TEXT, "ref_latents": [IMAGE]}, (1, 7, 10, None, 0)),
        ("ChromaRadiance", {"patch_size": 16}, {"x": IMAGE, "context": TEXT}, (1, 1, 2, None, 0)),
        (
            "QwenImageTransformer2DModel",
            {"patch_size": 2},
            {"x": VIDEO[:, :, :1], "context": TEXT, "ref_latents": [VIDEO[:, :, :2]]},
            (1, 6, 11, None, 2 * 66),
        ),
        (
            "MageFlowTransformer2DModel",
            {"patch_size": 1},
            {"x": IMAGE, "context": TEXT, "ref_latents": [IMAGE, IMAGE[..., :5]]},
            (2, 13, 20, None, 65),
        ),
        ("OpenAISignatureMMDITWrapper", {"patch_size": 2}, {"x": IMAGE, "c_crossattn": TEXT}, (1, 7, 10, None, 0)),
        ("MMDiT", {"patch_size": 2}, {"x": IMAGE, "context": TEXT}, (1, 7, 10, None, 0)),
        ("PixDiT_T2I", {"patch_size": 4}, {"x": IMAGE, "context": TEXT}, (1, 4, 5, None, 0)),
        ("PidNet", {"patch_size": 4}, {"x": IMAGE, "context": TEXT, "lq_latent": IMAGE}, (1, 4, 5, None, 0)),
        ("Ideogram4Transformer2DModel", {"patch_size": 2}, {"x": IMAGE, "context": None}, (1, 13, 20, None, 0)),
        ("SingleStreamDiT", {"patch": 2, "default_ref_method": None}, {"x": VIDEO[:, :, :1]}, (1, 6, 11, None, 0)),
        # References that nothing says how to place are left out.
        (
            "SingleStreamDiT",
            {"patch": 2, "default_ref_method": None},
            {"x": IMAGE, "ref_latents": [IMAGE, IMAGE[..., :5]]},
            (1, 7, 10, None, 0),
        ),
        (
            "SingleStreamDiT",
            {"patch": 2, "default_ref_method": None},
            {"x": IMAGE, "ref_latents": [IMAGE, IMAGE[..., :5]], "ref_latents_method": "index"},
            (2, 7, 10, None, 21),
        ),
        ("OmniGen2Transformer2DModel", {"patch_size": 2}, {"x": IMAGE, "ref_latents": None}, (1, 7, 10, None, 0)),
        # The last reference is next to the image.
        (
            "OmniGen2Transformer2DModel",
            {"patch_size": 2},
            {"x": IMAGE, "ref_latents": [IMAGE[..., :5], IMAGE, IMAGE]},
            (3, 7, 10, None, 0),
        ),
        (
            "BooguTransformer2DModel",
            {"patch_size": 2},
            {"x": IMAGE, "ref_latents": [IMAGE, IMAGE[..., :5]]},
            (1, 7, 10, None, 0),
        ),
        ("JoyImageTransformer3DModel", {"patch_size": [1, 2, 2]}, {"x": VIDEO}, (5, 6, 11, 0, None)),
        (
            "JoyImageTransformer3DModel",
            {"patch_size": [1, 2, 2]},
            {"x": VIDEO[:, :, :1], "ref_latents": [VIDEO[:, :, :1], VIDEO[:, :, :1, :5]]},
            (2, 6, 11, 0, None),
        ),
        ("HiDreamImageTransformer2DModel", {"patch_size": 2}, {"x": IMAGE, "image_cond": None}, (1, 7, 10, 0, None)),
        # Their widths are added before they are cut into patches.
        (
            "HiDreamImageTransformer2DModel",
            {"patch_size": 2},
            {"x": IMAGE[..., :19], "image_cond": IMAGE[..., :19]},
            (1, 7, 19, 0, None),
        ),
        (
            "CogVideoXTransformer3DModel",
            {"patch_size": 2, "patch_size_t": 2},
            {"x": VIDEO, "context": TEXT},
            (3, 6, 11, 9, 0),
        ),
        ("LTXVModel", {}, {"x": VIDEO}, (5, 12, 21, 0, 0)),
        ("LTXAVModel", {}, {"x": [VIDEO, torch.zeros(2, 8, 50, 16)]}, (5, 12, 21, 0, 0)),
        (
            "LTXAVModel",
            {},
            {"x": [VIDEO], "keyframe_idxs": torch.zeros(2, 3, 2 * 252, 2), "denoise_mask": VIDEO[:, :1] + 1},
            (5, 12, 21, 0, 0),
        ),
        (
            "LTXVModel",
            {},
            {"x": VIDEO, "keyframe_idxs": torch.zeros(2, 3, 2 * 252, 2), "denoise_mask": GUIDED},
            (3, 12, 21, 0, None),
        ),
        ("MiniTrainDIT", {"patch_spatial": 2, "patch_temporal": 1}, {"x": VIDEO}, (5, 6, 11, 0, 0)),
        ("Kandinsky5", {"patch_size": (1, 2, 2)}, {"x": VIDEO}, (5, 6, 11, 0, 0)),
        ("AsymmDiTJoint", {"patch_size": 2}, {"x": VIDEO}, (5, 6, 11, 0, None)),
        ("NextDiT", {"patch_size": 2, "pad_tokens_multiple": None}, {"x": IMAGE}, (1, 7, 10, None, 0)),
        # 70 tokens padded to 96.
        ("NextDiT", {"patch_size": 2, "pad_tokens_multiple": 32}, {"x": IMAGE}, (1, 7, 10, None, 26)),
        # Frames and one reference as large are 6 * 66 tokens, another reference 21, all padded to 448.
        (
            "NextDiT",
            {"patch_size": 2, "pad_tokens_multiple": 32},
            {"x": VIDEO, "ref_frames": [VIDEO[:, :, 0], IMAGE[..., :5]]},
            (6, 6, 11, None, 21 + 31),
        ),
        ("MiniMaxH3Model", {"patch_size": (1, 2, 2)}, {"x": [VIDEO, TEXT]}, (5, 6, 11, None, 0)),
    ],
)
def test_the_layout_is_read_off_the_call(class_name, module, call, expected):
    assert layout(class_name, module, **call) == expected


def test_no_class_is_named_twice():
    classes = [name for model in MODELS for name in model.classes]
    assert len(classes) == len(set(classes))


def test_a_subclass_that_nobody_named_is_not_known():
    wan = type("WanModel", (nn.Module,), {})
    assert find_model(wan()).name == "wan"
    assert find_model(type("NewWanModel", (wan,), {})()) is None


def test_blocks_are_numbered_in_the_order_they_run():
    flux = type("Flux", (nn.Module,), {})()
    flux.single_blocks = nn.ModuleList([nn.Identity()])
    flux.double_blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert list(find_model(flux).named_blocks(flux)) == ["double_blocks.0", "double_blocks.1", "single_blocks.0"]
