"""FID and IS against loops and closed forms; features are computed once."""

from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from scipy import linalg, ndimage
from untrained import make_prior, make_vq

from minit2i.experiments import fid as module
from minit2i.experiments.fid import (
    Inception,
    Latents,
    Tower,
    features,
    fid,
    frechet,
    image_set,
    inception_score,
    moments,
    pick_features,
)
from minit2i.plot import save_image
from minit2i.scenes import render, scene_at

RNG = np.random.default_rng(0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    return make_vq(tmp_path_factory.mktemp("vq"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of six scenes; one file of the second is damaged."""
    root = tmp_path_factory.mktemp("sets")
    for i in range(12):
        save_image(root / "ab"[i % 2] / f"{i}.png", render(scene_at(0, i), 24, 32))
    (root / "b" / "x.png").write_bytes(b"no image")
    return root


# --- distances ---


def test_moments_in_chunks_equal_numpys():
    x = (RNG.normal(size=(57, 5)) + 1e4).astype(np.float32)  # a mean that would eat float32's digits
    for chunk in (1, 10, 57, 100):
        mean, cov = moments(x, chunk)
        assert np.allclose(mean, x.astype(np.float64).mean(0), rtol=1e-14)
        assert np.allclose(cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9)


def test_frechet_distance_of_gaussians_in_closed_form():
    """With common axes it is |m1 - m2|^2 + the squared differences of the standard deviations."""
    s, t, m = RNG.uniform(0.1, 2, 6), RNG.uniform(0.1, 2, 6), RNG.normal(size=6)
    axes = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    c1, c2 = (axes @ np.diag(v**2) @ axes.T for v in (s, t))
    assert np.isclose(frechet(m, c1, np.zeros(6), c2), (m**2).sum() + ((s - t) ** 2).sum())


def test_frechet_distance_equals_scipys_matrix_root():
    x, y = RNG.normal(size=(80, 20)) @ RNG.normal(size=(20, 20)), RNG.normal(size=(90, 20)) + 0.3
    (m1, c1), (m2, c2) = moments(x), moments(y)
    reference = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert np.isclose(frechet(m1, c1, m2, c2), reference, rtol=1e-9)


def test_frechet_distance_with_fewer_images_than_features():
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
    ours = inception_score(lambda rows: torch.as_tensor(rows).softmax(1), logits.numpy(), splits=4, chunk=3)
    assert np.allclose(ours, (np.mean(scores), np.std(scores)))
    sure = np.tile(np.eye(7), (10, 1))  # every class equally often, each with certainty: the number of classes
    assert np.allclose(inception_score(torch.as_tensor, sure, splits=1), (7, 0))


# --- features ---


def test_inception_features_are_its_pooled_layer_and_give_its_classes(tmp_path):
    net = torchvision.models.inception_v3(weights=None, transform_input=False, init_weights=False).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    extract, pooled = Inception(tmp_path / "w.safetensors", CPU), []
    net.avgpool.register_forward_hook(lambda module, args, out: pooled.append(out.flatten(1)))
    image = torch.rand(1, 3, 299, 299) * 2 - 1
    with torch.no_grad():
        logits = net(image)
    assert torch.allclose(extract(image), pooled[0], atol=1e-5) and pooled[0].shape == (1, extract.width)
    assert torch.allclose(extract.probabilities(pooled[0].numpy()).float(), logits.softmax(1), atol=1e-6)


def test_latents_are_mean_and_deviation_over_the_grid(vq):
    extract, image = Latents(vq, CPU), torch.rand(2, 3, 24, 32)
    z = extract.vq.latents(image).view(2, 12, -1).detach()
    assert torch.allclose(extract(image), torch.cat([z.mean(1), z.var(1, unbiased=False).sqrt()], 1), atol=1e-6)
    assert extract(image).shape[1] == extract.width


def test_towers_give_their_image_features_at_their_size(tmp_path):
    make_prior(tmp_path, grid_h=3, model="towers", n_encoder=1)
    extract, images = pick_features(str(tmp_path), CPU), torch.rand(3, 3, 24, 32) * 2 - 1
    expected = extract.pipe.model.image_feature(extract.pipe.vq.encode(images).flatten(1))
    assert isinstance(extract, Tower) and torch.allclose(extract(images), expected, atol=1e-5)
    assert expected.shape == (3, extract.width)
    with pytest.raises(ValueError, match="use --image_size 24x32"):
        extract(images[..., :16])


def test_features_are_computed_once_for_each_set_and_blur(vq, sets, tmp_path):
    extract, seen = Latents(vq, CPU), []

    def watched(images):
        seen.append(images)
        return extract(images)

    watched.hash, watched.width, watched.name = extract.hash, extract.width, extract.name
    real, fake = (image_set(str(sets / k), "24x32") for k in "ab")
    figures = fid(watched, real, fake, tmp_path, (0, 2))
    assert len(seen) == 4 and figures["n_real"] == figures["n_fake"] == 6  # the damaged one is left out
    assert np.allclose(seen[2][1, 2], ndimage.gaussian_filter(seen[0][1, 2].numpy(), 2), atol=1e-6)
    assert fid(watched, real, fake, tmp_path, (0, 2)) == figures and len(seen) == 4
    (m1, c1), (m2, c2) = (moments(extract(images).double().numpy()) for images in seen[:2])
    assert np.isclose(figures["FID-0"], frechet(m1, c1, m2, c2))
    assert abs(fid(watched, real, real, tmp_path)["FID-0"]) < 1e-5 < figures["FID-0"]


def test_a_set_of_one_image_has_no_distribution(vq, sets, tmp_path):
    with pytest.raises(ValueError, match="at least two images; 1 of 1 could be read"):
        features(Latents(vq, CPU), image_set(str(sets / "a"), "24x32", 1), tmp_path)


def test_missing_weights_name_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nowhere is not there"):
        pick_features("nowhere", CPU)
    (tmp_path / "bad.pth").write_bytes(b"bad")
    with pytest.raises(ValueError, match="bad.pth holds no weights"):
        pick_features(str(tmp_path / "bad.pth"), CPU)

    def fetch(self, **kw):
        raise URLError("no network")

    monkeypatch.setattr(module.torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torchvision.models.Inception_V3_Weights, "get_state_dict", fetch)
    with pytest.raises(ValueError, match="no network.*--features path/to/inception_v3.*--features out/vq"):
        pick_features("inception", CPU)
