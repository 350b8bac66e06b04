"""Measures that need tensors only: PSNR, SSIM and sharpness of images, and codebook usage.

Shapes: B batch, H W image, V codebook size.
"""

import torch
import torch.nn.functional as F


def psnr(a, b):
    """Peak signal-to-noise ratio per image in dB: a, b (B, 3, H, W) in [-1, 1] -> (B,)."""
    mse = (a.float() - b.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))  # the range is 2


def ssim(a, b):
    """Structural similarity per image: a, b (B, 3, H, W) in [-1, 1] -> (B,).

    11x11 Gaussian windows (sigma 1.5 pixels) that lie fully inside the image; each channel separately, then averaged.
    ValueError for images below 11 pixels.  Wang et al. 2004, "Image quality assessment", sec. III (there on gray
    images).
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11x11 pixels, not {a.shape[-2]}x{a.shape[-1]}")
    a, b = a.float(), b.float()
    window = torch.exp(-((torch.arange(11, device=a.device) - 5.0) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x):  # (B, 3, H, W) -> (B, 3, H-10, W-10)
        x = F.conv2d(x, window.view(1, 1, 11, 1).expand(3, 1, 11, 1), groups=3)
        return F.conv2d(x, window.view(1, 1, 1, 11).expand(3, 1, 1, 11), groups=3)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the paper's K1, K2, times the range of 2
    value = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return value.flatten(1).mean(1)


def sharpness(a):
    """Mean absolute difference of neighbouring pixels per image: a (B, 3, H, W) -> (B,).  Blur lowers it."""
    return sum(a.float().diff(dim=d).abs().flatten(1).mean(1) for d in (2, 3))


def code_stats(counts):
    """Use of each code (V,) -> fraction of codes used at least once, perplexity exp(entropy)."""
    counts = counts.cpu().double()
    share = counts / counts.sum().clamp_min(1)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())
