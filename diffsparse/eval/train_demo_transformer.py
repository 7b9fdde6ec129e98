"""The demo's denoiser: a small WanTransformer3DModel and its UMT5 text encoder, trained together by flow matching.

Grids grow during the run: most of what a caption means is learned where a step is cheap, and the last part of the
time is spent on the grid that the demo samples, because attention has to earn its structure there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diffsparse.eval.data_parallel import Workers
from diffsparse.eval.train_demo_latents import LatentPool
from diffsparse.eval.training_run import TrainingRun, WeightAverage

MAX_SEQUENCE_LENGTH = 64
CAPTION_DROPOUT = 0.12
TIMESTEP_SHIFT = 5.0
ALONE = Workers()


@dataclass(frozen=True)
class Phase:
    """A part of the run, up to the share `until` of its time, at one latent grid (frames, height, width).

    Each step of each worker adds `new_clips` rendered clips to its pool of latents and draws `batch` clips from it.
    The numbers are for a CPU; a GPU takes `batch_scale` times as many of both.
    """

    until: float
    grid: tuple[int, int, int]
    batch: int
    new_clips: int


PHASES = (
    Phase(0.16, (5, 8, 8), batch=12, new_clips=3),
    Phase(0.20, (17, 8, 8), batch=4, new_clips=1),
    Phase(0.60, (5, 16, 16), batch=3, new_clips=1),
    Phase(0.76, (9, 16, 16), batch=2, new_clips=1),
    Phase(1.00, (17, 16, 16), batch=1, new_clips=1),
)


class TextToLatents(nn.Module):
    """Text encoder and transformer as one module, so that one optimizer step and one average cover both."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer

    def forward(self, noisy: Tensor, timestep: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
        """The velocity [B, C, F, H, W]. Prompt embeddings are zero behind the caption, as in WanPipeline."""
        embeds = self.text_encoder(token_ids, mask).last_hidden_state * mask[..., None]
        return self.transformer(noisy, timestep=timestep, encoder_hidden_states=embeds).sample


def build_model(
    vocab_size: int,
    *,
    latent_channels: int = 24,
    num_heads: int = 3,
    head_dim: int = 64,
    num_layers: int = 6,
    ffn_dim: int = 768,
    text_dim: int = 128,
) -> TextToLatents:
    """An untrained text encoder and transformer."""
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=text_dim,
            d_kv=text_dim // 4,
            d_ff=2 * text_dim,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=num_heads,
        attention_head_dim=head_dim,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=text_dim,
        freq_dim=256,
        ffn_dim=ffn_dim,
        num_layers=num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )
    return TextToLatents(text_encoder, transformer)


def train_transformer(
    model: TextToLatents,
    tokenizer: PreTrainedTokenizerFast,
    vae: AutoencoderKLWan,
    run: TrainingRun,
    seed: int,
    *,
    workers: Workers = ALONE,
    phases: tuple[Phase, ...] = PHASES,
    rate: float = 2e-3,
    batch_scale: int = 1,
) -> None:
    """Train on the device of the model and of the autoencoder, for the run's time; leaves the average in `model`."""
    optimizers = _optimizers(model, rate)
    average = WeightAverage(model)

    def state() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "average": average.weights,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }

    if (saved := run.resume()) is not None:
        model.load_state_dict(saved["model"])
        average.weights = saved["average"]
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
    pool: LatentPool | None = None
    losses: list[float] = []
    while (progress := workers.agree(run.progress())) < 1:
        phase = next(phase for phase in phases if progress < phase.until)
        generator = workers.generator(seed, run.step)
        if pool is None or pool.grid != phase.grid:
            pool = LatentPool(vae, phase.grid)
            pool.grow(4 * batch_scale * phase.batch, generator)
        pool.grow(batch_scale * phase.new_clips, generator)
        latents, captions = pool.draw(batch_scale * phase.batch, generator)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor(run.step, progress)
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=has_fast_bfloat16(latents.device)):
            loss = flow_matching_loss(model, tokenizer, latents, captions, generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        workers.average_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        run.step += 1
        average.update(model, run.step)
        losses = [*losses, loss.item()][-20:]
        if run.step % 20 == 0 and workers.writes:
            run.log(loss=sum(losses) / len(losses), grid="x".join(map(str, phase.grid)), gradient_norm=norm.item())
        if workers.writes:
            run.maybe_save(state())
    if workers.writes:
        run.save(state())
    model.load_state_dict(average.weights)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; a CPU that does not takes 50 times as long."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def learning_rate_factor(step: int, progress: float) -> float:
    """Warm-up by steps, then constant, then down to a fiftieth over the last half of the time."""
    return min(1.0, (step + 1) / 50) * min(1.0, 0.02 + 0.98 * 2 * (1 - progress))


def flow_matching_loss(
    model: TextToLatents,
    tokenizer: PreTrainedTokenizerFast,
    latents: Tensor,
    captions: list[str],
    generator: torch.Generator,
    *,
    caption_dropout: float = CAPTION_DROPOUT,
) -> Tensor:
    """Mean squared error of the velocity at random, shifted noise levels: what WanPipeline's scheduler integrates."""
    B = len(captions)
    dropped = torch.rand(B, generator=generator) < caption_dropout
    captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions, strict=True)]
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_SEQUENCE_LENGTH, return_tensors="pt")
    tokens = tokens.to(latents.device)
    # stratified, so that a small batch still covers the noise levels
    sigma = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    sigma = (TIMESTEP_SHIFT * sigma / (1 + (TIMESTEP_SHIFT - 1) * sigma)).to(latents.device)
    # Drawn on the CPU, so that a seed means the same noise everywhere.
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    level = sigma.view(B, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = model(noisy, sigma * 1000, tokens.input_ids, tokens.attention_mask)
    return (velocity.float() - (noise - latents)).square().mean()


def _optimizers(model: TextToLatents, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, projections in and out, norms and biases.

    Muon works in bfloat16: where that is slow, AdamW has to do for all.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = "blocks." in name or "encoder.block" in name
        is_matrix = parameter.ndim == 2 and inside and "relative_attention_bias" not in name
        (matrices if is_matrix else others).append(parameter)
    if not has_fast_bfloat16(others[0].device):
        return [torch.optim.AdamW([*matrices, *others], lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
