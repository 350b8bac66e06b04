"""The evaluation's commands, and the records that say how their figures came about."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from processes import call
from untrained import make_prior, make_vq

from minit2i.experiments import evaluate
from minit2i.experiments.fid import Latents, frechet, image_set, moments
from minit2i.metrics import psnr, sharpness, ssim
from minit2i.plot import save_image, to_pil
from minit2i.sample import Pipeline, SampleConfig
from minit2i.scenes import caption, render, scene_at
from minit2i.vq import shrink


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    return make_vq(tmp_path_factory.mktemp("vq"))


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return make_prior(tmp_path_factory.mktemp("prior"), grid_h=3)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of six captioned scenes, as sample.py writes them; the second has a damaged file."""
    root = tmp_path_factory.mktemp("sets")
    for i in range(12):
        path = root / "ab"[i % 2] / f"{i}.png"
        save_image(path, render(scene_at(0, i), 24, 32), model="0123", settings="{}")
        path.with_suffix(".txt").write_text(caption(scene_at(0, i), np.random.default_rng(i))[0])
    (root / "b" / "x.png").write_bytes(b"no image")
    return root


def record_of(tmp_path, flags):
    call(evaluate, f"{flags} --device cpu --out {tmp_path / 'record.json'}")
    return json.loads((tmp_path / "record.json").read_text())


# --- tokenizers and sets of images ---


def test_a_tokenizers_record(vq, sets, tmp_path):
    flags = f"--features {vq} --cache {tmp_path / 'cache'} --workers 0 --show {tmp_path / 'grid.png'}"
    record = record_of(tmp_path, f"tokenizer --model {vq} --images {sets / 'b'} {flags}")
    assert (
        record["settings"]["image_size"] == "24x32" and len(record["model"]) == 16 and "tokenizer" in record["command"]
    )
    extract, crops = Latents(vq, torch.device("cpu")), image_set(str(sets / "b"), "24x32")
    images = torch.stack([image for _, image in crops if not isinstance(image, str)])
    again, figures = extract.vq.decode(extract.vq.encode(images)), record["figures"]
    assert np.isclose(figures["psnr"], psnr(again, images).mean()) and figures["n"] == 6
    assert np.isclose(figures["ssim"], ssim(again, images).mean())
    assert np.isclose(figures["sharpness"], sharpness(again).sum() / sharpness(images).sum())
    (m1, c1), (m2, c2) = (moments(extract(x).numpy()) for x in (images, again))
    assert np.isclose(figures["rFID"], frechet(m1, c1, m2, c2), rtol=1e-4)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (420, 4 * 26 - 2 + 150) and "6 images, PSNR" in grid.text["text"]


def test_a_tokenizer_that_enlarges_is_measured_at_the_size_it_returns(sets, tmp_path):
    vq = make_vq(tmp_path / "x2", image_size="8x16", upsampler="wdsr", upscale=2, sr_ch=8, sr_blocks=1)
    record = record_of(tmp_path, f"tokenizer --model {vq} --images {sets / 'a'} --workers 0")
    assert record["settings"]["image_size"] == "16x32" and 0 < record["figures"]["psnr"] < 60
    assert "rFID" not in record["figures"]


def test_fids_record_names_the_model_that_sampled(vq, sets, tmp_path, capsys):
    common = f"--features {vq} --cache {tmp_path / 'cache'} --workers 0 --radii 0,1"
    record = record_of(tmp_path, f"fid --real {sets / 'a'} --fake {sets / 'b'} {common}")
    assert record["sampled_by"] == {"model": "0123", "settings": "{}"} and record["settings"]["image_size"] == "24x32"
    assert {"FID-0", "FID-1"} <= set(record["figures"]) and "encoder" in record["figures"]["features"]
    assert "too high" in capsys.readouterr().out  # 6 images, 8 features
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 1 images can be read, 0.png"):
        call(evaluate, f"fid --real {sets / 'a'} --fake {tmp_path} {common} --device cpu")


# --- priors ---


