import pytest

from diffsparse.eval.generate import SAMPLING_FILE
from diffsparse.eval.model_choice import choose_model


@pytest.mark.parametrize("knows_its_sampling", [True, False])
@pytest.mark.parametrize("offload", [True, False])
def test_only_the_part_that_computes_is_on_the_device_with_offload(own_tiny_model, knows_its_sampling, offload):
    if not knows_its_sampling:
        (own_tiny_model / SAMPLING_FILE).unlink()
    pipe = choose_model(str(own_tiny_model), "32x32", 5, 2).load("cpu", offload)
    assert all(hasattr(part, "_hf_hook") == offload for part in (pipe.text_encoder, pipe.transformer))
