"""Measures: SSIM, FID and IS against loops and closed forms; features made once; records that say how they came about."""

import json
import sys
from dataclasses import asdict
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from scipy import linalg, ndimage

from minit2i import fid as sets
from minit2i import metrics
from minit2i.checkpoint import save_model
from minit2i.fid import Inception, Latents, features, fid, frechet, inception_score, moments, pick_features, picture_set
from minit2i.metrics import psnr, ssim
from minit2i.sample import SampleConfig
from minit2i.scenes import render, scene_at
from minit2i.train import save_image
from minit2i.vq import VQ, VQConfig
from test_train import call

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    """A tokenizer's folder, untrained."""
    torch.manual_seed(0)
    cfg = VQConfig(stride=8, ch=8, n_res=1, n_codes=32, code_dim=4)
    folder = tmp_path_factory.mktemp("vq")
    save_model(folder, VQ(cfg).state_dict(), {"kind": "vq", "model": asdict(cfg), "data": {"size": "24x32"}})
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders of six scenes; the second is as sample.py would write it, and one of its files is damaged."""
    root = tmp_path_factory.mktemp("sets")
    for i in range(12):
        save_image(root / "ab"[i % 2] / f"{i}.png", render(scene_at(0, i), 24, 32), model="0123", settings="{}")
    (root / "b" / "x.png").write_bytes(b"no picture")
    return root


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["metrics", *map(str, argv)])
    metrics.main()


# --- pictures against pictures ---


def test_ssim_equals_a_loop_over_windows():
    a, b = torch.rand(2, 2, 3, 13, 12) * 2 - 1
    g = [np.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    w = np.outer(g, g) / np.sum(np.outer(g, g))
    for k in range(2):
        values = []
        for c in range(3):
            for y in range(3):
                for x in range(2):
                    p, q = (t[k, c, y : y + 11, x : x + 11].double().numpy() for t in (a, b))
                    mp, mq = (w * p).sum(), (w * q).sum()
                    vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
                    cov = (w * (p - mp) * (q - mq)).sum()
                    values.append((2 * mp * mq + 4e-4) * (2 * cov + 36e-4) / (mp**2 + mq**2 + 4e-4) / (vp + vq + 36e-4))
        assert abs(float(ssim(a, b)[k]) - np.mean(values)) < 1e-5
    assert torch.allclose(ssim(a, a), torch.ones(2))
    with pytest.raises(ValueError, match="10x12 are too small"):
        ssim(a[..., :10, :], b[..., :10, :])


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 4, 4)
    assert torch.allclose(psnr(a, a + 0.2), torch.full((2,), 20.0))  # range 2, error 0.2: a tenth


# --- distances ---


def test_moments_in_parts_equal_numpys():
    x = (RNG.normal(size=(57, 5)) + 1e4).astype(np.float32)  # a mean that would eat float32's digits
    for part in (1, 10, 57, 100):
        mean, cov = moments(x, part)
        assert np.allclose(mean, x.astype(np.float64).mean(0), rtol=1e-14)
        assert np.allclose(cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9)


def test_frechet_distance_of_gaussians_in_closed_form():
    """With axes in common it is |m1 - m2|^2 + the squared differences of the standard deviations."""
    s, t, m = RNG.uniform(0.1, 2, 6), RNG.uniform(0.1, 2, 6), RNG.normal(size=6)
    axes = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    c1, c2 = (axes @ np.diag(v**2) @ axes.T for v in (s, t))
    assert np.isclose(frechet(m, c1, np.zeros(6), c2), (m**2).sum() + ((s - t) ** 2).sum())


def test_frechet_distance_equals_scipys_matrix_root():
    x, y = RNG.normal(size=(80, 20)) @ RNG.normal(size=(20, 20)), RNG.normal(size=(90, 20)) + 0.3
    (m1, c1), (m2, c2) = moments(x), moments(y)
    reference = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert np.isclose(frechet(m1, c1, m2, c2), reference, rtol=1e-9)


def test_frechet_distance_with_fewer_pictures_than_features():
    """tr sqrt(C1 C2) is then the nuclear norm of the product of the centred sets, which needs no root."""
    x, y = RNG.normal(size=(7, 30)), RNG.normal(size=(9, 30)) + 1
    (m1, c1), (m2, c2) = moments(x), moments(y)
    cross = np.linalg.norm((x - m1) @ (y - m2).T, "nuc") / np.sqrt(6 * 8)
    assert np.isclose(frechet(m1, c1, m2, c2), ((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * cross, rtol=1e-6)
    assert abs(frechet(m1, c1, m1, c1)) < 1e-12


def test_inception_score_equals_a_loop():
    logits = torch.from_numpy(RNG.normal(size=(23, 7)) * 2)
    scores = []
    for k in range(4):
        p = logits.softmax(1).numpy()[k * 23 // 4 : (k + 1) * 23 // 4]
        kl = [sum(row[c] * np.log(row[c] / p.mean(0)[c]) for c in range(7)) for row in p]
        scores.append(np.exp(np.mean(kl)))
    ours = inception_score(lambda rows: torch.as_tensor(rows).softmax(1), logits.numpy(), splits=4, part=3)
    assert np.allclose(ours, (np.mean(scores), np.std(scores)))
    sure = np.tile(np.eye(7), (10, 1))  # every class as often, each surely: as many as there are
    assert np.allclose(inception_score(torch.as_tensor, sure, splits=1), (7, 0))


# --- features ---


def test_inceptions_features_are_its_pooled_layer_and_give_its_classes(tmp_path):
    net = torchvision.models.inception_v3(weights=None, transform_input=False, init_weights=False).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    extract, pooled = Inception(tmp_path / "w.safetensors", torch.device("cpu")), []
    net.avgpool.register_forward_hook(lambda module, args, out: pooled.append(out.flatten(1)))
    image = torch.rand(1, 3, 299, 299) * 2 - 1
    with torch.no_grad():
        logits = net(image)
    assert torch.allclose(extract(image), pooled[0], atol=1e-5) and pooled[0].shape == (1, extract.width)
    assert torch.allclose(extract.probabilities(pooled[0].numpy()).float(), logits.softmax(1), atol=1e-6)


def test_latents_are_mean_and_spread_over_the_grid(vq):
    extract, image = Latents(vq, torch.device("cpu")), torch.rand(2, 3, 24, 32)
    z = extract.vq.latents(image).view(2, 12, -1).detach()
    assert torch.allclose(extract(image), torch.cat([z.mean(1), z.var(1, unbiased=False).sqrt()], 1), atol=1e-6)
    assert extract(image).shape[1] == extract.width


def test_features_are_made_once_for_each_set_and_blur(vq, pictures, tmp_path):
    extract, seen = Latents(vq, torch.device("cpu")), []

    def watched(images):
        seen.append(images)
        return extract(images)

    watched.hash, watched.width, watched.name = extract.hash, extract.width, extract.name
    real, fake = (picture_set(str(pictures / k), "24x32") for k in "ab")
    figures = fid(watched, real, fake, tmp_path, (0, 2))
    assert len(seen) == 4 and figures["n_real"] == figures["n_fake"] == 6  # the damaged one is left out
    assert np.allclose(seen[2][1, 2], ndimage.gaussian_filter(seen[0][1, 2].numpy(), 2), atol=1e-6)
    assert fid(watched, real, fake, tmp_path, (0, 2)) == figures and len(seen) == 4
    rows = [torch.cat([extract(seen[k]) for k in (i,)]).double().numpy() for i in range(4)]
    (m1, c1), (m2, c2) = moments(rows[0]), moments(rows[1])
    assert np.isclose(figures["FID-0"], frechet(m1, c1, m2, c2))
    assert abs(fid(watched, real, real, tmp_path)["FID-0"]) < 1e-5 < figures["FID-0"]


def test_a_set_of_one_picture_has_no_distribution(vq, pictures, tmp_path):
    with pytest.raises(ValueError, match="1 of 1 could be read"):
        features(Latents(vq, torch.device("cpu")), picture_set(str(pictures / "a"), "24x32", 1), tmp_path)


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nowhere is not there"):
        pick_features("nowhere", torch.device("cpu"))
    (tmp_path / "bad.pth").write_bytes(b"bad")
    with pytest.raises(ValueError, match="bad.pth holds no weights"):
        pick_features(str(tmp_path / "bad.pth"), torch.device("cpu"))

    def fetch(self, **kw):
        raise URLError("no network")

    monkeypatch.setattr(sets.torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torchvision.models.Inception_V3_Weights, "get_state_dict", fetch)
    with pytest.raises(ValueError, match="no network.*--features path/to/inception_v3.*--features out/vq"):
        pick_features("inception", torch.device("cpu"))


# --- the commands ---


def test_the_tokenizers_record_says_how_it_came_about(vq, pictures, tmp_path, monkeypatch):
    common = ["--features", vq, "--cache", tmp_path / "cache", "--workers", 0, "--device", "cpu"]
    command(monkeypatch, "tokenizer", "--model", vq, "--images", pictures / "b", *common, "--out", tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["settings"]["size"] == "24x32" and len(record["model"]) == 16 and "tokenizer" in record["command"]
    extract, crops = Latents(vq, torch.device("cpu")), picture_set(str(pictures / "b"), "24x32")
    images = torch.stack([image for _, image in crops if not isinstance(image, str)])
    again = extract.vq.decode(extract.vq.encode(images))
    figures = record["figures"]
    assert np.isclose(figures["psnr"], psnr(again, images).mean()) and figures["n"] == 6
    assert np.isclose(figures["ssim"], ssim(again, images).mean())
    steps = [sum(float(x.diff(dim=d).abs().mean()) for d in (2, 3)) for x in (again, images)]
    assert np.isclose(figures["sharpness"], steps[0] / steps[1])
    (m1, c1), (m2, c2) = (moments(extract(x).numpy()) for x in (images, again))
    assert np.isclose(figures["rFID"], frechet(m1, c1, m2, c2), rtol=1e-4)


def test_a_tokenizer_that_enlarges_is_measured_at_the_size_it_draws(pictures, tmp_path, monkeypatch):
    cfg = VQConfig(stride=8, ch=8, n_res=1, n_codes=32, code_dim=4, upscale=2, sr_ch=8, sr_blocks=1)
    save_model(tmp_path / "x2", VQ(cfg).state_dict(), {"kind": "vq", "model": asdict(cfg), "data": {"size": "8x16"}})
    flags = ["--images", pictures / "a", "--features", tmp_path / "x2", "--cache", tmp_path / "cache", "--workers", 0]
    command(
        monkeypatch, "tokenizer", "--model", tmp_path / "x2", *flags, "--device", "cpu", "--out", tmp_path / "a.json"
    )
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["settings"]["size"] == "16x32" and 0 < record["figures"]["psnr"] < 60


def test_fids_record_names_the_model_that_drew(vq, pictures, tmp_path, monkeypatch, capsys):
    common = ["--features", vq, "--cache", tmp_path / "cache", "--workers", 0, "--device", "cpu", "--radii", 0, 1]
    flags = ["--real", pictures / "a", "--fake", pictures / "b", "--out", tmp_path / "f.json", *common]
    command(monkeypatch, "fid", *flags)
    record = json.loads((tmp_path / "f.json").read_text())
    assert record["drawn_by"] == {"model": "0123", "settings": "{}"} and record["settings"]["size"] == "24x32"
    assert {"FID-0", "FID-1"} <= set(record["figures"]) and "encoder" in record["figures"]["features"]
    assert "too high" in capsys.readouterr().out  # 6 pictures, 8 features
    assert Image.open(pictures / "b" / "1.png").size == (32, 24)
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the 1 pictures can be read, 0.png"):
        command(monkeypatch, "fid", "--real", pictures / "a", "--fake", tmp_path, *common)


def test_the_best_of_many_scenes_by_each_score(monkeypatch):
    """Pictures 2 and 5 of seven are right: the score decides whether they are found, and how many are looked at."""

    class Fake:
        def draw(self, prompts, cfg):
            return [(k, p, torch.arange(cfg.n)) for k, p in prompts]

        def images(self, codes):
            return codes

    monkeypatch.setattr(metrics, "to_pil", int)
    monkeypatch.setattr(metrics, "check_scene", lambda picture, claim, category: picture in (2, 5))
    monkeypatch.setattr(metrics, "code_losses", lambda painter, judge, prompt, codes: judge(codes).float())
    judges = {"last": torch.neg, "first": torch.abs, "third": lambda codes: (codes - 2).abs()}
    table = metrics.reranking(Fake(), SampleConfig(n=7), judges, n=2)
    assert table == {
        "any": {1: 0.0, 4: 1.0},
        "last": {1: 0.0, 4: 0.0},
        "first": {1: 0.0, 4: 0.0},
        "third": {1: 0.0, 4: 1.0},
    }


def test_the_rerank_command(tmp_path):
    flags = "--n", 2, "--prompts_per_category", 1, "--device", "cpu"
    call(metrics, "rerank", *flags, "--out", tmp_path / "rerank.json")
    record = json.loads((tmp_path / "rerank.json").read_text())
    assert set(record["figures"]) == {"any", "likelihood"} and set(record["figures"]["any"]) == {"1"}


def test_what_a_captioner_says_is_true_or_not():
    class Fake:
        size = (32, 32)

        def __init__(self, shift):
            said = [text for c in metrics.CATEGORIES for text, *_ in metrics.scene_prompts(c, False, 3)]
            self.said = iter(said[shift:] + said[:shift])

        def captions(self, images, cfg):
            return [[next(self.said)] for _ in images]

    rows = metrics.scene_captions(Fake(0), SampleConfig(), 3)
    assert len(rows) == 18 and all(true for _, true, _ in rows)
    assert sum(true for _, true, _ in metrics.scene_captions(Fake(1), SampleConfig(), 3)) < 4


def test_flags_that_cannot_be_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="--n 8 is for rerank"):
        command(monkeypatch, "scenes", "--n", 8)
    with pytest.raises(ValueError, match="--order image"):
        command(monkeypatch, "captions", "--device", "cpu")
    with pytest.raises(ValueError, match="is no pattern"):
        metrics.recall(None, SampleConfig(), "prompts", ignore="(")
    with pytest.raises(SystemExit):
        command(monkeypatch, "scenes", "--prompts_per_category", 0)
    with pytest.raises(ValueError, match="does not enlarge"):
        command(monkeypatch, "enlarge", "--images", "scenes", "--device", "cpu")


def test_a_folder_without_pictures_or_captions_is_named(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir(), (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no picture")
    for folder, message in (("empty", "no pictures in .*empty"), ("bad", "none of the 1 pictures .* x.png for one")):
        with pytest.raises(ValueError, match=message):
            command(monkeypatch, "recall", "--prompts", tmp_path / folder, "--device", "cpu")
