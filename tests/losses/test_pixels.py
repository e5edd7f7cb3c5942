"""The error of predicted patches, pixel by pixel in plain mathematics."""

import statistics

import pytest
import torch

from fastvlp.losses import pixel_error


def test_pixel_error():
    made = torch.Generator().manual_seed(0)
    predicted = torch.randn(5, 12, generator=made, dtype=torch.float64)
    pixels = torch.randint(0, 256, (5, 12), generator=made, dtype=torch.uint8)
    pixels[3] = 7  # one colour: there is nothing to divide by
    found = pixel_error(predicted, pixels)
    for told, raw, error in zip(predicted.tolist(), pixels.tolist(), found.tolist(), strict=True):
        x = [value / 255 for value in raw]
        mean, scale = statistics.fmean(x), (statistics.variance(x) + 1e-6) ** 0.5
        assert error == pytest.approx(statistics.fmean((a - (b - mean) / scale) ** 2 for a, b in zip(told, x, strict=True)))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 12\) predicted for pixels \(3, 12\)"):
        pixel_error(torch.zeros(2, 12), torch.zeros(3, 12))
