"""Scenes: reproducible, without the held-out pairs, with true captions that can be parsed."""

import itertools

import numpy as np
import pytest

from minit2i import scenes
from minit2i.data import Folder
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
    random_scene,
    read_caption,
    render,
    scene_at,
)


def pairs(scene):
    return [(o.color, o.shape) for o in scene.objects]


# --- sampling and captioning ---


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
def test_every_category_has_what_it_says(category, held_out):
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
        random_scene(np.random.default_rng(0), category="colours")


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


def test_scenes_are_written_as_captioned_images(tmp_path, monkeypatch, capsys):
    """A folder to train on like one's own images."""
    monkeypatch.setattr("sys.argv", ["scenes", "--out", str(tmp_path / "a" / "b"), "--n", "3", "--image_size", "40"])
    scenes.main()
    source = Folder(tmp_path / "a" / "b")
    assert len(source) == 3 and source.image(2).size == (40, 40)
    assert all(read_caption(source.captions(i)[0]) for i in range(3))
    with pytest.raises(SystemExit):
        scenes.main()  # they might be another's
    assert "is not empty; name a new folder" in capsys.readouterr().err
