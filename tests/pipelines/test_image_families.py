"""What the image families say of calls that their tiny models do not make, and which of them stay dense."""

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from enabled import FULL, SPARSE, config, report_of, run
from tiny.flux2 import four_ids, image_ids
from tiny.model import CHANNELS, TEXT_CHANNELS
from tiny_models import TINY

from diffsparse import DenseFallback
from diffsparse.pipelines.families import find_family
from diffsparse.pipelines.family import Layout


class Called:
    """A tiny model and a call of it, changed."""

    def __init__(self, name, batch=1, config=None, grid=None, **changes):
        self.tiny = TINY[name]
        self.model = self.tiny.make(**(config or {}))
        self.call = self.tiny.call(self.model, grid or self.tiny.grid, batch=batch) | changes

    @property
    def layout(self):
        return find_family(self.model).layout(self.model, self.call)

    def run(self):
        return run(self.model, self.call)

    def ran(self):
        """Sparse calls, and dense ones by reason, once enabled."""
        self.model.enable_sparse_attention(SPARSE)
        self.run()
        report = report_of(self.model)
        self.model.disable_sparse_attention()
        return report.sparse_calls, report.dense_reasons

    def is_as_exact_as_stock(self):
        stock = self.run()
        self.model.enable_sparse_attention(FULL)
        torch.testing.assert_close(self.run(), stock)

    def stays_dense(self, reason):
        stock, layers = self.run(), len(self.tiny.layers)
        sparse_calls, reasons = self.ran()
        return (sparse_calls, reasons) == (0, {reason: layers}) and torch.equal(self.run(), stock)


def random(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


def test_z_images_captions_may_differ_in_length_and_their_padding_is_no_key():
    captions = [random(7, TEXT_CHANNELS), random(40, TEXT_CHANNELS)]
    images = [random(CHANNELS, 1, 14, 10), random(CHANNELS, 1, 14, 10)]
    called = Called("z_image", batch=2, x=images, cap_feats=captions)
    assert called.layout == Layout(1, 7, 5, text_after=64 - 35 + 64)
    assert called.ran() == (2, {})
    called.is_as_exact_as_stock()


def test_z_images_refiners_are_no_layers():
    assert Called("z_image", config={"n_refiner_layers": 1}).ran() == (2, {})


def test_z_images_of_different_sizes_and_omni_calls_have_no_layout():
    images = [random(CHANNELS, 1, 14, 10), random(CHANNELS, 1, 10, 14)]
    assert Called("z_image", batch=2, x=images).layout is None
    assert Called("z_image", x=[images]).layout is None


@pytest.mark.parametrize("layered", [True, False], ids=["layers", "references"])
def test_qwen_images_of_one_size_are_frames_and_a_smaller_reference_is_not(layered):
    shapes = [[(1, 7, 5), (1, 7, 5), (1, 7, 5), (1, 2, 3)]]
    latents = random(1, 3 * 35 + 6, CHANNELS)
    called = Called("qwen_image", config={"use_layer3d_rope": layered}, img_shapes=shapes, hidden_states=latents)
    assert called.layout == Layout(3, 7, 5, text_before=7, text_after=6)
    assert called.ran() == (2, {})


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([(7, 5)], Layout(2, 7, 5, text_before=7)),
        ([(7, 5), (7, 5), (4, 3)], Layout(3, 7, 5, text_before=7, text_after=12)),
        ([(4, 3), (7, 5)], Layout(1, 7, 5, text_before=7, text_after=12 + 35)),
        # What lies beyond the image's own places has none in the grid.
        ([(8, 5)], Layout(2, 7, 5, text_before=7, text_after=5)),
        ([(5, 7)], Layout(1, 7, 5, text_before=7, text_after=35)),
    ],
)
def test_references_at_the_places_of_the_image_are_frames_of_flux(references, expected):
    ids = torch.cat([image_ids(7, 5), *(image_ids(*size, image=1) for size in references)])
    called = Called("flux", img_ids=ids, hidden_states=random(1, len(ids), CHANNELS))
    assert called.layout == expected
    assert called.ran() == (4, {})
    called.is_as_exact_as_stock()


def test_images_to_edit_as_large_as_the_image_are_frames_of_bria_fibo2():
    images = [random(1, CHANNELS, 14, 10), random(1, CHANNELS, 8, 6)]
    called = Called("bria_fibo2", context_latents=images)
    assert called.layout == Layout(2, 7, 5, called.tiny.text_before, 12)
    assert called.ran() == (2, {})


def test_qwen_images_of_different_sizes_or_other_latents_have_no_layout():
    assert Called("qwen_image", batch=2, img_shapes=[[(1, 7, 5)], [(1, 5, 7)]]).layout is None
    assert Called("qwen_image", img_shapes=[[(1, 7, 6)]]).layout is None
    assert Called("qwen_image", img_shapes=[]).layout is None


def test_images_of_krea_2_that_their_places_do_not_fill_have_no_layout():
    assert Called("krea2", hidden_states=random(1, 36, CHANNELS)).layout is None
    assert Called("krea2", hidden_states=random(1, 35, 2, 2)).layout is None


