"""Taming's spatial condition: its maps against loops, its codes, and the part of it that each window sees."""

import numpy as np
import pytest
import torch
from conftest import PRIOR_FLAGS
from PIL import Image
from priors import GPT2, batch, big, build
from processes import call
from untrained import make_prior

import train_prior
from minit2i import sample_cli
from minit2i.checkpoint import load_vq
from minit2i.data import crop
from minit2i.gpt import views_of
from minit2i.papers.taming import MAPS, edges, every_place, lowres
from minit2i.sample import Pipeline, SampleConfig


def read(path, size):
    """An image's central crop (3, H, W) in [-1, 1]."""
    with Image.open(path) as im:
        return crop(im.convert("RGB"), size)


# --- what is given of the image ---


def test_edges_equal_a_loop():
    images = torch.rand(2, 3, 5, 6) * 2 - 1
    gray, found = images.mean(1), edges(images)
    assert found.shape == images.shape
    for b, r, c in np.ndindex(2, 5, 6):

        def at(i, j, b=b):
            return float(gray[b, min(max(i, 0), 4), min(max(j, 0), 5)])

        across = sum(w * (at(r + d, c + 1) - at(r + d, c - 1)) for d, w in ((-1, 1), (0, 2), (1, 1))) / 4
        down = sum(w * (at(r + 1, c + d) - at(r - 1, c + d)) for d, w in ((-1, 1), (0, 2), (1, 1))) / 4
        assert abs(float(found[b, 0, r, c]) - min(1, 2 * (across**2 + down**2) ** 0.5 - 1)) < 1e-5
    assert found[:, 0].equal(found[:, 2]) and (edges(torch.full((1, 3, 4, 4), 0.3)) == -1).all()


def test_a_low_resolution_keeps_what_is_large_and_loses_detail():
    """A slope over 64 pixels stays, stripes of one pixel become gray."""
    slope = torch.linspace(-0.5, 0.5, 64).expand(1, 3, 32, 64)
    assert (lowres(slope) - slope)[..., 8:-8].abs().max() < 0.02 and lowres(slope).shape == slope.shape
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(1, 3, 32, 32)
    assert lowres(stripes).abs().max() < 0.1 and lowres(torch.ones(1, 3, 4, 6)).shape == (1, 3, 4, 6)


# --- the condition ---


def test_the_condition_shares_table_and_positions_with_the_codes():
    model = build(condition="text,spatial", grid_h=2, grid_w=3)
    inputs, condition, positions = batch(model), model.conditions["spatial"], model.positions()
    torch.nn.init.normal_(condition.kind)
    assert model.layout == (5 + 6, 2, 3) and inputs["spatial"].shape == (3, 6)
    assert model.condition(inputs)[0][:, 5:].equal(model.embed_codes(inputs["spatial"]) + condition.kind)
    assert positions[5:11].equal(positions[11:]) and model.window_plan == "every_place"
    rotary = build(condition="text,spatial", pos="rotary", n_head=1)
    assert rotary.cos[5:11].equal(rotary.cos[11:])


@torch.no_grad()
@pytest.mark.parametrize("condition", ["text,spatial", "spatial"])
def test_every_code_reads_the_whole_condition(condition):
    model = big(build(condition=condition, **GPT2), 0.4).double()
    inputs = batch(model)
    logits = model.logits(inputs)[1]
    for n in range(6):
        other = inputs["spatial"].clone()
        other[:, n] = (other[:, n] + 1) % 7
        assert ((model.logits(inputs | {"spatial": other})[1] - logits).abs().amax(2) > 1e-9).all()


def test_one_image_is_conditioned_on_one_other():
    with pytest.raises(ValueError, match="is conditioned on one other image; leave one out"):
        build(condition="text,coarse,spatial", grid_h=4, grid_w=4)
    with pytest.raises(ValueError, match="spatial 'depth' is not known; use one of edges, lowres"):
        build(condition="text,spatial", spatial="depth")


