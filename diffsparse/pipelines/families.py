"""The families that diffsparse knows. A new one is a file of its own and a line here."""

from __future__ import annotations

from torch import nn

from diffsparse.pipelines.allegro import ALLEGRO
from diffsparse.pipelines.anyflow import ANYFLOW
from diffsparse.pipelines.cogvideox import COGVIDEOX
from diffsparse.pipelines.cosmos import COSMOS
from diffsparse.pipelines.easyanimate import EASYANIMATE
from diffsparse.pipelines.family import Family
from diffsparse.pipelines.flux import FLUX
from diffsparse.pipelines.framepack import FRAMEPACK
from diffsparse.pipelines.helios import HELIOS
from diffsparse.pipelines.hunyuan_video import HUNYUAN_VIDEO
from diffsparse.pipelines.hunyuan_video15 import HUNYUAN_VIDEO_15
from diffsparse.pipelines.kandinsky5 import KANDINSKY5
from diffsparse.pipelines.kandinsky6 import KANDINSKY6
from diffsparse.pipelines.ltx import LTX
from diffsparse.pipelines.ltx2 import LTX2
from diffsparse.pipelines.mochi import MOCHI
from diffsparse.pipelines.motif_video import MOTIF_VIDEO
from diffsparse.pipelines.wan import WAN

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
    EASYANIMATE,
    HELIOS,
    KANDINSKY5,
    LTX2,
    KANDINSKY6,
    MOTIF_VIDEO,
    FLUX,
)


def find_family(transformer: nn.Module) -> Family | None:
    """The family that names the transformer's class or, for a subclass, the nearest of its bases."""
    for cls in type(transformer).__mro__:
        for family in FAMILIES:
            if cls.__name__ in family.transformers:
                return family
    return None
