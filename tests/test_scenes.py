"""Scenes: the same from the same seed, held-out pairs kept out, captions true, and the oracle not fooled."""

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from minit2i.oracle import check_scene, holds, read_scene, score_scenes
from minit2i.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    FILLS,
    GAP,
    HELD_OUT,
    SHAPES,
    SIZES,
    STEP,
    Object,
    Scene,
    caption,
    draw_scene,
    read_caption,
    render,
    scene_at,
)


def pairs(scene):
    return [(o.color, o.shape) for o in scene.objects]


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file)


def noise(image):
    pixels = np.asarray(image) + np.random.default_rng(0).normal(0, 8, (image.height, image.width, 3))
    return pixels.round().clip(0, 255).astype(np.uint8)


# --- drawing and saying ---


def test_centres_lie_on_the_grid():
    xy = np.array([(o.x, o.y) for k in range(300) for o in scene_at(0, k).objects])
    assert np.allclose(xy / STEP, (xy / STEP).round()) and len(np.unique(xy)) == 5


def test_a_scene_is_a_pure_function_of_seed_and_index():
    assert scene_at(3, 7) == scene_at(3, 7)
    assert len({scene_at(seed, index) for seed in range(5) for index in range(20)}) == 100
    captions = [caption(scene_at(3, 7), np.random.default_rng(k))[0] for k in (0, 0, 1, 2, 3)]
    assert captions[0] == captions[1] and len(set(captions)) > 1
    assert render(scene_at(3, 7), 32).tobytes() == render(scene_at(3, 7), 32).tobytes()


def test_held_out_pairs_are_kept_out_of_training_and_in_the_test():
    """One per shape, five colours: else a shape could be learned as a colour, or a colour never be seen."""
    assert {s for _, s in HELD_OUT} == set(SHAPES) and len({c for c, _ in HELD_OUT}) == 5
    seen = {p for k in range(2000) for p in pairs(scene_at(0, k))}
    assert seen == set(itertools.product(COLORS, SHAPES)) - set(HELD_OUT)
    assert all(set(pairs(scene_at(0, k, held_out=True))) & set(HELD_OUT) for k in range(500))


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_draws_what_it_says(category, held_out):
    for k in range(60):
        scene = scene_at(1, k, category=category, held_out=held_out)
        text, claim = caption(scene, np.random.default_rng(k))
        n = len(scene.objects)
        assert scene.category == claim.category == category
        assert bool(set(pairs(scene)) & set(HELD_OUT)) == held_out
        assert all(o.color in text and o.shape in text for o in scene.objects)
        if category in ("single_object", "colors"):
            assert n == 1
        elif category == "two_objects":
            assert n == 2 and len({o.shape for o in scene.objects}) == 2
        elif category == "counting":
            assert n > len(set(pairs(scene))) and ("two " in text or "three " in text)
        elif category == "position":
            assert claim.place if n == 1 else claim.relation
        else:
            assert len({o.shape for o in scene.objects}) == len({o.color for o in scene.objects}) == n > 1


def test_unknown_category_is_refused():
    with pytest.raises(ValueError, match="colours.*use one of"):
        draw_scene(np.random.default_rng(0), category="colours")


