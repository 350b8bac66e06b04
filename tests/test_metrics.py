"""Measures of tensors against loops and closed forms."""

import math

import numpy as np
import pytest
import torch

from minit2i.metrics import code_stats, psnr, sharpness, ssim


def test_ssim_equals_a_loop_over_windows():
    a, b = torch.rand(2, 2, 3, 13, 12) * 2 - 1
    g = [np.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    w = np.outer(g, g) / np.sum(np.outer(g, g))
    for k in range(2):
        values = []
        for c in range(3):
            for y in range(3):
                for x in range(2):
                    p, q = (t[k, c, y : y + 11, x : x + 11].double().numpy() for t in (a, b))
                    mp, mq = (w * p).sum(), (w * q).sum()
                    vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
                    cov = (w * (p - mp) * (q - mq)).sum()
                    values.append((2 * mp * mq + 4e-4) * (2 * cov + 36e-4) / (mp**2 + mq**2 + 4e-4) / (vp + vq + 36e-4))
        assert abs(float(ssim(a, b)[k]) - np.mean(values)) < 1e-5
    assert torch.allclose(ssim(a, a), torch.ones(2))
    with pytest.raises(ValueError, match="at least 11x11 pixels, not 10x12"):
        ssim(a[..., :10, :], b[..., :10, :])


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 4, 4)
    assert torch.allclose(psnr(a, a + 0.2), torch.full((2,), 20.0))  # range 2, error 0.2: a tenth


def test_sharpness_of_stripes():
    stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(1, 3, 8, 8)  # columns differ by 1, rows by 0
    assert sharpness(stripes).tolist() == [1.0]


def test_code_stats_of_a_known_distribution():
    use, perplexity = code_stats(torch.tensor([2, 2, 0, 0]))
    assert use == 0.5 and math.isclose(perplexity, 2)
    assert code_stats(torch.zeros(3))[0] == 0
