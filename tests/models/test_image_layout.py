"""Images with their channels last: taken where the model computes the same of them."""

import pytest
import torch
from torch import nn

from bitquota.errors import InvalidCalibration
from bitquota.models.calibration import CalibrationSet
from bitquota.models.image_layout import channels_last, takes_channels_last
from refusals import refused


class Viewing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x).view(len(x), -1)


class Strided(nn.Module):
    """Reads the memory as it lies."""

    def forward(self, x):
        return torch.as_strided(x, (len(x), 4), (x.stride(0), 1))


def convolution():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten()).eval()


def images(channels=3):
    return CalibrationSet(inputs=(torch.randn(4, channels, 6, 6),))


def test_a_set_stays_what_it_was_and_its_parts_are_laid_out_alike():
    data = images()
    found = channels_last(data)
    assert torch.equal(found.inputs[0], data.inputs[0])
    assert found.digest == data.digest
    for part in (found, found.take([2, 0]), found.first(3), *found.batches(2)):
        assert part.inputs[0].is_contiguous(memory_format=torch.channels_last)


def test_layers_hand_the_layout_on():
    (x,) = channels_last(images()).inputs
    module = convolution()
    assert takes_channels_last(module, images())
    assert module[0](x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("module", [Viewing(), Strided()])
def test_a_model_that_takes_channels_first_for_granted_is_left_alone(module):
    assert not takes_channels_last(module.eval(), images())


def test_one_channel_has_no_order():
    assert not takes_channels_last(nn.Flatten().eval(), images(channels=1))


def test_samples_that_do_not_fit_are_refused():
    with refused(InvalidCalibration):
        takes_channels_last(convolution(), images(channels=5))