def test_objects_lie_apart_and_inside():
    for k in range(1000):
        objects = scene_at(2, k).objects
        for a, b in itertools.combinations(objects, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.r + b.r + GAP - 1e-9
        assert all(o.r <= min(o.x, o.y, 1 - o.x, 1 - o.y) for o in objects)
        assert all(o.fill == "filled" or o.size == "large" for o in objects)


def test_the_claim_is_what_the_words_say():
    """Each word of a kind is in the caption exactly if the claim holds it: nothing slips in or out unsaid."""
    for k in range(500):
        scene = scene_at(4, k)
        text, claim = caption(scene, np.random.default_rng(k))
        words = set(text.replace(",", "").split())
        assert len(text.split()) <= 24
        assert words & set(SIZES) == {o.size for o in claim.objects} - {None}
        assert words & set(FILLS) == {o.fill for o in claim.objects} - {None}
        assert words & set(BACKGROUNDS) == {claim.background} - {None}
        assert set((claim.place or "").split()) <= words
        assert all(
            said in (None, true)
            for s, c in zip(scene.objects, claim.objects)
            for said, true in zip(vars(c).values(), vars(s).values())
        )


def test_captions_are_read_back():
    """What is read from a caption holds of a scene just where the caption's own claim does."""
    seen = [scene_at(5, i, held_out=i % 3 == 0) for i in range(300)]
    n_true = 0
    for i, scene in enumerate(seen):
        text, claim = caption(scene, np.random.default_rng(i))
        read = read_caption(text)
        assert holds(scene, read), text
        # moved, turned, or another: mostly false claims
        flipped = replace(scene, objects=tuple(replace(o, x=1 - o.x, y=1 - o.y) for o in scene.objects))
        for other in (flipped, replace(scene, background="gray"), seen[i - 1]):
            assert holds(other, read) == holds(other, claim), text
            n_true += holds(other, claim)
    assert 100 < n_true < 800


@pytest.mark.parametrize(
    "text",
    (
        "",
        "a red",
        "green ideas sleep",
        "a mauve circle",
        "two red circles above a blue star",
        "a red circle and",
        "a red circle a red circle",
    ),
)
def test_what_is_no_caption_is_not_read(text):
    assert read_caption(text) is None


def test_the_models_own_prompt_is_one_of_the_captions():
    scene = Scene(
        (
            Object("red", "circle", "large", "filled", 0.5, 0.3, 0.18),
            Object("blue", "square", "small", "filled", 0.5, 0.8, 0.11),
        ),
        "white",
        "position",
        relation=("above", 0, 1),
    )
    said = {caption(scene, np.random.default_rng(k))[0] for k in range(1000)}
    assert "a large red circle above a small blue square" in said
    assert "a small blue square below a large red circle" in said


# --- reading ---


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
def test_true_pictures_pass(size, corrupt):
    n, passed = 300 if size == (64, 64) else 100, 0
    for k in range(n):
        scene = scene_at(5, k, held_out=k % 3 == 0)
        image = corrupt(render(scene, *size))
        assert np.shape(image) == (*size, 3)
        passed += check_scene(image, caption(scene, np.random.default_rng(k))[1])
    assert passed >= 0.99 * n


def test_read_scene_gives_back_every_field():
    for k in range(50):
        scene = scene_at(6, k)
        seen = read_scene(render(scene, 96))
        assert seen.background == scene.background and len(seen.objects) == len(scene.objects)
        for a, b in zip(*(sorted(s.objects, key=lambda o: (round(o.x, 1), o.y)) for s in (scene, seen))):
            assert (a.color, a.shape, a.size, a.fill) == (b.color, b.shape, b.size, b.fill)
            assert np.allclose((a.x, a.y, a.r), (b.x, b.y, b.r), atol=0.02)


def test_pictures_of_nothing_are_read_without_complaint():
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
def test_wrong_pictures_fail(wrong):
    """A claim that passes for its own picture fails once one thing is changed."""
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
def test_a_place_word_is_looked_at(place):
    claim = Scene((Object("red", "circle"),), place=place)
    scenes = [
        Scene((Object("red", "circle", "small", "filled", x, y, 0.11),), "gray")
        for x, y in ((0.2, 0.5), (0.5, 0.2), (0.2, 0.2), (0.5, 0.5), (0.8, 0.5))
    ]
    passed = [check_scene(render(scene, 64), claim) for scene in scenes]
    assert passed == [place == "left", place == "top", False, False, False]


@pytest.mark.parametrize("category", [None, "counting"])
def test_equal_objects_each_need_one_of_their_own(category):
    """Two red circles are not one red circle that is matched twice beside something else."""
    circle = Object("red", "circle", "small", "filled", 0.25, 0.3, 0.11)
    two = Scene((circle, replace(circle, x=0.75)), "white")
    one = Scene((circle, replace(circle, x=0.75, color="green", shape="star")), "white")
    assert check_scene(render(two, 64), two, category)
    assert not check_scene(render(one, 64), two, category)


def test_categories_look_at_what_geneval_looks_at():
    scene = Scene(
        (
            Object("red", "circle", "large", "filled", 0.25, 0.3, 0.18),
            Object("blue", "square", "small", "filled", 0.75, 0.3, 0.11),
        ),
        "white",
        relation=("left of", 0, 1),
    )
    a, b = scene.objects
    pictures = {
        "exchanged colours": replace(scene, objects=(replace(a, color="blue"), replace(b, color="red"))),
        "swapped": swapped(scene),
        "one extra": WRONG["one extra"](scene),
    }
    passed = {
        name: {c for c in CATEGORIES if check_scene(render(picture, 64), scene, c)}
        for name, picture in pictures.items()
    }
    assert passed == {
        "exchanged colours": {"single_object", "two_objects"},
        "swapped": set(CATEGORIES) - {"position"},
        "one extra": set(CATEGORIES) - {"single_object", "counting"},
    }


def test_overall_is_the_mean_over_categories_not_over_pictures():
    scores = score_scenes([("colors", True), ("colors", True), ("colors", True), ("counting", False)])
    assert scores == {"counting": 0.0, "colors": 1.0, "overall": 0.5}
