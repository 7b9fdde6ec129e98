from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

from diffsparse.eval.linear_vae import fit_linear_vae


@pytest.fixture(scope="module")
def clips():
    """Smooth random clips [4, 3, 5, 32, 32] in -1..1."""
    coarse = torch.rand(4, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(5, 32, 32), mode="trilinear")


@pytest.fixture(scope="module")
def vae(clips):
    return fit_linear_vae(clips, num_components=6)


def encode(vae, video):
    with torch.no_grad():
        return vae.encode(video).latent_dist.mode()


def test_latents_are_the_principal_components_of_the_patches(vae, clips):
    rows = patchify(clips, 8).movedim(1, -1).reshape(-1, 192).double()
    latents = encode(vae, clips).movedim(1, -1).reshape(len(rows), 6)
    directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:6]
    expected = (rows @ directions.T).float()
    # A component may point either way.
    assert torch.allclose(latents.abs(), expected.abs(), atol=2e-3)


def test_the_whole_network_is_linear(vae, clips):
    with torch.no_grad():
        z = encode(vae, clips[:1] * 0.3)
        zero, once, twice = (vae.decode(factor * z).sample for factor in (0.0, 1.0, 2.0))
    assert torch.allclose(twice - zero, 2 * (once - zero), atol=2e-3)


def test_it_reconstructs_better_than_its_components_alone(vae, clips):
    latents = encode(vae, clips)
    with torch.no_grad():
        error = (vae.decode(latents).sample - clips).square().mean()
    rows = patchify(clips, 8).movedim(1, -1).reshape(-1, 192)
    left_over = torch.linalg.svdvals(rows - rows.mean(0))[6:].square().sum() / rows.numel()
    assert error < left_over


def test_frames_do_not_depend_on_each_other(vae, clips):
    changed = clips.clone()
    changed[:, :, 0] = 0.0
    assert torch.allclose(encode(vae, clips)[:, :, 1:], encode(vae, changed)[:, :, 1:], atol=1e-4)


def test_the_config_holds_mean_and_scale_of_the_latents(vae, clips):
    latents = encode(vae, clips)
    assert torch.allclose(torch.tensor(vae.config.latents_mean), latents.mean(dim=(0, 2, 3, 4)), atol=1e-2)
    std = latents.std(dim=(0, 2, 3, 4))
    assert torch.allclose(torch.tensor(vae.config.latents_std), (std * std.mean()).sqrt(), rtol=0.05)
