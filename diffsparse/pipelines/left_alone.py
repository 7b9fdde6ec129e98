"""Transformers of diffusers that diffsparse leaves dense on purpose, and why."""

LEFT_ALONE: dict[str, str] = {
    "AceStepTransformer1DModel": "it makes audio, whose tokens form a line and no grid",
    "AnyFlowFARTransformer3DModel": "it is causal, and brings a block mask and a key-value cache of its own",
    "DreamLiteTransformer2DModel": "it is a part of a UNet, whose attention diffsparse does not take over",
    "Kandinsky6SRTransformer3DModel": "it brings a block mask of its own",
    "LatteTransformer3DModel": "it attends within frames and through time in turn, over short sequences",
    "LongCatAudioDiTTransformer": "it makes audio, whose tokens form a line and no grid",
    "LuminaNextDiT2DModel": "it passes a mask of the size of all pairs of tokens, in every call",
    "MiniMaxMusic3Transformer1DModel": "it makes audio, whose tokens form a line and no grid",
    "OmniGenTransformer2DModel": "it passes a mask over pairs of tokens, in every call",
    "PriorTransformer": "it makes an embedding, its tokens form no grid",
    "RFD4ProteinaTransformer": "it makes proteins, and adds a bias to every pair of tokens",
    "SanaTransformer2DModel": "its self-attention is linear, there are no pairs of tokens to skip",
    "SanaVideoTransformer3DModel": "its self-attention is linear, there are no pairs of tokens to skip",
    "SanaWMLTX2RefinerTransformer3DModel": "it streams video through a key-value cache",
    "SanaWMTransformer3DModel": "most of its attention is linear, and none of it runs in an attention processor",
    "StableAudio3DiTModel": "it makes audio, whose tokens form a line and no grid",
    "StableAudioDiTModel": "it makes audio, whose tokens form a line and no grid",
    "Transformer2DModel": "it is a part of UNets, whose attention diffsparse does not take over",
    "TransformerTemporalModel": "it attends through time alone, over short sequences",
    "UVit2DModel": "its images have 1,024 tokens at most, too few to gain by",
    "WanAnimate2Transformer3DModel": "it brings a block mask of its own",
}
"""Class name to the reason, which completes the sentence "it stays dense: …"."""
