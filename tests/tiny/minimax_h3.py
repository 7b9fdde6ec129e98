"""A tiny MiniMax-H3."""

from typing import Any

import torch
from diffusers import MiniMaxH3Transformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded
from torch import Tensor

AUDIO_TOKENS, AUDIO_CHANNELS = 6, 3
VIDEO, TEXT, AUDIO = 0, 1, 2

make = seeded(
    MiniMaxH3Transformer3DModel,
    {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "hidden_size": 48,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 32,
        "in_channels": CHANNELS,
        "audio_in_channels": AUDIO_CHANNELS,
        "text_dim": TEXT_CHANNELS,
        "freq_dim": 16,
        "time_embed_hidden_dim": 32,
        "time_embed_dim": 32,
        "rope_freq_dim": 4,
    },
)


def frame_ids(time: float, height: int, width: int) -> Tensor:
    """Time, row and column of a frame's tokens; as in the pipeline, the columns are no whole numbers."""
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(height) * 1.5, torch.arange(width) * 1.5).double()


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0, condition_frames: int = 0) -> dict[str, Any]:
    """Text, condition frames with the time of the first frame, audio, the video."""
    random = Random(seed)
    frames, height, width = grid
    begin = float(TEXT_TOKENS)
    text = torch.zeros(TEXT_TOKENS, 3).double()
    text[:, 0] = torch.arange(TEXT_TOKENS)
    audio = torch.zeros(AUDIO_TOKENS, 3).double()
    audio[:, 0] = begin + torch.arange(AUDIO_TOKENS)
    condition = [frame_ids(begin, height, width)] * condition_frames
    video = [frame_ids(begin + 5.0 * frame, height, width) for frame in range(frames)]
    ids = torch.cat([text, *condition, audio, *video])
    size = height * width
    tags = torch.tensor(
        [TEXT] * TEXT_TOKENS + [VIDEO] * condition_frames * size + [AUDIO] * AUDIO_TOKENS + [VIDEO] * frames * size
    )
    places = torch.arange(len(tags))
    patch = model.config.in_channels * 4
    return {
        "hidden_states": random(batch, (condition_frames + frames) * size, patch),
        "audio_hidden_states": random(batch, AUDIO_TOKENS, AUDIO_CHANNELS),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros(len(tags), dtype=torch.long),
        "token_tags": tags,
        "position_ids": ids,
        "video_indices": places[tags == VIDEO],
        "audio_indices": places[tags == AUDIO],
        "text_indices": places[tags == TEXT],
    }


MINIMAX_H3 = TinyModel(
    make,
    call,
    layers=tuple(f"transformer_blocks.{i}.attn" for i in range(2)),
    text_before=TEXT_TOKENS + AUDIO_TOKENS,
    prompt=range(TEXT_TOKENS),
    latent_axes="bsc",
)
