"""The scene oracle: reads generated scenes back out of pixels and says whether a caption's claim holds.

As GenEval (arXiv:2310.11513) does with a detector.  Measured: of 1,000 true pictures each, these shares pass on
everything that can be said.  64x64 clean, noise of 8/255, blur of 0.7 px, JPEG 85, 128x128 and 96x64: 100 %; JPEG 75:
99.9 %.  The constants below were tuned on such pictures.
"""

from functools import cache
from itertools import product

import numpy as np
from PIL import Image
from scipy import ndimage

from minit2i.scenes import BACKGROUNDS, CATEGORIES, COLORS, FILLS, RELATIONS, SHAPES, SIZES
from minit2i.scenes import Object, Scene, outline, render

FAR = 50  # RGB distance from the background that makes a pixel part of an object
UNLIKE = 75  # RGB distance beyond which a colour is none of the palette; no two of those are nearer than 100
SPECK = 0.005  # area over the short side squared below which a component is dirt; the smallest star has 0.019
MOST = 8  # components that are looked at, the largest first
FIT = 0.7  # correlation with the best template below which an object has no shape
SKEW = 1.5  # ratio of width to height, after the shape's own, beyond which an object has no shape
GRID = 24  # templates and objects are compared on a GRID x GRID raster of their bounding boxes
BLURS = (0, 0.04, 0.08)  # of the templates, over their width: small objects and JPEG lose their edges

# What each GenEval category looks at: object fields, whether the number is exact, whether the layout counts
CHECKS = {
    None: (("color", "shape", "size", "fill"), True, True),  # everything the caption says, background too
    "single_object": (("shape", "size", "fill"), True, False),
    "two_objects": (("shape",), False, False),
    "counting": (("color", "shape"), True, False),
    "colors": (("color", "shape"), False, False),
    "position": (("color", "shape"), False, True),
    "attribute_binding": (("color", "shape"), False, False),
}


@cache
def _templates():
    """Every shape and fill, sharp and blurred: names [(shape, fill)] and `_rasters` (K, GRID * GRID)."""
    names, rasters = [], []
    for shape, fill, blur in product(SHAPES, FILLS, BLURS):
        picture = render(Scene((Object("red", shape, "large", fill, 0.5, 0.5, 0.35),), "black"), 128)
        alpha = np.asarray(picture)[:, :, 0] / np.float32(COLORS["red"][0])
        alpha = ndimage.gaussian_filter(alpha, blur * 0.7 * 128)
        names.append((shape, fill))
        rasters.append(_rasters(alpha, [64 + 0.35 * 128 * _reach(shape)]))
    return names, np.concatenate(rasters)


def _rasters(alpha, boxes):
    """Coverage (h, w) inside each box and a tenth around it -> (n, GRID * GRID), mean 0, norm 1.

    A box is ((left, top), (right, bottom)) in pixels.
    """
    pad = 2 + max(alpha.shape) // 4
    padded = Image.fromarray(np.pad(alpha, pad).astype(np.float32))
    rasters = []
    for low, high in boxes:
        rim = (high - low) / 10
        edges = (*(low - rim + pad), *(high + rim + pad))
        rasters.append(np.asarray(padded.resize((GRID, GRID), Image.BOX, edges)).ravel())
    rasters = np.stack(rasters)
    rasters -= rasters.mean(1, keepdims=True)
    return rasters / np.linalg.norm(rasters, axis=1, keepdims=True)


@cache
def _reach(shape):
    """The shape's bounding box for r = 1: ((left, top), (right, bottom))."""
    return np.stack([outline(shape).min(0), outline(shape).max(0)])


def _nearest(offset, palette, ground, faded=1.0):
    """Name of the palette colour that `ground + offset` (3,) shows, or None when all are further than UNLIKE.

    faded: the least share of the colour that thin lines may keep once they are blurred into the ground.
    """

    def miss(name):
        full = np.array(palette[name]) - ground
        share = np.clip(offset @ full / (full @ full + 1e-6), faded, 1)
        return np.linalg.norm(offset - share * full)

    name = min(palette, key=miss)
    return name if miss(name) < UNLIKE else None


