"""Plots and grids as PIL images: curves of a log, images with their captions."""

import contextlib
import io
import json
import math
import statistics
import textwrap
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from minit2i.checkpoint import write_file

COLORS = "#1d4ed8 #c2410c #15803d #7e22ce #0e7490 #a16207 #be185d #444444 #dc2626 #65a30d".split()
GAP = 2  # pixels between the images of a grid


def save_image(path, image, **text):
    """Write a PNG atomically, with text chunks."""
    info, buffer = PngInfo(), io.BytesIO()
    for k, v in text.items():
        info.add_itxt(k, str(v))
    image.save(buffer, "PNG", pnginfo=info)
    write_file(path, buffer.getvalue())


# --- curves --------------------------------------------------------------------------------------------


def smooth(points, width):
    """Means of `width` neighbours: [(x, y)] -> [(x, y)]."""
    parts = [points[i : i + width] for i in range(0, len(points), width)]
    return [(part[-1][0], statistics.mean(y for _, y in part)) for part in parts]


def plot(curves, title, width=560, height=340, unit="steps"):
    """{label: [(x, y)]} -> a PIL image with a legend, x counted in `unit`; values in the first tenth of a curve may
    exceed the y axis."""
    image = Image.new("RGB", (width, height), "white")
    draw, x0, y0, x1, y1 = ImageDraw.Draw(image), 56, height - 28, width - 12, 24
    low = min(y for points in curves.values() for _, y in points)
    top = max(y for points in curves.values() for _, y in points[len(points) // 10 :])
    last = max(x for points in curves.values() for x, _ in points)

    def at(x, y):
        return x0 + (x1 - x0) * x / max(last, 1), y0 + (y1 - y0) * min(1.0, (y - low) / max(top - low, 1e-9))

    draw.line([(x0, y1), (x0, y0), (x1, y0)], fill="#888888")
    draw.text((x0, 4), title, fill="black")
    for value in (low, (low + top) / 2, top):
        draw.text((4, at(0, value)[1] - 6), f"{value:.4g}", fill="#444444")
    draw.text((x1, y0 + 8), f"{last:,} {unit}", fill="#444444", anchor="ra")
    first = next(iter(curves.values()))
    falls = first[-1][1] < first[0][1]
    legend = y1 if falls else y0 - 6 - 14 * len(curves)  # in the corner that the curves leave free
    for k, (label, points) in enumerate(curves.items()):
        color = COLORS[k % len(COLORS)]
        draw.line([at(*p) for p in points], fill=color, width=2)
        draw.text((x1 - 6 * max(map(len, curves)), legend + 14 * k), label, fill=color)
    return image


def beside(panels):
    """Images of one height in a row."""
    return Image.fromarray(np.concatenate([np.asarray(im) for im in panels], 1))


def read_log(path):
    """The records of a log.jsonl; a line that a killed process left incomplete is skipped."""
    records = []
    for line in Path(path).read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and isinstance(r.get("step"), int)]


def plot_log(path, keys):
    """A panel for each key that a log.jsonl has, in training and in validation (val_ + key)."""
    records, panels = read_log(path), []
    for key in keys:
        curves = {}
        for r in records:
            for k in (key, f"val_{key}"):
                if math.isfinite(r.get(k, math.nan)):
                    curves.setdefault(k, []).append((r["step"], r[k]))
        if curves:
            panels.append(plot(curves, f"{key}, at last {[*curves.values()][-1][-1][1]:.4g}", 460, 240))
    return beside(panels)


# --- grids ---------------------------------------------------------------------------------------------


def to_pil(image):
    """(3, H, W) in [-1, 1] -> PIL image."""
    array = image.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def grid_image(images, columns):
    """images (B, 3, H, W) in [-1, 1] -> one PIL image, row by row, GAP white pixels between them."""
    images = F.pad(images, (0, GAP, 0, GAP, 0, 0, 0, -len(images) % columns), value=1.0)
    return to_pil(rearrange(images, "(r c) d h w -> d (r h) (c w)", c=columns)[:, :-GAP, :-GAP])


def captioned_grid(images, captions, titles=("training", "validation"), starts=None):
    """images (rows, columns, 3, H, W) in [-1, 1] -> PIL image with each column's caption below it, wrapped.

    titles: headings above the columns that `starts` numbers (default: above equal shares of the columns).  Images
    narrower than 96 pixels are enlarged to leave room for the text.
    """
    columns, w = images.shape[1], images.shape[-1]
    scale = max(1, -(-96 // w))
    grid = grid_image(F.interpolate(images.flatten(0, 1), scale_factor=scale), columns)
    font, line, w = ImageFont.load_default(10), 12, w * scale
    texts = [textwrap.wrap(caption, max(1, w // 6))[:8] for caption in captions]  # 6: an average character's width
    below = line + grid.height + GAP
    page = Image.new("RGB", (grid.width, below + line * max(map(len, texts), default=0) + GAP), "white")
    page.paste(grid, (0, line))
    draw = ImageDraw.Draw(page)
    for title, column in zip(titles, starts or [k * columns // len(titles) for k in range(len(titles))]):
        draw.text((column * (w + GAP), 0), title, fill="black", font=font)
    for column, text in enumerate(texts):
        for k, words in enumerate(text):
            draw.text((column * (w + GAP), below + k * line), words, fill="#444444", font=font)
    return page
