import torch

from fused_resnet.training.data.order import epoch_order, seeded


def test_an_epoch_takes_each_image_once_in_whole_batches():
    order = epoch_order(70, 16, seed=0, epoch=1)
    assert order.shape == (4, 16)
    assert len(order.unique()) == 64


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    first = epoch_order(70, 16, seed=0, epoch=1)
    torch.manual_seed(1234)
    assert torch.equal(first, epoch_order(70, 16, seed=0, epoch=1))
    assert not torch.equal(first, epoch_order(70, 16, seed=1, epoch=1))
    assert not torch.equal(first, epoch_order(70, 16, seed=0, epoch=2))


def test_a_generator_depends_on_its_whole_key():
    drawn = {torch.rand(1, generator=seeded(*key)).item() for key in [(0,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (11,)]}
    assert len(drawn) == 6
    assert torch.rand(1, generator=seeded(3, 4)) == torch.rand(1, generator=seeded(3, 4))
