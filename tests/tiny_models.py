"""The tiny transformers with random weights that tests run on, one for each class, and a whole tiny pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from tiny.allegro import ALLEGRO
from tiny.anyflow import ANYFLOW
from tiny.auraflow import AURAFLOW
from tiny.bria_fibo2 import BRIA_FIBO2
from tiny.chroma import CHROMA
from tiny.chronoedit import CHRONOEDIT
from tiny.cogvideox import COGVIDEOX
from tiny.cogview import COGVIEW3, COGVIEW4, GLM_IMAGE
from tiny.consisid import CONSISID
from tiny.cosmos import COSMOS
from tiny.cosmos3 import COSMOS3
from tiny.easyanimate import EASYANIMATE
from tiny.ernie_image import ERNIE_IMAGE
from tiny.flux import BRIA, BRIA_FIBO, FLUX, LONGCAT_IMAGE, OVIS_IMAGE
from tiny.flux2 import FLUX2
from tiny.flux3 import FLUX3
from tiny.framepack import FRAMEPACK
from tiny.helios import HELIOS
from tiny.hidream import HIDREAM
from tiny.hunyuan_image import HUNYUAN_IMAGE
from tiny.hunyuan_video import HUNYUAN_VIDEO
from tiny.hunyuan_video15 import HUNYUAN_VIDEO_15
from tiny.ideogram4 import IDEOGRAM4
from tiny.joyimage import JOYIMAGE_EDIT, JOYIMAGE_EDIT_PLUS
from tiny.kandinsky5 import KANDINSKY5
from tiny.kandinsky6 import KANDINSKY6
from tiny.krea2 import KREA2
from tiny.ltx import LTX
from tiny.ltx2 import LTX2
from tiny.lumina2 import LUMINA2
from tiny.minimax_h3 import MINIMAX_H3
from tiny.mochi import MOCHI
from tiny.model import TEXT_CHANNELS, Grid, TinyModel
from tiny.motif_video import MOTIF_VIDEO
from tiny.nucleus import NUCLEUS_IMAGE
from tiny.pixart import DIT, HUNYUAN_DIT, PIXART
from tiny.prx import PRX
from tiny.qwen_image import QWEN_IMAGE
from tiny.qwen_image21 import QWEN_IMAGE_21
from tiny.sd3 import SD3
from tiny.skyreels_v2 import SKYREELS_V2
from tiny.wan import WAN
from tiny.wan_animate import WAN_ANIMATE
from tiny.wan_vace import WAN_VACE
from tiny.z_image import Z_IMAGE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TINY: dict[str, TinyModel] = {
    "wan": WAN,
    "wan_vace": WAN_VACE,
    "wan_animate": WAN_ANIMATE,
    "skyreels_v2": SKYREELS_V2,
    "chronoedit": CHRONOEDIT,
    "hunyuan_video": HUNYUAN_VIDEO,
    "framepack": FRAMEPACK,
    "hunyuan_video15": HUNYUAN_VIDEO_15,
    "cogvideox": COGVIDEOX,
    "ltx": LTX,
    "allegro": ALLEGRO,
    "anyflow": ANYFLOW,
    "consisid": CONSISID,
    "cosmos": COSMOS,
    "cosmos3": COSMOS3,
    "easyanimate": EASYANIMATE,
    "helios": HELIOS,
    "kandinsky5": KANDINSKY5,
    "ltx2": LTX2,
    "kandinsky6": KANDINSKY6,
    "motif_video": MOTIF_VIDEO,
    "flux": FLUX,
    "bria": BRIA,
    "bria_fibo": BRIA_FIBO,
    "bria_fibo2": BRIA_FIBO2,
    "ovis_image": OVIS_IMAGE,
    "longcat_image": LONGCAT_IMAGE,
    "chroma": CHROMA,
    "flux2": FLUX2,
    "flux3": FLUX3,
    "qwen_image": QWEN_IMAGE,
    "sd3": SD3,
    "cogview3": COGVIEW3,
    "cogview4": COGVIEW4,
    "glm_image": GLM_IMAGE,
    "auraflow": AURAFLOW,
    "hunyuan_image": HUNYUAN_IMAGE,
    "ernie_image": ERNIE_IMAGE,
    "hidream": HIDREAM,
    "z_image": Z_IMAGE,
    "lumina2": LUMINA2,
    "pixart": PIXART,
    "dit": DIT,
    "hunyuan_dit": HUNYUAN_DIT,
    "joyimage_edit": JOYIMAGE_EDIT,
    "joyimage_edit_plus": JOYIMAGE_EDIT_PLUS,
    "ideogram4": IDEOGRAM4,
    "krea2": KREA2,
    "nucleus_image": NUCLEUS_IMAGE,
    "prx": PRX,
    "qwen_image21": QWEN_IMAGE_21,
    "mochi": MOCHI,
    "minimax_h3": MINIMAX_H3,
}
"""Every test of families and of enabling runs on each of these."""


def tiny_wan_pipeline(seed: int = 0, two_experts: bool = False) -> WanPipeline:
    """A whole WanPipeline with random weights; its transformers' latents have 16 channels."""
    torch.manual_seed(seed)
    tokenizer = _byte_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_CHANNELS,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WAN.make(in_channels=16, out_channels=16, num_layers=2),
        transformer_2=WAN.make(in_channels=16, out_channels=16, num_layers=2) if two_experts else None,
        boundary_ratio=0.8 if two_experts else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: WanPipeline, *, steps: int = 3, grid: Grid = (2, 3, 5), **changes: Any) -> Tensor:
    """Latents that a tiny Wan pipeline makes, at a grid in tokens; two transformer calls for each step."""
    frames, height, width = grid
    call = {
        "prompt": "a cat",
        "negative_prompt": "bad",
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
        "num_frames": 4 * (frames - 1) + 1,
        "height": 16 * height,
        "width": 16 * width,
        "max_sequence_length": 12,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    return pipeline(**(call | changes)).frames


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Any text can be encoded, nothing is trained or downloaded."""
    symbols = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )
