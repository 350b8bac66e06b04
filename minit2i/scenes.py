"""scenes: generated images of coloured shapes with captions that are exactly true.

    python -m minit2i.scenes --out out/images --n 500     # captioned images in a folder, to train on like your own

The smallest data on which text-to-image can be judged by machine: a caption's claim is a `Scene` with the unsaid fields
None, and the oracle (experiments/oracle.py) reads an image and checks the claim.  The six categories are GenEval's
(arXiv:2310.11513), with shapes in place of COCO's objects.

Coordinates: x to the right and y downward as fractions of the image's width and height; r as a fraction of its short
side: a scene can be rendered in any proportion.  Centres lie on a grid of STEP, radii are one of two, and sizes,
strokes and stripes are multiples of 1/32: at 64 pixels an object has the same few 4x4 patches wherever it stands, and
many objects share them.  A small prior then learns quickly what captions mean, and it knows the patches of a HELD_OUT
pair from the colour's other shapes.
Everything is a pure function of its rng.
Measured on one core at 64x64: 0.07 ms to sample a scene, 0.02 ms to caption it, 0.08 ms to render it.
"""

import argparse
import math
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {  # at least 100 apart in RGB from each other and from each background: readable after a blur
    "red": (205, 15, 30),
    "orange": (250, 125, 10),
    "yellow": (250, 225, 30),
    "green": (30, 160, 60),
    "cyan": (30, 210, 225),
    "blue": (30, 60, 235),
    "purple": (150, 40, 190),
    "pink": (255, 60, 170),
}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (192, 192, 192), "black": (0, 0, 0)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": 1 / 8, "large": 3 / 16}  # r
STEP = 1 / 8  # centres lie on multiples of this
FILLS = ("filled", "outlined", "striped")  # the last two only when large: a small line is one pixel at 64 px
HELD_OUT = (  # never in training: right images of these show that colour and shape compose
    ("purple", "circle"),
    ("green", "square"),
    ("blue", "triangle"),
    ("red", "star"),
    ("orange", "cross"),
)

RELATIONS = {  # word: (axis, sign of the second centre minus the first along it)
    "left of": (0, 1),
    "right of": (0, -1),
    "above": (1, 1),
    "below": (1, -1),
}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
COPIES = {  # category: the possible numbers of objects of each kind
    "single_object": ([1],),
    "two_objects": ([1, 1],),
    "counting": ([2], [3], [2, 1]),
    "colors": ([1],),
    "position": ([1], [1, 1], [1, 1]),
    "attribute_binding": ([1, 1], [1, 1], [1, 1, 1]),
}
CATEGORIES = tuple(COPIES)
MIXTURE = ("single_object", "colors", "two_objects")  # training samples one of these uniformly
MIXTURE += 3 * ("counting",) + 3 * ("position",) + 3 * ("attribute_binding",)  # harder ones more often

GAP, MARGIN = 0.05, 0.03  # least distance between two objects, and from an object to the border
STROKE = 1 / 3  # width of an outline, in r
STRIPES = ((-1 / 3, -1 / 6), (1 / 6, 1 / 3))  # rows of the two stripes, in r from the centre


@dataclass(frozen=True)
class Object:
    """One shape.  In a claim, a field is None if the caption does not mention it."""

    color: str
    shape: str
    size: str | None = None
    fill: str | None = None
    x: float | None = None
    y: float | None = None
    r: float | None = None  # half the object's width, before the shape's own proportions (see `outline`)


@dataclass(frozen=True)
class Scene:
    """An image, or what a caption claims about one; `len(objects)` is claimed too.

    place: one of PLACES, for a single object.  relation: (word, i, j), "object i is <word> object j".
    """

    objects: tuple[Object, ...]
    background: str | None = None
    category: str | None = None
    place: str | None = None
    relation: tuple[str, int, int] | None = None


# --- sampling a scene ----------------------------------------------------------------------------------


def scene_at(seed, index, **kw):
    """The index-th scene of a seed, a pure function of both."""
    return random_scene(np.random.default_rng((seed, index)), **kw)


def random_scene(rng, category=None, held_out=False):
    """A random scene of 1 to 3 objects that lie at least GAP apart.

    category: one of CATEGORIES, or None for the training MIXTURE.
    held_out: False never has a HELD_OUT pair; True has at least one.
      single_object, colors   one object
      two_objects             two objects of different shape
      counting                two or three equal objects, or two equal ones and another
      position                two objects with a relation, or one with a place word
      attribute_binding       two or three objects, all of different shape and colour
    """
    category = category or _pick(rng, MIXTURE)
    if category not in CATEGORIES:
        raise ValueError(f"category {category!r} is not known; use one of {', '.join(CATEGORIES)}")
    copies = _pick(rng, COPIES[category])
    related = category == "position" and len(copies) == 2
    relation = (_pick(rng, tuple(RELATIONS)), 0, 1) if related else None

    looks = []
    for color, shape in _random_pairs(rng, len(copies), category, held_out):
        size = _pick(rng, tuple(SIZES))
        fill = _pick(rng, ("filled", "filled", "outlined", "striped")) if size == "large" else "filled"
        looks.append((color, shape, size, fill))
    looks = [look for look, n in zip(looks, copies) for _ in range(n)]
    radii = [SIZES[size] for _, _, size, _ in looks]
    place = _pick(rng, PLACES) if len(looks) == 1 else None
    centres = _random_centres(rng, radii, relation) if place is None else [_centre_at(place)]
    objects = tuple(Object(*look, float(x), float(y), float(r)) for look, (x, y), r in zip(looks, centres, radii))
    return Scene(objects, _pick(rng, tuple(BACKGROUNDS)), category, place, relation)