@pytest.mark.parametrize("name", MAPS)
def test_the_condition_is_the_code_grid_of_the_map(name, images, vq_run, tmp_path):
    """As training caches it, of the same crops as the target's codes."""
    flags = f"--data {images} --vq {vq_run} --cache {tmp_path / 'cache'} {PRIOR_FLAGS} --mask causal --steps 2"
    call(train_prior, f"{flags} --condition text,spatial --spatial {name} --out {tmp_path / 'out'}")
    (train, _) = sorted((tmp_path / "cache").glob(f"*{name}*/codes.npy"), key=lambda path: -path.stat().st_size)
    vq, pixels = load_vq(vq_run), [read(path, (32, 32)) for path in images.glob("*.png")]
    expected = {tuple(vq.encode(MAPS[name](image[None])).flatten().tolist()) for image in pixels}
    cached = {tuple(codes.flatten().tolist()) for codes in np.load(train)[:, 0]}
    assert len(cached) > 10 and cached <= expected


# --- windows ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained prior of 4x4 codes and images of 32x32 pixels, given their edges."""
    return make_prior(tmp_path_factory.mktemp("models") / "edges", condition="text,spatial")


def test_a_window_sees_its_own_part_of_the_condition(folder, monkeypatch):
    pipeline, seen = Pipeline(folder), []
    generate = pipeline.model.generate

    def spy(given, *args, **how):
        seen.append(given["spatial"])
        return generate(given, *args, **how)

    monkeypatch.setattr(pipeline.model, "generate", spy)
    whole = torch.arange(2 * 5 * 9).view(2, 5, 9) % 32
    codes = pipeline.sample_codes(["a", "b"], SampleConfig(n=1), coarse=whole)
    plan = every_place((5, 9), (4, 4))
    assert codes.shape == (2, 5, 9) and len(seen) == len(plan) == 45
    for part, (top, left, _) in zip(seen, plan):
        assert part.view(2, 4, 4).equal(whole[:, top : top + 4, left : left + 4])


def test_the_command_line_takes_the_condition_from_the_image(folder, tmp_path, monkeypatch):
    """Of a picture as large as what is sampled, which may be wider than the grid; nothing of it is kept."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((64, 32)).save(tmp_path / "wide.png")
    seen, sample_codes = [], Pipeline.sample_codes

    def spy(self, prompts, cfg, known=None, coarse=None, *rest):
        seen.append((known, coarse))
        return sample_codes(self, prompts, cfg, known, coarse, *rest)

    monkeypatch.setattr(Pipeline, "sample_codes", spy)
    flags = ["--device", "cpu", "--model", str(folder), "--prompt", "a red circle", "--out", str(tmp_path / "x.png")]
    for size, side in (("32x64", (32, 64)), ("", (32, 32))):
        more = ["--image_size", size] if size else []
        sample_cli.main([*flags, "--image", str(tmp_path / "wide.png"), *more, "--n", "2"])
        (known, given), image = seen.pop(), read(tmp_path / "wide.png", side)
        expected = load_vq(folder / "vq").encode(edges(image[None]))
        assert given.equal(expected.expand(2, -1, -1)) and (known is None or (known == -1).all())
    with pytest.raises(ValueError, match="needs --image, an image whose edges it is conditioned on"):
        sample_cli.main(flags)
    with pytest.raises(ValueError, match="--inpaint_mask paints in --image, which this prior is conditioned on"):
        sample_cli.main([*flags, "--image", str(tmp_path / "wide.png"), "--inpaint_mask", str(tmp_path / "wide.png")])
    with pytest.raises(ValueError, match="does not enlarge images"):
        sample_cli.main([*flags, "--image", str(tmp_path / "wide.png"), "--enlarge", str(folder)])
    assert [view.key for view in views_of(Pipeline(folder).model.cfg)] == ["spatial"]
