"""scenes: generated pictures of coloured shapes with captions that are exactly true.

The smallest data on which text-to-image can be judged by machine: what a caption claims is a `Scene`
with the unsaid fields None, and `metrics.check_scene` reads a picture and says whether the claim holds.
The six categories are GenEval's (arXiv:2310.11513), with shapes in place of COCO's objects.

Coordinates: x to the right and y downward as fractions of the picture's width and height; r as a fraction
of its short side, so one scene can be drawn in any proportion.  Centres lie on a grid of STEP, radii are one of two, and
sizes, strokes and stripes are multiples of 1/32: at 64 pixels an object has the same patches of 4 wherever it stands,
few of them, which many objects share.  So a small prior learns soon what captions mean, and the patches of a HELD_OUT
pair are ones that it knows from the colour's other shapes (README, "What is normal?").
Everything is a pure function of its rng.
Measured on one core at 64x64: 0.07 ms to draw a scene, 0.02 ms to say it, 0.08 ms to render it.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

COLORS = {  # every two at least 100 apart in RGB, and from each background: safe to read after a blur
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
HELD_OUT = (  # never drawn in training: right pictures of these show that colour and shape compose
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
CATEGORIES = ("single_object", "two_objects", "counting", "colors", "position", "attribute_binding")
MIXTURE = (  # training: one of these, evenly; more of what is learned late
    "single_object",
    "colors",
    "two_objects",
    *3 * ("counting",),
    *3 * ("position",),
    *3 * ("attribute_binding",),
)

GAP, MARGIN = 0.05, 0.03  # least distance between two objects, and from an object to the border
STROKE = 1 / 3  # width of an outline, in r
STRIPES = ((-1 / 3, -1 / 6), (1 / 6, 1 / 3))  # rows of the two stripes, in r from the centre


@dataclass(frozen=True)
class Object:
    """One shape.  In a claim, None is what the caption leaves unsaid."""

    color: str
    shape: str
    size: str | None = None
    fill: str | None = None
    x: float | None = None
    y: float | None = None
    r: float | None = None  # half the object's width, before the shape's own proportions (see `outline`)


@dataclass(frozen=True)
class Scene:
    """A picture, or what a caption claims of one; `len(objects)` is claimed too.

    place: one of PLACES, for a single object.  relation: (word, i, j), "object i is <word> object j".
    """

    objects: tuple[Object, ...]
    background: str | None = None
    category: str | None = None
    place: str | None = None
    relation: tuple[str, int, int] | None = None


# --- drawing a scene ---


def scene_at(seed, index, **kw):
    """The index-th scene of a seed: a pure function, so any worker can make any of them."""
    return draw_scene(np.random.default_rng((seed, index)), **kw)


def draw_scene(rng, category=None, held_out=False):
    """A random scene of 1 to 3 objects that lie at least GAP apart.

    category: one of CATEGORIES, or None for the training MIXTURE.
    held_out: False never draws a HELD_OUT pair; True draws at least one.
      single_object, colors   one object
      two_objects             two objects of different shape
      counting                two or three equal objects, or two equal ones and another
      position                two objects with a relation, or one with a place word
      attribute_binding       two or three objects, all of different shape and colour
    """
    category = category or _pick(rng, MIXTURE)
    if category not in CATEGORIES:
        raise ValueError(f"category {category!r} is not known; use one of {', '.join(CATEGORIES)}")
    copies = _pick(
        rng,
        {  # how many objects of each kind
            "single_object": ([1],),
            "colors": ([1],),
            "two_objects": ([1, 1],),
            "counting": ([2], [3], [2, 1]),
            "position": ([1], [1, 1], [1, 1]),
            "attribute_binding": ([1, 1], [1, 1], [1, 1, 1]),
        }[category],
    )
    related = category == "position" and len(copies) == 2
    relation = (_pick(rng, tuple(RELATIONS)), 0, 1) if related else None

    looks = []
    for color, shape in _draw_pairs(rng, len(copies), category, held_out):
        size = _pick(rng, tuple(SIZES))
        fill = _pick(rng, ("filled", "filled", "outlined", "striped")) if size == "large" else "filled"
        looks.append((color, shape, size, fill))
    looks = [look for look, n in zip(looks, copies) for _ in range(n)]
    radii = [SIZES[size] for _, _, size, _ in looks]
    place = _pick(rng, PLACES) if len(looks) == 1 else None
    centres = _draw_centres(rng, radii, relation) if place is None else [_draw_at(place)]
    objects = tuple(Object(*look, float(x), float(y), float(r)) for look, (x, y), r in zip(looks, centres, radii))
    return Scene(objects, _pick(rng, tuple(BACKGROUNDS)), category, place, relation)


def _pick(rng, options):
    return options[rng.integers(len(options))]


def _draw_pairs(rng, n, category, held_out):
    """n different (colour, shape) pairs, as different as the category asks."""
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


def _draw_at(place):
    """The centre (x, y) that a place word names: quarters of the picture, which lie on the grid."""
    column = 1 if "left" in place else 3 if "right" in place else 2
    row = 1 if "top" in place else 3 if "bottom" in place else 2
    return column / 4, row / 4


def _draw_centres(rng, radii, relation, tries=512):
    """Centres (n, 2), on the grid, of objects whose bounding boxes lie GAP apart, by rejection.

    With a relation they lie so along its axis, and at most half as far apart along the other one.
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


