"""Which position sees which: attention masks, each written once, and a picture of them all.

    python -m minit2i.masks --out masks.png

A mask says which key position k a query position q may see: integer tensors that broadcast -> bool.
Positions count the whole sequence: below cfg.n_prefix is text (and the codes of a smaller
picture), the rest the grid in raster order.
Training, cached decoding and the picture take it from MASKS; --mask gives each layer its own.

Shapes: T text length (smaller pictures' codes included), h w code grid, N = h*w, L = T+N.
"""

import torch
from PIL import Image, ImageDraw

from minit2i.flags import count, new_parser, pick

KERNEL = 11  # side of the conv mask's window, DALL-E app. B.1


def full(q, k, cfg):
    """Every earlier position and itself."""
    return k <= q


def row(q, k, cfg):
    """Text, and the codes back to the one above: w + 1 with itself.  DALL-E, 2102.12092 fig. 11a."""
    return full(q, k, cfg) & ((k < cfg.n_prefix) | (q - k <= cfg.grid_w))


def column(q, k, cfg):
    """Text, and the codes straight above.  DALL-E fig. 11b."""
    return full(q, k, cfg) & ((k < cfg.n_prefix) | ((q - k) % cfg.grid_w == 0))


def conv(q, k, cfg):
    """Text, and the earlier half of an 11x11 window that wraps in raster order.  DALL-E fig. 11d (which draws 3x3)."""
    side = KERNEL // 2
    inside = ((q - k + side) % cfg.grid_w < KERNEL) & (q - k <= side * cfg.grid_w + side)
    return full(q, k, cfg) & ((k < cfg.n_prefix) | inside)


def window(q, k, cfg):
    """Text, and the earlier codes of a square crop of side cfg.window round the code, pushed inside the picture.

    Taming's sliding window, 2012.09841 sec. 3.3, where it is 16 and serves sampling only; here each layer has it,
    so that what n layers see is wider.
    """

    def inside(q, k, n):  # of n rows (columns)
        first = (q - cfg.window // 2).clamp(max=n - cfg.window).clamp(min=0)
        return (k >= first) & (k < first + cfg.window)

    iq, ik, w = q - cfg.n_prefix, k - cfg.n_prefix, cfg.grid_w
    return full(q, k, cfg) & ((k < cfg.n_prefix) | (inside(iq // w, ik // w, cfg.grid_h) & inside(iq % w, ik % w, w)))


def prefix(q, k, cfg):
    """As full, and text sees all text.  Prefix LM, T5, 1910.10683 sec. 3.2; text can then not be learned."""
    return full(q, k, cfg) | ((q < cfg.n_prefix) & (k < cfg.n_prefix))


def none(q, k, cfg):
    """All positions: for masked models (MaskGIT, Muse), which nothing draws code by code."""
    return (k >= 0) & (q >= 0)


MASKS = {f.__name__: f for f in (full, row, column, conv, window, prefix, none)}


def layer_masks(cfg):
    """cfg.mask -> the name of each layer's mask, n_layer of them.  ValueError if one is not known.

    A name, or several with commas between, which take turns; auto: none for a masked model, else full; dalle:
    column in layers 2, 6, 10, ... counted from 1, conv in the last, row in the others (2102.12092 app. B.1).
    """
    known = {"dalle": ("row", "column", "row", "row"), "auto": ("none" if cfg.objective == "masked" else "full",)}
    names = known.get(cfg.mask, cfg.mask.split(","))
    for name in names:
        if name not in MASKS:
            raise ValueError(
                f"mask {name!r} is not known; use {', '.join(MASKS)}, several with commas between, dalle, or auto"
            )
    layers = [names[i % len(names)] for i in range(cfg.n_layer)]
    return layers[:-1] + ["conv"] if cfg.mask == "dalle" else layers


# --- the picture -----------------------------------------------------------------------------------------


def picture(cfg, names, cell=2, columns=4):
    """A panel for each mask, queries down and keys across: text is seen where blue, codes where orange."""
    at, t, side, gap = torch.arange(cfg.length), cfg.n_prefix, cfg.length * cell, 20
    color = torch.where((at < t)[:, None], torch.tensor([37, 99, 235]), torch.tensor([234, 88, 12]))  # (L, 3) by key
    rows = -(-len(names) // columns)
    sheet = Image.new("RGB", (min(columns, len(names)) * (side + gap) + gap, rows * (side + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        seen = MASKS[name](at[:, None], at[None], cfg)
        pixels = torch.where(seen[..., None], color, 232).to(torch.uint8).numpy()  # (L, L, 3)
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + gap)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.NEAREST), (x, y))
        draw.text((x, y - 14), name, fill="black")
        draw.line([(x + t * cell, y), (x + t * cell, y + side)], fill="white")
        draw.line([(x, y + t * cell), (x + side, y + t * cell)], fill="white")
    return sheet


def main():
    from minit2i.gpt import GPTConfig  # here, as gpt.py imports this file
    from minit2i.train import save_image

    parser = new_parser(__doc__)
    parser.add_argument("--out", default="masks.png", help="the PNG to write [masks.png]")
    parser.add_argument("--text_len", type=int, default=32, help="text positions [32]")
    parser.add_argument("--grid_h", type=count, default=12, help="rows of codes [12]")
    parser.add_argument("--grid_w", type=count, default=16, help="columns of codes [16]")
    parser.add_argument("--window", type=count, default=8, help="side of the window mask's crop [8]")
    args = parser.parse_args()
    save_image(args.out, picture(pick(GPTConfig, args), tuple(MASKS)))


if __name__ == "__main__":
    from minit2i.train import run

    run(main)