def _pick(rng, options):
    return options[rng.integers(len(options))]


def _random_pairs(rng, n, category, held_out):
    """n different (colour, shape) pairs; two_objects and attribute_binding need different shapes (and colours)."""
    while True:
        pairs = [(_pick(rng, tuple(COLORS)), _pick(rng, SHAPES)) for _ in range(n)]
        if held_out:
            pairs[rng.integers(n)] = _pick(rng, HELD_OUT)
        colors, shapes = ({p[k] for p in pairs} for k in (0, 1))
        if (
            len(set(pairs)) == n
            and (held_out or not any(p in HELD_OUT for p in pairs))
            and (len(shapes) == n or category not in ("two_objects", "attribute_binding"))
            and (len(colors) == n or category != "attribute_binding")
        ):
            return pairs


def _centre_at(place):
    """The centre (x, y) that a place word names: quarters of the image, which lie on the grid."""
    column = 1 if "left" in place else 3 if "right" in place else 2
    row = 1 if "top" in place else 3 if "bottom" in place else 2
    return column / 4, row / 4


def _random_centres(rng, radii, relation, tries=512):
    """Centres (n, 2), on the grid, of objects whose bounding boxes lie GAP apart, by rejection.

    With a relation they lie apart along its axis, and at most half as far along the other one.
    """
    r = np.array(radii)
    while True:
        low = np.ceil((r[:, None] + MARGIN) / STEP)
        xy = STEP * rng.integers(low, 1 / STEP - low, (tries, len(r), 2), endpoint=True)
        ok = np.ones(tries, bool)
        for i in range(len(r)):
            for j in range(i):
                ok &= np.abs(xy[:, i] - xy[:, j]).max(1) >= r[i] + r[j] + GAP
        if relation:
            axis, sign = RELATIONS[relation[0]]
            d = xy[:, relation[2]] - xy[:, relation[1]]  # (tries, 2)
            ok &= d[:, axis] * sign >= r.sum() + GAP
            ok &= np.abs(d[:, 1 - axis]) <= np.abs(d[:, axis]) / 2
        if ok.any():
            return xy[ok.argmax()]


# --- captioning it -------------------------------------------------------------------------------------


def caption(scene, rng):
    """A true caption of the scene -> (text, the claim it makes).

    Colour, shape, number, outlines, stripes and relations are always said, the place word always in the category
    "position"; otherwise size, "filled", place and background are each said about half the time.  The claim's objects
    keep the scene's order.
    """
    claimed = list(scene.objects)
    phrases = []
    looks = [(o.color, o.shape, o.size, o.fill) for o in scene.objects]
    for look in dict.fromkeys(looks):
        color, shape, size, fill = look
        mates = [i for i, other in enumerate(looks) if other == look]
        size = size if rng.random() < 0.5 else None
        fill = fill if fill != "filled" or rng.random() < 0.5 else None
        for i in mates:
            claimed[i] = Object(color, shape, size, fill)
        words = " ".join(w for w in (size, fill, color, shape) if w)
        phrases.append(_count(words, len(mates)))

    if scene.relation:
        text = _relate(phrases, scene.relation, rng)
    else:
        phrases = [phrases[i] for i in rng.permutation(len(phrases))]
        text = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]
    place = scene.place if scene.category == "position" or rng.random() < 0.5 else None
    if place:
        text += " " + next(words for words, p in _AT.items() if p == place)
    text = _pick(rng, ("", "", "", "a picture of ", "a drawing of ")) + text
    background = scene.background if rng.random() < 0.5 else None
    if background:
        ground = f"{background} background"
        text = _pick(rng, (f"{text} on a {ground}", f"{text}, {ground}", f"on a {ground}, {text}"))
    return text, replace(scene, objects=tuple(claimed), background=background, place=place)


_GROUND = f"({'|'.join(BACKGROUNDS)}) background"
_AT = {"on the left": "left", "on the right": "right", "at the top": "top", "at the bottom": "bottom"}
_AT |= {f"in the {place}": place for place in PLACES if " " in place or place == "center"}
_OBJECTS = rf"(an?|two|three) (?:({'|'.join(SIZES)}) )?(?:({'|'.join(FILLS)}) )?"
_OBJECTS += rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?:e?s)?"


