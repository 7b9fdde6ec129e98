"""A tiny ConsisID: CogVideoX with faces, which enter by attention of their own."""

from diffusers import ConsisIDTransformer3DModel
from tiny import cogvideox
from tiny.model import TEXT_TOKENS, TinyModel, seeded

make = seeded(ConsisIDTransformer3DModel, cogvideox.CONFIG)


CONSISID = TinyModel(
    make,
    cogvideox.call,
    layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(3)),
    text_before=TEXT_TOKENS,
    prompt=range(TEXT_TOKENS),
    latent_axes="bfchw",
)
