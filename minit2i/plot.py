"""Curves against steps, as pictures."""

import statistics

from PIL import Image, ImageDraw

COLORS = "#1d4ed8 #c2410c #15803d #7e22ce #0e7490 #a16207 #be185d #444444 #dc2626 #65a30d".split()


def smooth(points, width):
    """Means of `width` neighbours: [(x, y)] -> [(x, y)]."""
    parts = [points[i : i + width] for i in range(0, len(points), width)]
    return [(part[-1][0], statistics.mean(y for _, y in part)) for part in parts]


def plot(curves, title, width=560, height=340):
    """{label: [(x, y)]} -> a PIL image with a legend; the first tenth of a curve may leave it at the top."""
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
    draw.text((x1 - 40, y0 + 8), f"{last} steps", fill="#444444")
    points = next(iter(curves.values()))
    falls = points and points[-1][1] < points[0][1]
    legend = y1 if falls else y0 - 6 - 14 * len(curves)  # where the curves are not
    for k, (label, points) in enumerate(curves.items()):
        color = COLORS[k % len(COLORS)]
        draw.line([at(*p) for p in points], fill=color, width=2)
        draw.text((x1 - 6 * max(map(len, curves)), legend + 14 * k), label, fill=color)
    return image


def beside(panels):
    """Pictures of one height in a row."""
    sheet = Image.new("RGB", (sum(im.width for im in panels), panels[0].height), "white")
    for k, im in enumerate(panels):
        sheet.paste(im, (sum(other.width for other in panels[:k]), 0))
    return sheet
