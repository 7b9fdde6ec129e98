import torch


def test_memory_that_nobody_wrote_is_nan():
    template = torch.zeros(3)
    for made in (torch.empty(3), torch.empty_like(template), template.new_empty(3), torch.empty_strided((3,), (1,))):
        assert made.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
