"""The families that diffsparse knows. A new one is a file of its own and a line here."""

from __future__ import annotations

from torch import nn

from diffsparse.pipelines.allegro import ALLEGRO
from diffsparse.pipelines.anyflow import ANYFLOW
from diffsparse.pipelines.auraflow import AURAFLOW
from diffsparse.pipelines.bria_fibo import BRIA_FIBO
from diffsparse.pipelines.bria_fibo2 import BRIA_FIBO2
from diffsparse.pipelines.chroma import CHROMA
from diffsparse.pipelines.cogvideox import COGVIDEOX
from diffsparse.pipelines.cogview import COGVIEW
from diffsparse.pipelines.cosmos import COSMOS
from diffsparse.pipelines.cosmos3 import COSMOS3
from diffsparse.pipelines.easyanimate import EASYANIMATE
from diffsparse.pipelines.ernie_image import ERNIE_IMAGE
from diffsparse.pipelines.family import Family
from diffsparse.pipelines.flux import FLUX
from diffsparse.pipelines.flux2 import FLUX2
from diffsparse.pipelines.flux3 import FLUX3
from diffsparse.pipelines.framepack import FRAMEPACK
from diffsparse.pipelines.helios import HELIOS
from diffsparse.pipelines.hidream import HIDREAM
from diffsparse.pipelines.hunyuan_image import HUNYUAN_IMAGE
from diffsparse.pipelines.hunyuan_video import HUNYUAN_VIDEO
from diffsparse.pipelines.hunyuan_video15 import HUNYUAN_VIDEO_15
from diffsparse.pipelines.ideogram4 import IDEOGRAM4
from diffsparse.pipelines.joyimage import JOYIMAGE, JOYIMAGE_PLUS
from diffsparse.pipelines.kandinsky5 import KANDINSKY5
from diffsparse.pipelines.kandinsky6 import KANDINSKY6
from diffsparse.pipelines.krea2 import KREA2
from diffsparse.pipelines.ltx import LTX
from diffsparse.pipelines.ltx2 import LTX2
from diffsparse.pipelines.lumina2 import LUMINA2
from diffsparse.pipelines.minimax_h3 import MINIMAX_H3
from diffsparse.pipelines.mochi import MOCHI
from diffsparse.pipelines.motif_video import MOTIF_VIDEO
from diffsparse.pipelines.nucleus import NUCLEUS_IMAGE
from diffsparse.pipelines.pixart import HUNYUAN_DIT, PIXART
from diffsparse.pipelines.prx import PRX
from diffsparse.pipelines.qwen_image import QWEN_IMAGE
from diffsparse.pipelines.qwen_image21 import QWEN_IMAGE_21
from diffsparse.pipelines.sd3 import SD3
from diffsparse.pipelines.wan import WAN
from diffsparse.pipelines.z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    WAN,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    FRAMEPACK,
    COGVIDEOX,
    LTX,
    MOCHI,
    ALLEGRO,
    ANYFLOW,
    COSMOS,
    COSMOS3,
    EASYANIMATE,
    HELIOS,
    KANDINSKY5,
    LTX2,
    KANDINSKY6,
    MINIMAX_H3,
    MOTIF_VIDEO,
    FLUX,
    BRIA_FIBO,
    BRIA_FIBO2,
    CHROMA,
    FLUX2,
    FLUX3,
    QWEN_IMAGE,
    QWEN_IMAGE_21,
    SD3,
    COGVIEW,
    AURAFLOW,
    HUNYUAN_IMAGE,
    ERNIE_IMAGE,
    HIDREAM,
    Z_IMAGE,
    LUMINA2,
    PIXART,
    HUNYUAN_DIT,
    JOYIMAGE,
    JOYIMAGE_PLUS,
    IDEOGRAM4,
    KREA2,
    NUCLEUS_IMAGE,
    PRX,
)


def find_family(transformer: nn.Module, families: tuple[Family, ...] = FAMILIES) -> Family | None:
    """The family that names the transformer's class or, for a subclass, the nearest of its bases."""
    for cls in type(transformer).__mro__:
        for family in families:
            if cls.__name__ in family.transformers:
                return family
    return None
