"""The scene oracle: true renders pass, changed ones fail, and each category compares what GenEval compares."""

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from minit2i.experiments.oracle import check_scene, holds, read_scene, score_scenes
from minit2i.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    caption,
    read_caption,
    render,
    scene_at,
)


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file)


def noise(image):
    pixels = np.asarray(image) + np.random.default_rng(0).normal(0, 8, (image.height, image.width, 3))
    return pixels.round().clip(0, 255).astype(np.uint8)


def test_read_captions_claim_what_the_caption_claims():
    """A claim read from a caption holds for a scene exactly if the caption's own claim does."""
    seen = [scene_at(5, i, held_out=i % 3 == 0) for i in range(300)]
    n_true = 0
    for i, scene in enumerate(seen):
        text, claim = caption(scene, np.random.default_rng(i))
        read = read_caption(text)
        assert holds(scene, read), text
        # moved, on another ground, or another scene: mostly false claims
        flipped = replace(scene, objects=tuple(replace(o, x=1 - o.x, y=1 - o.y) for o in scene.objects))
        for other in (flipped, replace(scene, background="gray"), seen[i - 1]):
            assert holds(other, read) == holds(other, claim), text
            n_true += holds(other, claim)
    assert 100 < n_true < 800


@pytest.mark.parametrize(
    "size, corrupt",
    [
        ((64, 64), lambda image: image),
        ((64, 64), jpeg),
        ((64, 64), noise),
        ((96, 64), lambda image: image),
        ((64, 96), lambda image: image),
    ],
    ids=["clean", "jpeg", "noise", "tall", "wide"],
)
def test_true_renders_pass(size, corrupt):
    n, passed = 150 if size == (64, 64) else 60, 0
    for k in range(n):
        scene = scene_at(5, k, held_out=k % 3 == 0)
        image = corrupt(render(scene, *size))
        assert np.shape(image) == (*size, 3)
        passed += check_scene(image, caption(scene, np.random.default_rng(k))[1])
    assert passed >= 0.99 * n


def test_read_scene_recovers_every_field():
    for k in range(50):
        scene = scene_at(6, k)
        seen = read_scene(render(scene, 96))
        assert seen.background == scene.background and len(seen.objects) == len(scene.objects)
        for a, b in zip(*(sorted(s.objects, key=lambda o: (round(o.x, 1), o.y)) for s in (scene, seen))):
            assert (a.color, a.shape, a.size, a.fill) == (b.color, b.shape, b.size, b.fill)
            assert np.allclose((a.x, a.y, a.r), (b.x, b.y, b.r), atol=0.02)


def test_blank_and_noise_images_hold_no_objects():
    rng = np.random.default_rng(0)
    line = np.eye(40)[:, :, None].repeat(3, axis=2) * 255
    for image in (np.zeros((32, 32, 3)), rng.integers(0, 256, (64, 64, 3)), line):
        seen = read_scene(image.astype(np.uint8))
        assert not any(o.color and o.shape for o in seen.objects)


def another(options, not_this):
    return next(o for o in options if o != not_this)


def first(scene, **fields):
    return replace(scene, objects=(replace(scene.objects[0], **fields), *scene.objects[1:]))


def swapped(scene):
    a, b = scene.objects
    return replace(scene, objects=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))


WRONG = {
    "recoloured": lambda s: first(s, color=another(COLORS, s.objects[0].color)),
    "reshaped": lambda s: first(s, shape=another(SHAPES, s.objects[0].shape)),
    "outlined": lambda s: first(s, fill="outlined"),
    "striped": lambda s: first(s, fill="striped"),
    "resized": lambda s: first(s, size="small", r=SIZES["small"]),
    "one missing": lambda s: replace(s, objects=s.objects[:1]),
    "one extra": lambda s: replace(s, objects=(*s.objects, replace(s.objects[1], x=0.85, y=0.85))),
    "swapped": swapped,
    "one moved": lambda s: first(s, x=1 - s.objects[0].x),
    "background": lambda s: replace(s, background=another(BACKGROUNDS, s.background)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_changed_images_fail(wrong):
    """A claim that passes for its own image fails once one thing is changed."""
    looks = list(itertools.product(COLORS, SHAPES))
    for k in range(0, len(looks), 2):
        (color, shape), other = looks[k], looks[(k * 7 + 11) % len(looks)]
        scene = Scene(
            (
                Object(color, shape, "large", "filled", 0.22, 0.3, 0.18),
                Object(*other, "small", "filled", 0.7, 0.35, 0.11),
            ),
            list(BACKGROUNDS)[k % 3],
            relation=("left of", 0, 1),
        )
        assert check_scene(render(scene, 64), scene)
        assert not check_scene(render(WRONG[wrong](scene), 64), scene)


@pytest.mark.parametrize("place", ["left", "top"])
def test_place_words_are_compared(place):
    claim = Scene((Object("red", "circle"),), place=place)
    scenes = [
        Scene((Object("red", "circle", "small", "filled", x, y, 0.11),), "gray")
        for x, y in ((0.2, 0.5), (0.5, 0.2), (0.2, 0.2), (0.5, 0.5), (0.8, 0.5))
    ]
    passed = [check_scene(render(scene, 64), claim) for scene in scenes]
    assert passed == [place == "left", place == "top", False, False, False]


@pytest.mark.parametrize("category", [None, "counting"])
def test_equal_objects_each_need_a_match_of_their_own(category):
    """A red circle beside another object must not match a claim of two red circles."""
    circle = Object("red", "circle", "small", "filled", 0.25, 0.3, 0.11)
    two = Scene((circle, replace(circle, x=0.75)), "white")
    one = Scene((circle, replace(circle, x=0.75, color="green", shape="star")), "white")
    assert check_scene(render(two, 64), two, category)
    assert not check_scene(render(one, 64), two, category)


def test_categories_compare_what_geneval_compares():
    scene = Scene(
        (
            Object("red", "circle", "large", "filled", 0.25, 0.3, 0.18),
            Object("blue", "square", "small", "filled", 0.75, 0.3, 0.11),
        ),
        "white",
        relation=("left of", 0, 1),
    )
    a, b = scene.objects
    images = {
        "exchanged colours": replace(scene, objects=(replace(a, color="blue"), replace(b, color="red"))),
        "swapped": swapped(scene),
        "one extra": WRONG["one extra"](scene),
    }
    passed = {
        name: {c for c in CATEGORIES if check_scene(render(shown, 64), scene, c)} for name, shown in images.items()
    }
    assert passed == {
        "exchanged colours": {"single_object", "two_objects"},
        "swapped": set(CATEGORIES) - {"position"},
        "one extra": set(CATEGORIES) - {"single_object", "counting"},
    }


def test_overall_is_the_mean_over_categories_not_images():
    scores = score_scenes([("colors", True), ("colors", True), ("colors", True), ("counting", False)])
    assert scores == {"counting": 0.0, "colors": 1.0, "overall": 0.5}