def test_scenes_are_counted_by_category_and_split(prior, tmp_path, monkeypatch):
    """An oracle that sees red: accuracy is then the share of red images."""
    monkeypatch.setattr(evaluate, "check_scene", lambda image, claim, category: "red" in str(claim))
    monkeypatch.setattr(evaluate, "seconds_per_image", lambda *_: 0.5)
    record = record_of(tmp_path, f"scenes --model {prior} --prompts_per_category 3 --top_k 5")
    prompts = {held: [evaluate.scene_prompts("colors", held, 3)] for held in (False, True)}
    for split, held in (("seen", False), ("held_out", True), ("tokenizer", False)):
        expected = sum("red" in str(claim) for _, claim, _ in prompts[held][0]) / 3
        assert record["figures"][split]["colors"] == pytest.approx(expected)
    assert record["sampling"]["top_k"] == 5 and record["sampling"]["n"] == 1 and record["seconds_per_image"] == 0.5


def test_the_best_of_many_scenes_by_each_score(monkeypatch):
    """Images 2 and 5 of seven are right: the score decides whether they are found, and among how many."""

    class Fake:
        def sample_codes(self, prompts, cfg, seeds):
            return torch.arange(cfg.n)

        def decode(self, codes):
            return codes

    monkeypatch.setattr(evaluate, "to_pil", int)
    monkeypatch.setattr(evaluate, "check_scene", lambda image, claim, category: image in (2, 5))
    monkeypatch.setattr(evaluate, "score_codes", lambda pipe, judge, prompt, codes: judge(codes).float())
    judges = {"last": torch.neg, "first": torch.abs, "third": lambda codes: (codes - 2).abs()}
    table = evaluate.reranking(Fake(), SampleConfig(n=7), judges, n=2)
    assert table == {
        "any": {1: 0.0, 4: 1.0},
        "last": {1: 0.0, 4: 0.0},
        "first": {1: 0.0, 4: 0.0},
        "third": {1: 0.0, 4: 1.0},
    }


def test_the_rerank_command_takes_likelihood_captioners_and_towers(prior, tmp_path):
    captioner = make_prior(tmp_path / "captioner", grid_h=3, model="captioner")
    towers = make_prior(tmp_path / "towers", grid_h=3, model="towers", n_encoder=1)
    flags = f"--model {prior} --judges {captioner},{towers} --n 2 --prompts_per_category 1"
    figures = record_of(tmp_path, f"rerank {flags}")["figures"]
    assert set(figures) == {"any", "likelihood", str(captioner), str(towers)} and set(figures["any"]) == {"1"}
    masked = make_prior(tmp_path / "masked", grid_h=3, model="masked")
    figures = record_of(tmp_path, f"rerank --model {masked} --n 1 --prompts_per_category 1 --steps 2")["figures"]
    assert set(figures) == {"any"}, "a masked prior gives no likelihood"


def test_true_captions_count():
    class Fake:
        size = (32, 32)

        def __init__(self, shift):
            said = [text for c in evaluate.CATEGORIES for text, *_ in evaluate.scene_prompts(c, False, 3)]
            self.said = iter(said[shift:] + said[:shift])

        def captions(self, images, cfg):
            return [[next(self.said)] for _ in images]

    rows = evaluate.scene_captions(Fake(0), SampleConfig(), 3)
    assert len(rows) == 18 and all(true for _, true, _ in rows)
    assert sum(true for _, true, _ in evaluate.scene_captions(Fake(1), SampleConfig(), 3)) < 4


def test_the_captions_command_reads_scenes_with_a_captioner(tmp_path):
    captioner = make_prior(tmp_path / "captioner", grid_h=3, model="captioner")
    record = record_of(tmp_path, f"captions --model {captioner} --prompts_per_category 1 --temperature 0")
    assert set(record["figures"]) == {*evaluate.CATEGORIES, "overall"}