def read_caption(text):
    """A caption -> its claim, as `caption` gave it up to the order of objects; None for any other text."""
    background = re.search(f"^on a {_GROUND}, |(?:,| on a) {_GROUND}$", text)
    if background:
        text = text[: background.start()] + text[background.end() :]
    text = re.sub("^a (picture|drawing) of ", "", text)
    place = re.search(f" ({'|'.join(_AT)})$", text)
    if place:
        text = text[: place.start()]
    relation = re.search(rf" (?:to the )?({'|'.join(RELATIONS)}) ", text)
    found = [re.fullmatch(_OBJECTS, part) for part in re.split(relation[0] if relation else ", | and ", text)]
    if not all(found):
        return None
    counts = [{"two": 2, "three": 3}.get(m[1], 1) for m in found]
    objects = tuple(Object(m[4], m[5], m[2], m[3]) for m, n in zip(found, counts) for _ in range(n))
    if relation and counts != [1, 1] or place and len(objects) > 1:
        return None
    ground = background and (background[1] or background[2])
    return Scene(objects, ground, place=place and _AT[place[1]], relation=relation and (relation[1], 0, 1))


def _count(words, n):
    """ "red circle" -> "a red circle", "two red circles"."""
    if n > 1:
        return ("two ", "three ")[n - 2] + words + ("es" if words.endswith("s") else "s")
    return ("an " if words[0] in "aeiou" else "a ") + words


def _relate(phrases, relation, rng):
    """Either side of the relation may come first: "A above B" or "B below A"."""
    word, i, j = relation
    if rng.random() < 0.5:
        i, j = j, i
        word = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[word]
    if word.endswith(" of"):
        word = _pick(rng, (word, f"to the {word}"))
    return f"{phrases[i]} {word} {phrases[j]}"


# --- rendering it --------------------------------------------------------------------------------------


@cache
def outline(shape, inset=0.0):
    """The shape's polygon (P, 2) around the centre of its bounding box, for r = 1; moved inward by `inset`.

    No shape reaches further than 1 along x or y.
    """
    if shape == "cross":
        a, b = 1 - inset, 0.5 - inset  # reach and half the width of an arm
        return np.array(
            [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
        )
    centre, inradius = 0.0, 1.0
    if shape == "circle":
        points = _ring(48, 1.0, 1.0)
    elif shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        points = np.array([(0, -1), (1, 1), (-1, 1)])
        inradius = 4 / (2 + 2 * math.hypot(1, 2))  # twice the area over the perimeter
        centre = 1 - inradius
    else:  # star: two rings of five; 0.1 centres its height at 0
        outer, inner, centre = 1.05, 0.59, 0.1
        points = _ring(10, outer, inner) + (0, centre)
        side = math.hypot(outer - inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5))
        inradius = outer * inner * math.sin(math.pi / 5) / side
    return (points - (0, centre)) * (1 - inset / inradius) + (0, centre)  # scaled about its incentre


def _ring(n, even, odd):
    """n points around the origin, the first at the top, at alternating radii: (n, 2)."""
    angle = 2 * np.pi * np.arange(n) / n
    radius = np.where(np.arange(n) % 2 == 0, even, odd)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def render(scene, height, width=None):
    """The scene as an RGB PIL image: drawn four times as large and averaged down, which antialiases the edges."""
    width = width or height
    up = 4
    image = Image.new("RGB", (width * up, height * up), BACKGROUNDS[scene.background])
    for o in scene.objects:
        r = o.r * min(height, width) * up
        centre = np.array([o.x * width, o.y * height]) * up
        corners = (outline(o.shape) * r + centre).ravel().tolist()
        ImageDraw.Draw(image).polygon(corners, fill=COLORS[o.color])
        if o.fill != "filled":
            corner = np.floor(centre - r).astype(int)
            hole = Image.new("1", (int(2 * r) + 2,) * 2)
            draw = ImageDraw.Draw(hole)
            draw.polygon((outline(o.shape, STROKE) * r + centre - corner).ravel().tolist(), fill=1)
            for top, bottom in STRIPES if o.fill == "striped" else ():
                y = centre[1] - corner[1]
                draw.rectangle((0, y + top * r, hole.width, y + bottom * r), fill=0)
            image.paste(BACKGROUNDS[scene.background], tuple(corner.tolist()), hole)
    return image.reduce(up)


# --- captioned images in a folder ------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Write generated images with captions: NAME.png and NAME.txt.")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--n", type=int, default=500, help="number of images [500]")
    parser.add_argument("--image_size", type=int, default=64, help="pixels of a side [64]")
    parser.add_argument("--seed", type=int, default=0, help="scenes of another seed are others [0]")
    args = parser.parse_args()
    if args.n < 1 or args.image_size < 8:
        parser.error(f"--n {args.n}, --image_size {args.image_size}: use at least 1 image, of at least 8 pixels")
    if args.out == "scenes":
        parser.error("--data scenes means scenes that are generated while training; name the folder otherwise")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"{out} is not empty; name a new folder")
    for i in range(args.n):
        scene = scene_at(args.seed, i)
        render(scene, args.image_size).save(out / f"{i:05d}.png")
        text, _ = caption(scene, np.random.default_rng((args.seed, i, 1)))
        (out / f"{i:05d}.txt").write_text(text + "\n")
    print(f"{out}: {args.n} images with captions")


if __name__ == "__main__":
    main()