# --- saying it ---


def caption(scene, rng):
    """A true caption of the scene, and the claim it makes: `(str, Scene)`.

    Colour, shape, number, outlines, stripes and relations are always said, the place word always in the
    category "position"; otherwise size, "filled", place and background are each said about half the time.
    The claim's objects keep the scene's order.
    """
    claimed = list(scene.objects)
    phrases = []
    for look in dict.fromkeys((o.color, o.shape, o.size, o.fill) for o in scene.objects):
        color, shape, size, fill = look
        mates = [i for i, o in enumerate(scene.objects) if (o.color, o.shape, o.size, o.fill) == look]
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
        text = _pick(
            rng,
            (
                f"{text} on a {background} background",
                f"{text}, {background} background",
                f"on a {background} background, {text}",
            ),
        )
    return text, replace(scene, objects=tuple(claimed), background=background, place=place)


_GROUND = f"({'|'.join(BACKGROUNDS)}) background"
_AT = {"on the left": "left", "on the right": "right", "at the top": "top", "at the bottom": "bottom"}
_AT |= {f"in the {place}": place for place in PLACES if " " in place or place == "center"}
_OBJECTS = rf"(an?|two|three) (?:({'|'.join(SIZES)}) )?(?:({'|'.join(FILLS)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?:e?s)?"


def read_caption(text):
    """A caption -> the claim it makes (Scene), as `caption` gave it but for the order of objects; None if it is not of its kind."""
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
    return Scene(
        objects,
        background and (background[1] or background[2]),
        place=place and _AT[place[1]],
        relation=relation and (relation[1], 0, 1),
    )


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


# --- drawing it ---


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
    if shape == "circle":
        points, centre, inradius = _ring(48, 1.0, 1.0), 0.0, 1.0
    elif shape == "square":
        points, centre, inradius = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), 0.0, 1.0
    elif shape == "triangle":
        points = np.array([(0, -1), (1, 1), (-1, 1)])
        inradius = 4 / (2 + 2 * math.hypot(1, 2))  # twice the area over the perimeter
        centre = 1 - inradius
    else:  # star: two rings of five; 0.1 puts the middle of its height at 0
        outer, inner, centre = 1.05, 0.59, 0.1
        points = _ring(10, outer, inner) + (0, centre)
        side = math.hypot(outer - inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5))
        inradius = outer * inner * math.sin(math.pi / 5) / side
    return (points - (0, centre)) * (1 - inset / inradius) + (0, centre)  # shrunk about its incentre


def _ring(n, even, odd):
    """n points around the origin, the first at the top, at alternating radii: (n, 2)."""
    angle = 2 * np.pi * np.arange(n) / n
    radius = np.where(np.arange(n) % 2 == 0, even, odd)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def render(scene, height, width=None):
    """The scene as an RGB picture: drawn four times as large and averaged down, so edges are antialiased."""
    width = width or height
    up = 4
    picture = Image.new("RGB", (width * up, height * up), BACKGROUNDS[scene.background])
    for o in scene.objects:
        r = o.r * min(height, width) * up
        centre = np.array([o.x * width, o.y * height]) * up
        corners = (outline(o.shape) * r + centre).ravel().tolist()
        ImageDraw.Draw(picture).polygon(corners, fill=COLORS[o.color])
        if o.fill != "filled":
            corner = np.floor(centre - r).astype(int)
            hole = Image.new("1", (int(2 * r) + 2,) * 2)
            draw = ImageDraw.Draw(hole)
            draw.polygon((outline(o.shape, STROKE) * r + centre - corner).ravel().tolist(), fill=1)
            for top, bottom in STRIPES if o.fill == "striped" else ():
                y = centre[1] - corner[1]
                draw.rectangle((0, y + top * r, hole.width, y + bottom * r), fill=0)
            picture.paste(BACKGROUNDS[scene.background], tuple(corner.tolist()), hole)
    return picture.reduce(up)