def test_enlarged_images_are_measured_against_the_originals(sets, tmp_path):
    larger = make_prior(tmp_path / "larger", condition="text,coarse", shrink=2)
    flags = f"--images {sets / 'a'} --n_images 3 --show {tmp_path / 'x.png'}"
    figures = record_of(tmp_path, f"enlarge --model {larger} {flags} --cfg_scale 1")["figures"]
    assert set(figures) == {"bicubic", "sampled", "tokenizer", "n"} and figures["n"] == 3
    assert Image.open(tmp_path / "x.png").size == (3 * 34 - 2, 4 * 34 - 2)
    pipe = Pipeline(larger)
    images = torch.stack(evaluate.captioned(evaluate.open_source(str(sets / "a"), None), range(3), pipe)[0])
    again = pipe.vq.decode(pipe.vq.encode(images))
    assert figures["tokenizer"]["psnr"] == pytest.approx(float(psnr(again, images).mean()), abs=1e-4)
    small = torch.nn.functional.interpolate(pipe.vq.decode(pipe.vq.encode(shrink(images, 2))), (32, 32), mode="bicubic")
    assert figures["bicubic"]["psnr"] == pytest.approx(float(psnr(small.clamp(-1, 1), images).mean()), abs=1e-4)


def test_finer_codes_are_measured_against_the_coarser_tokenizer(sets, tmp_path):
    """Muse: "bicubic" is what the coarser tokenizer gives back of the image, at the same size or a smaller one."""
    coarse = make_vq(tmp_path / "coarse", seed=5)
    settings = dict(model="masked", condition="text,coarse_codes", coarse_vq=str(coarse), coarse_ratio=2, n_layer=1)
    larger = make_prior(tmp_path / "larger", grid_h=6, grid_w=8, vq=dict(stride=4), **settings)
    shutil.copytree(coarse, larger / "coarse_vq")
    figures = record_of(tmp_path, f"enlarge --model {larger} --images {sets / 'a'} --n_images 3 --enlarge_steps 2")[
        "figures"
    ]
    images = torch.stack(evaluate.captioned(evaluate.open_source(str(sets / "a"), None), range(3), Pipeline(larger))[0])
    vq = Pipeline(larger).view_vq
    assert images.shape == (3, 3, 24, 32)
    assert figures["bicubic"]["psnr"] == pytest.approx(
        float(psnr(vq.decode(vq.encode(images)), images).mean()), abs=1e-2
    )
    assert figures["tokenizer"]["psnr"] != figures["bicubic"]["psnr"] and figures["n"] == 3


def test_recall_finds_the_captions_own_image(prior, sets, tmp_path, monkeypatch, capsys):
    """A pipeline that returns the captions' own images has all of them; one that returns the next ones has none."""
    pipe, folder = Pipeline(prior), str(sets / "a")
    images, captions = evaluate.captioned(evaluate.open_source(folder, None), range(6), pipe)
    for shift, rate in ((0, 1.0), (1, 0.0)):
        fake = torch.stack(images).roll(shift, 0)

        class Fake:
            vq, device, config, size = pipe.vq, pipe.device, pipe.config, pipe.size

            def __call__(self, prompts, cfg, fake=fake):
                return [(p, image[None]) for p, image in zip(prompts, fake)]

        figures, pairs = evaluate.recall(Fake(), SampleConfig(), folder, [str(sets / "b")])
        assert (figures["own"], figures["n"], figures["images"]) == (rate, 6, 12) and len(pairs) == 6
    assert "skipped x.png" in capsys.readouterr().out
    figures, _ = evaluate.recall(Fake(), SampleConfig(), folder, ignore=".*")
    assert figures["concept"] == 1.0 > figures["own"], "what --ignore matches does not count"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("scenes --n 8", "--n 8 is a setting of rerank"),
        ("captions", "needs a prior of --model captioner"),
        ("scenes --choice_noise 1", "--choice_noise is not a sampling setting of --model gpt"),
        ("enlarge --images scenes", "does not enlarge"),
        ("recall --prompts {sets}/a --ignore (", "is not a regular expression"),
        ("recall --prompts {tmp}/empty", "no images in .*empty"),
        ("recall --prompts {tmp}/bad", "none of the 1 images .* x.png for one"),
    ],
)
def test_commands_that_are_refused(flags, message, prior, sets, tmp_path):
    (tmp_path / "empty").mkdir(), (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=message):
        call(evaluate, f"{flags.format(sets=sets, tmp=tmp_path)} --model {prior} --device cpu")


def test_rendered_scenes_have_the_priors_size(prior):
    images = evaluate.rendered([scene_at(0, i) for i in range(2)], Pipeline(prior))
    assert images.shape == (2, 3, 24, 32) and to_pil(images[0]).size == (32, 24)
