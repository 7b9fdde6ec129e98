"""Transformers of diffusers that diffsparse leaves dense on purpose, and why."""

LEFT_ALONE: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "it is causal, and brings a block mask and a key-value cache of its own",
    "Cosmos3OmniTransformer": "its queries are fewer than its keys, which several heads share",
    "Kandinsky6SRTransformer3DModel": "it brings a block mask of its own",
    "LatteTransformer3DModel": "it attends within frames and through time in turn, over short sequences",
    "SanaVideoTransformer3DModel": "its self-attention is linear, there are no pairs of tokens to skip",
    "SanaWMLTX2RefinerTransformer3DModel": "it streams video through a key-value cache",
    "SanaWMTransformer3DModel": "most of its attention is linear, and none of it runs in an attention processor",
    "WanAnimate2Transformer3DModel": "it brings a block mask of its own",
}
"""Class name to the reason, which completes the sentence "it stays dense: …"."""
