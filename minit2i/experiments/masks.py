"""An image of all attention masks: which position (down) attends to which (across).

python -m minit2i.experiments.masks --out masks.png
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from PIL import Image, ImageDraw

from minit2i.attention import MASKS, Layout
from minit2i.config import Settings, at_least, pick
from minit2i.flags import add_flags, new_parser
from minit2i.plot import save_image
from minit2i.train import run


@dataclass(frozen=True)
class MasksConfig(Settings):
    """What to show."""

    out: Annotated[str, "the PNG to write"] = "masks.png"
    text_len: Annotated[int, "text positions", at_least(0)] = 32
    grid_h: Annotated[int, "rows of codes", at_least(1)] = 12
    grid_w: Annotated[int, "columns of codes", at_least(1)] = 16


def mask_image(layout, names, cell=2, columns=4):
    """A panel per mask, queries down and keys across: visible text is blue, visible codes are orange."""
    at, t, side, gap = torch.arange(layout.length), layout.n_prefix, layout.length * cell, 20
    color = torch.where((at < t)[:, None], torch.tensor([37, 99, 235]), torch.tensor([234, 88, 12]))  # (L, 3) by key
    rows = -(-len(names) // columns)
    image = Image.new("RGB", (min(columns, len(names)) * (side + gap) + gap, rows * (side + gap) + gap), "white")
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        visible = MASKS[name](at[:, None], at[None], layout)  # (L, L)
        pixels = torch.where(visible[..., None], color, 232).to(torch.uint8).numpy()  # (L, L, 3)
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + gap)
        image.paste(Image.fromarray(pixels).resize((side, side), Image.NEAREST), (x, y))
        draw.text((x, y - 14), name, fill="black")
        draw.line([(x + t * cell, y), (x + t * cell, y + side)], fill="white")
        draw.line([(x, y + t * cell), (x + side, y + t * cell)], fill="white")
    return image


def main():
    parser = new_parser(__doc__)
    add_flags(parser, MasksConfig)
    cfg = pick(MasksConfig, parser.parse_args())
    save_image(cfg.out, mask_image(Layout(cfg.text_len, cfg.grid_h, cfg.grid_w), tuple(MASKS)))


if __name__ == "__main__":
    run(main)
