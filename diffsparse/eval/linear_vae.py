"""The demo's autoencoder: principal components of 8 x 8 pixel patches, as the weights of a stock AutoencoderKLWan.

A linear map fitted in closed form, where gradient descent on a CPU would need hours for as much. Two devices make the
network exactly linear: every signal runs through a pair of channels of opposite sign, since
silu(x) - silu(-x) = x; and a constant channel, large beside all signals, freezes the RMS norms. The residual branches
are zero. The decoder also looks at the eight neighbouring patches, which smooths the edges between them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

PATCH_SIZE = 8
CONSTANT = 1024.0


def fit_linear_vae(clips: Tensor, num_components: int = 24) -> AutoencoderKLWan:
    """The autoencoder of `num_components` latent channels that fits the clips [N, 3, F, H, W] in -1..1 best.

    Each latent frame is one pixel frame; height and width shrink by 8. Latents are scaled by the root of their
    deviation, so that strong components stay stronger, but not by as much as in the pixels.
    """
    components, mean, std = _principal_components(_patches(clips), num_components)
    width = 2 * num_components + 1
    vae = AutoencoderKLWan(
        base_dim=width + width % 2,
        z_dim=num_components,
        dim_mult=[1],
        num_res_blocks=1,
        temperal_downsample=[],
        in_channels=3 * PATCH_SIZE**2,
        out_channels=3 * PATCH_SIZE**2,
        patch_size=PATCH_SIZE,
        scale_factor_temporal=1,
        scale_factor_spatial=PATCH_SIZE,
        latents_mean=mean.tolist(),
        latents_std=(std * std.mean()).sqrt().tolist(),
    )
    vae.requires_grad_(False)
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    _pass_through(vae.encoder, components)  # [Z, 192]
    _pass_through(vae.decoder, torch.eye(num_components))
    latents = torch.einsum("zc,ncfhw->nzfhw", components, _patches(clips))
    kernel, bias = _best_decoder(latents, _patches(clips))
    _read_out(vae.encoder.conv_out, torch.eye(num_components)[:, :, None, None], torch.zeros(num_components))
    vae.encoder.conv_out.bias[num_components:] = -30.0  # no deviation: encoding is deterministic
    _read_out(vae.decoder.conv_out, kernel, bias)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(len(conv.weight))[:, :, None, None, None])
    return vae.eval()


def _patches(clips: Tensor) -> Tensor:
    """Clips [N, 3, F, H, W] as patches [N, 192, F, H/8, W/8], channels in the order of the Wan autoencoder."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    patches: Tensor = patchify(clips, PATCH_SIZE)
    return patches


def _principal_components(patches: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Directions [count, 192] of the largest variance; mean and deviation [count] of the patches along them."""
    rows = patches.movedim(1, -1).reshape(-1, patches.shape[1]).double()
    values, vectors = torch.linalg.eigh(rows.T.cov())
    components = vectors.flip(1)[:, :count].T
    return components.float(), (components @ rows.mean(dim=0)).float(), values.flip(0)[:count].sqrt().float()


def _best_decoder(latents: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares from 3 x 3 latents to a patch: kernel [192, Z, 3, 3] and bias [192]."""
    frames = latents.movedim(2, 1).flatten(0, 1)  # [N * F, Z, h, w]
    columns = F.unfold(frames, 3, padding=1).transpose(1, 2).flatten(0, 1).double()  # [n, Z * 9]
    columns = torch.cat([columns, torch.ones(len(columns), 1, dtype=torch.double)], dim=1)
    targets = patches.movedim(2, 1).movedim(2, -1).reshape(len(columns), -1).double()
    gram = columns.T @ columns
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
    solution = torch.linalg.solve(gram + ridge, columns.T @ targets).float()  # [Z * 9 + 1, 192]
    return solution[:-1].T.reshape(-1, latents.shape[1], 3, 3), solution[-1]


def _pass_through(half: Any, weight: Tensor) -> None:
    """Make an encoder or decoder compute `weight` [Z, C] on its input, as pairs of channels and a constant."""
    count = len(weight)
    half.conv_in.weight[: 2 * count, :, -1, 1, 1] = torch.cat([weight, -weight])
    half.conv_in.bias[2 * count] = CONSTANT
    # The norm divides by the constant and multiplies by the root of the width.
    half.norm_out.gamma[: 2 * count] = CONSTANT / half.norm_out.scale


def _read_out(conv: Any, kernel: Tensor, bias: Tensor) -> None:
    """Let a final convolution apply `kernel` [O, Z, h, w] to the differences of the channel pairs."""
    outputs, count, height, width = kernel.shape
    rows = slice((3 - height) // 2, (3 + height) // 2)
    columns = slice((3 - width) // 2, (3 + width) // 2)
    conv.weight[:outputs, :count, -1, rows, columns] = kernel
    conv.weight[:outputs, count : 2 * count, -1, rows, columns] = -kernel
    conv.bias[:outputs] = bias
