"""Plots and grids."""

import numpy as np
import torch
from PIL import Image

from minit2i.plot import captioned_grid, grid_image, plot, save_image, smooth, to_pil


def test_a_grid_places_images_row_by_row():
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 4, 6)
    grid = np.asarray(grid_image(images, 3))
    assert grid.shape == (4 * 2 + 2, 6 * 3 + 2 * 2, 3)
    assert grid[0, 0, 0] == 0 and grid[0, 8, 0] == 64 and grid[6, 8, 0] == 255 and (grid[6:, 16:] == 255).all()


def test_captions_stand_below_their_columns():
    images = torch.ones(2, 4, 3, 32, 32)  # white, on white: every dark pixel is text
    captions = ["", "a red circle above a small blue square on a white background", "star", ""]
    grid = captioned_grid(images, captions)
    assert grid.width == 4 * 98 - 2, "columns are 96 pixels wide at least"
    dark = np.asarray(grid.convert("L")) < 160
    below, above = dark[12 + 2 * 98 :], dark[:12]
    columns = [below[:, k * 98 : k * 98 + 96].sum() for k in range(4)]
    assert columns[0] == columns[3] == 0 and 0 < columns[2] < columns[1] / 4
    assert below[12:, 98:194].any(), "a long caption is wrapped"
    assert above[:, :96].any() and above[:, 196:].any() and not above[:, 98:196].any(), "both halves have a title"
    shifted = np.asarray(captioned_grid(images, captions, starts=(0, 3)).convert("L"))[:12] < 160
    assert shifted[:, 294:].any() and not shifted[:, 98:294].any()
    assert not dark[12 : 12 + 2 * 98].any(), "no text covers an image"


def test_a_plot_draws_every_curve(tmp_path):
    curves = {"a": [(0, 2.0), (10, 1.0)], "b": [(0, 1.5), (10, 1.2)]}
    image = np.asarray(plot(curves, "loss"))
    colors = {tuple(c) for c in image.reshape(-1, 3)}
    assert {(0x1D, 0x4E, 0xD8), (0xC2, 0x41, 0x0C)} <= colors
    assert smooth([(0, 1.0), (1, 3.0), (2, 5.0)], 2) == [(1, 2.0), (2, 5.0)]
    save_image(tmp_path / "a.png", to_pil(torch.zeros(3, 4, 4)), prompt="\u00e9\u4e2d", seed=3)
    found = Image.open(tmp_path / "a.png")
    assert found.text == {"prompt": "\u00e9\u4e2d", "seed": "3"} and found.getpixel((0, 0)) == (128, 128, 128)