def read_scene(image):
    """The scene a picture shows.

    image: PIL image or uint8 array (H, W, 3) -> Scene, objects from left to right.  A background, colour or
    shape that is like none of the known ones is None.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image).astype(np.float32)
    height, width, _ = pixels.shape
    short = min(height, width)
    edges = pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]
    ground = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)  # (3,)
    offset = pixels - ground
    labels, _ = ndimage.label(np.linalg.norm(offset, axis=2) > FAR, np.ones((3, 3)))

    objects = []
    areas = np.bincount(labels.ravel())[1:]
    boxes = ndimage.find_objects(labels)
    for k in np.argsort(-areas)[:MOST] + 1:
        if areas[k - 1] < SPECK * short**2:
            break
        box = boxes[k - 1]
        inside = labels[box] == k
        rows, cols = (slice(max(s.start - 1, 0), s.stop + 1) for s in box)  # one pixel of soft edge around
        around, own = offset[rows, cols], np.isin(labels[rows, cols], (0, k))
        distance = np.linalg.norm(offset[box][inside], axis=1)
        core = np.median(offset[box][inside][distance >= 0.85 * np.quantile(distance, 0.95)], axis=0)  # (3,)
        alpha = np.clip(around @ core / (core @ core + 1e-6), 0, 1) * own  # 0 is ground, 1 is core
        shape, fill, (x, y), r = _fit(alpha)
        size = min(SIZES, key=lambda s: abs(SIZES[s] - r / short))
        x, y = (cols.start + x) / width, (rows.start + y) / height
        objects.append(Object(_nearest(core, COLORS, ground, faded=0.6), shape, size, fill, x, y, r / short))
    return Scene(tuple(sorted(objects, key=lambda o: o.x)), _nearest(np.zeros(3), BACKGROUNDS, ground))


def _fit(alpha):
    """Shape, fill, centre (x, y) and r in pixels of the template that correlates best with coverage (h, w).

    Thin tips fade below one half and ragged edges reach too far, so each side of the bounding box is also
    tried a pixel further out and a little further in.
    """
    names, templates = _templates()
    solid = alpha > 0.5
    if not solid.any():  # a component of opposite colours has no core
        return None, None, np.array(alpha.shape[::-1]) / 2, max(alpha.shape) / 2
    ys, xs = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    low, high = np.array([xs[0], ys[0]]), np.array([xs[-1] + 1, ys[-1] + 1])
    steps = (-(high - low).min() / 18, 0, 1)
    boxes = [np.array([low - (side, up), high + (side, down)]) for side, up, down in product(steps, repeat=3)]
    scores = np.einsum("bg,kg->bk", _rasters(alpha, boxes), templates)  # BLAS threads would cost more here
    box, best = np.unravel_index(scores.argmax(), scores.shape)
    shape, fill = names[best]
    low, high = boxes[box]
    r = (high - low) / (_reach(shape)[1] - _reach(shape)[0])  # as its width and as its height say
    if scores[box, best] < FIT or r.max() > SKEW * r.min():
        shape = fill = None
    return shape, fill, (low + high) / 2, r.mean()


def place_of(o):
    """The place word for an object's centre; "center" begins at 3/8, midway between the ranges drawn."""
    row = "top" if o.y < 0.375 else "bottom" if o.y > 0.625 else ""
    column = "left" if o.x < 0.375 else "right" if o.x > 0.625 else ""
    return f"{row} {column}".strip() or "center"


def holds(seen, claim, category=None):
    """Whether a claim holds of the scene that was read.

    Each claimed object needs a seen one of its own that agrees in every field that is said and looked at.
      None               everything said: all fields, exact number, place or relation, background
      single_object      exactly one object, of the right shape, size and fill
      two_objects        both shapes are there, whatever else is
      counting           exactly the claimed number of each colour and shape, and nothing else
      colors             an object of that colour and shape is there
      position           objects of the right colour and shape stand in the right place or relation
      attribute_binding  every shape is there in its own colour
    """
    fields, exact, layout = CHECKS[category]
    if exact and len(seen.objects) != len(claim.objects):
        return False
    if category is None and claim.background not in (None, seen.background):
        return False
    fits = [
        [s for s in seen.objects if all(getattr(o, f) in (None, getattr(s, f)) for f in fields)] for o in claim.objects
    ]
    return any(len(set(match)) == len(match) and (not layout or _laid_out(match, claim)) for match in product(*fits))


def _laid_out(match, claim):
    """Whether matched objects (one for each claimed) stand where the claim says."""
    if claim.place and place_of(match[0]) != claim.place:
        return False
    if claim.relation:
        word, i, j = claim.relation
        axis, sign = RELATIONS[word]
        d = (match[j].x - match[i].x, match[j].y - match[i].y)
        return d[axis] * sign > max(abs(d[1 - axis]), 0.1)
    return True


def check_scene(image, claim, category=None):
    """Whether the picture shows what the caption claims; `holds` says what each category looks at."""
    return holds(read_scene(image), claim, category)


def score_scenes(results):
    """Accuracy for each category present, and "overall", the mean over categories as in GenEval.

    results: iterable of (category, bool).
    """
    results = list(results)
    scores = {}
    for category in CATEGORIES:
        right = [ok for c, ok in results if c == category]
        if right:
            scores[category] = sum(right) / len(right)
    return scores | {"overall": sum(scores.values()) / len(scores)}