@pytest.mark.parametrize("shapes", [(1, 7, 5), [(1, 7, 5)], [(1, 7, 5)] * 2], ids=str)
def test_nucleus_may_say_the_size_of_its_images_once(shapes):
    called = Called("nucleus_image", batch=2, img_shapes=shapes)
    assert called.layout == Layout(1, 7, 5, text_after=7)
    assert called.ran() == (2, {})
    assert Called("nucleus_image", batch=2, img_shapes=[(1, 7, 5), (1, 5, 7)]).layout is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_a_mask_that_hides_no_text_of_qwen_image_is_none(dtype):
    # Modular pipelines pass one for each prompt.
    called = Called("qwen_image", batch=2)
    expected = called.ran()
    called.call["encoder_hidden_states_mask"] = mask = torch.ones(2, 7, dtype=dtype)
    assert called.ran() == expected == (len(called.tiny.layers), {})
    called.is_as_exact_as_stock()
    # One that comes to hide some is seen.
    mask[1, 5:] = 0
    called.model.disable_sparse_attention()
    called.is_as_exact_as_stock()


def test_chroma_stays_dense_with_the_mask_of_its_pipeline():
    mask = torch.ones(1, 7 + 35)
    mask[:, 4:7] = 0
    assert Called("chroma", attention_mask=mask).stays_dense("attention mask")


def test_cogview4_and_glm_image_stay_dense_with_a_mask():
    mask = torch.ones(1, 7)
    for name in ("cogview4", "glm_image"):
        assert Called(name, attention_mask=mask).stays_dense("attention mask")


def test_glm_image_stays_dense_where_it_reads_keys_from_a_cache():
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    cache = GlmImageKVCache(num_layers=2)
    called = Called("glm_image", kv_caches=cache)
    cache.set_mode("write")
    called.run()
    cache.set_mode("read")
    assert called.stays_dense("query, key and value differ in shape")


def test_lumina2_has_a_layout_only_where_prompts_are_equally_long():
    mask = torch.arange(7) < torch.tensor([[5], [6]])
    assert Called("lumina2", batch=2, encoder_attention_mask=mask.long()).layout is None
    assert Called("lumina2", batch=2, encoder_attention_mask=torch.ones(2, 7)).layout == Layout(1, 7, 5, 7)


def test_hidream_pads_no_square():
    called = Called("hidream", grid=(1, 6, 6))
    assert called.layout == Layout(1, 6, 6, text_after=7 + 2 * 3)
    assert called.ran() == (3, {})


def test_attention_to_kept_keys_of_flux2_is_counted():
    # The processors of Klein KV share a function, which attends to text, references and image, then to references.
    called = Called("flux2")
    model, call, image, ids = called.model, called.call, called.call["hidden_states"], called.call["img_ids"]
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    first = {
        "hidden_states": torch.cat([random(1, 12, CHANNELS), image], dim=1),
        "img_ids": torch.cat([four_ids(image_ids(4, 3, image=10))[None], ids], dim=1),
        "num_ref_tokens": 12,
        "kv_cache_mode": "extract",
    }

    def two_steps():
        with torch.no_grad():
            extracted = model(**(call | first))
            return extracted.sample, model(**call, kv_cache=extracted.kv_cache, kv_cache_mode="cached").sample

    stock = two_steps()
    model.enable_sparse_attention(FULL)
    for output, expected in zip(two_steps(), stock, strict=True):
        assert torch.equal(output, expected)
    report = report_of(model)
    assert report.sparse_calls == 0
    assert report.dense_reasons == {"the call does not say the size of the grid": 4 * (2 + 1)}
    model.disable_sparse_attention()
    model.enable_sparse_attention(config(strict=True))
    with pytest.raises(DenseFallback):
        two_steps()


def test_the_size_of_a_flux2_image_is_that_of_the_first_alone():
    ids = torch.cat([image_ids(4, 6), image_ids(6, 4, image=10), image_ids(4, 6, image=20)])
    called = Called("flux2", img_ids=four_ids(ids)[None], hidden_states=random(1, 72, CHANNELS))
    assert called.layout == Layout(1, 4, 6, 7, 48)


def test_joyimages_images_are_frames():
    called = Called("joyimage_edit", hidden_states=random(1, 3, CHANNELS, 1, 14, 10))
    assert called.layout == Layout(3, 7, 5, text_after=7)
    assert called.ran() == (2, {})


def test_joyimage_plus_needs_one_size_of_the_generated_image():
    patches = random(2, 35 + 12, CHANNELS, 1, 2, 2)
    one_size = [[(1, 7, 5), (1, 4, 3)], [(1, 7, 5), (1, 2, 2)]]
    assert Called("joyimage_edit_plus", hidden_states=patches, shape_list=one_size).layout == Layout(1, 7, 5, 0, 12 + 7)
    two_sizes = [[(1, 7, 5), (1, 4, 3)], [(1, 5, 7), (1, 4, 3)]]
    assert Called("joyimage_edit_plus", hidden_states=patches, shape_list=two_sizes).layout is None
    # Its mask would hide the patches that a row has fewer.
    changes = {"encoder_hidden_states_mask": torch.ones(2, 7), "hidden_states": patches, "shape_list": one_size}
    masked = Called("joyimage_edit_plus", batch=2, **changes)
    assert masked.stays_dense("the call does not say the size of the grid")


def test_a_video_refiner_of_three_axes_has_frames():
    config = {"patch_size": (1, 1, 1), "rope_axes_dim": (8, 12, 12)}
    called = Called("hunyuan_image", config=config, grid=(2, 7, 5))
    assert called.layout == Layout(2, 7, 5, text_after=7)
    assert called.ran() == (4, {})
