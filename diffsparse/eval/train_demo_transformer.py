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

from diffsparse.eval.stacked_muon import StackedMuon
from diffsparse.eval.train_demo_latents import LatentPool
from diffsparse.eval.training_run import TrainingRun, WeightAverage

MAX_SEQUENCE_LENGTH = 64
CAPTION_DROPOUT = 0.12
TIMESTEP_SHIFT = 5.0
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Phase:
    """A part of the run, up to the share `until` of its time, at one latent grid (frames, height, width).

    First `first_clips` are rendered into a pool of latents, or as many as a step needs; each step adds `new_clips` to
    them and draws `batch` clips, times the run's `batch_scale`.
    """

    until: float
    grid: tuple[int, int, int]
    batch: int
    new_clips: int
    first_clips: int = 0


PHASES = (
    Phase(0.16, (5, 8, 8), batch=12, new_clips=3, first_clips=48),
    Phase(0.20, (17, 8, 8), batch=4, new_clips=1, first_clips=16),
    Phase(0.60, (5, 16, 16), batch=3, new_clips=1, first_clips=12),
    Phase(0.76, (9, 16, 16), batch=2, new_clips=1, first_clips=8),
    Phase(1.00, (17, 16, 16), batch=1, new_clips=1, first_clips=4),
)
# A GPU takes thousands of steps in minutes, most of them on the grid that the demo samples. Starting kernels bounds how
# fast it can be on small grids and at rendering, 150 kernels a clip: so no larger batches there, and a full pool first.
GPU_PHASES = (
    Phase(0.10, (5, 8, 8), batch=4, new_clips=2, first_clips=2048),
    Phase(0.30, (5, 16, 16), batch=3, new_clips=2, first_clips=2048),
    Phase(1.00, (17, 16, 16), batch=1, new_clips=4, first_clips=2048),
)
GPU_BATCH_SCALE = 16


@dataclass(frozen=True)
class Recipe:
    """Sizes of the models and the schedule."""

    latent_channels: int = 24
    num_heads: int = 3
    head_dim: int = 64
    num_layers: int = 6
    ffn_dim: int = 768
    text_dim: int = 128
    phases: tuple[Phase, ...] = PHASES


class TextToLatents(nn.Module):
    """Text encoder and transformer as one module, so that one optimizer step and one average cover both."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer

    def forward(self, noisy: Tensor, timestep: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
        """The velocity [B, C, F, H, W]. Prompt embeddings are zero behind the caption, as in WanPipeline."""
        # numbers to add, [B, 1, 1, S]: of zeros and ones the encoder would read the values, and so wait for the GPU
        added = (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
        embeds = self.text_encoder(token_ids, added).last_hidden_state * mask[..., None]
        return self.transformer(noisy, timestep=timestep, encoder_hidden_states=embeds).sample


def build_model(vocab_size: int, recipe: Recipe) -> TextToLatents:
    """An untrained text encoder and transformer."""
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=recipe.text_dim,
            d_kv=recipe.text_dim // 4,
            d_ff=2 * recipe.text_dim,
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
        num_attention_heads=recipe.num_heads,
        attention_head_dim=recipe.head_dim,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        text_dim=recipe.text_dim,
        freq_dim=256,
        ffn_dim=recipe.ffn_dim,
        num_layers=recipe.num_layers,
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
    phases: tuple[Phase, ...] = PHASES,
    batch_scale: int = 1,
) -> None:
    """Train on the device of the model and of the autoencoder, for the run's time; leaves the average in `model`."""
    optimizers = _optimizers(model)
    average = WeightAverage(model)

    def state() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "average": average.weights,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }

    if (saved := run.resume()) is not None:
        model.load_state_dict(saved["model"])
        average.resume(saved["average"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
    pool: LatentPool | None = None
    losses: list[Tensor] = []
    while (progress := run.progress()) < 1:
        phase = next(phase for phase in phases if progress < phase.until)
        # one for every step: a resumed run goes on as it would have
        generator = torch.Generator().manual_seed(seed * 1_000_003 + run.step)
        batch = batch_scale * phase.batch
        if pool is None or pool.grid != phase.grid:
            pool = LatentPool(vae, phase.grid)
            pool.grow(max(phase.first_clips, batch), generator)
        pool.grow(phase.new_clips, generator)
        latents, captions = pool.draw(batch, generator)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * learning_rate_factor(run.step, progress)
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=has_fast_bfloat16(latents.device)):
            loss = flow_matching_loss(model, tokenizer, latents, captions, generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        run.step += 1
        average.update(run.step)
        losses = [*losses, loss.detach()][-20:]
        if run.step % 20 == 0:
            # read only here: reading a number waits for the GPU
            loss_now = torch.stack(losses).mean().item()
            run.log(loss=loss_now, grid="x".join(map(str, phase.grid)), gradient_norm=norm.item())
        if run.save_is_due():
            run.save(state())
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
) -> Tensor:
    """Mean squared error of the velocity at random, shifted noise levels: what WanPipeline's scheduler integrates."""
    B = len(captions)
    device = latents.device
    dropped = torch.rand(B, generator=generator) < CAPTION_DROPOUT
    captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions, strict=True)]
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_SEQUENCE_LENGTH, return_tensors="pt")
    token_ids, mask = to_device(tokens.input_ids, device), to_device(tokens.attention_mask, device)
    # stratified, so that a small batch still covers the noise levels
    sigma = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    sigma = to_device(TIMESTEP_SHIFT * sigma / (1 + (TIMESTEP_SHIFT - 1) * sigma), device)
    noise = noise_like(latents, generator)
    level = sigma.view(B, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = model(noisy, sigma * 1000, token_ids, mask)
    return (velocity.float() - (noise - latents)).square().mean()


def noise_like(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise. A CUDA device draws it itself, from the generator's seed, so a seed means other noise there."""
    device = latents.device
    if device.type == "cuda":
        own = torch.Generator(device).manual_seed(generator.initial_seed())
        return torch.randn(latents.shape, generator=own, device=device)
    return torch.randn(latents.shape, generator=generator).to(device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; to a CUDA device it goes from pinned memory, so that nothing waits for it."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _optimizers(model: TextToLatents) -> list[torch.optim.Optimizer]:
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
        return [torch.optim.AdamW([*matrices, *others], lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)]
    return [
        StackedMuon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
