"""Frechet distances between sets of images, Inception score, and the features they are computed from.

Shapes: B batch, H W image, n images in a set, D features of an image.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy import ndimage
from tqdm import tqdm

from minit2i.checkpoint import file_hash, load_tensors, load_vq, read_config
from minit2i.data import DataConfig, cached_array, open_source
from minit2i.sample import Pipeline
from minit2i.tokens import Crops

# --- features ----------------------------------------------------------------------------------------


class Inception:
    """torchvision's Inception v3: images (B, 3, H, W) in [-1, 1] -> last pooled features (B, 2048).

    Images are resized to 299x299, bicubic with antialiasing (clean-fid, arXiv:2104.11222).  The weights differ from
    those of the 2015 TensorFlow graph behind published figures: compare only with figures of this extractor.
    """

    width = 2048

    def __init__(self, path, device):
        self.name, self.hash = f"torchvision's Inception v3 ({Path(path).name})", file_hash(path)
        net = torchvision.models.inception_v3(weights=None, transform_input=False, init_weights=False)
        try:
            safe = Path(path).suffix == ".safetensors"
            net.load_state_dict(load_tensors(path)[0] if safe else torch.load(path, "cpu", weights_only=True))
        except Exception as e:  # torch.load raises many kinds of errors for files that hold no weights
            raise ValueError(f"{path} holds no weights of torchvision's Inception v3: {str(e)[:200]}") from None
        self.head, net.fc, net.AuxLogits = net.fc.to(device).eval(), torch.nn.Identity(), None
        self.net, self.device = net.to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, images):
        images = F.interpolate(images.to(self.device), (299, 299), mode="bicubic", antialias=True)
        return self.net(images.clamp(-1, 1))

    @torch.inference_mode()
    def probabilities(self, rows):
        """features (B, 2048) -> float64 probabilities of the 1,000 classes (B, 1000), on the CPU."""
        return self.head(torch.as_tensor(rows, device=self.device)).cpu().double().softmax(1)  # MPS has no float64


class Latents:
    """A tokenizer's encoder: mean and deviation of each latent channel over the grid (B, 2 C).  Works offline."""

    def __init__(self, folder, device):
        is_prior = read_config(folder).get("kind") == "prior"
        self.vq, self.device = load_vq(Path(folder, "vq") if is_prior else folder, device), device
        self.hash = self.vq.hash
        self.name = f"encoder of the tokenizer {self.hash}; compare with figures of the same encoder only"
        self.width = 2 * self.vq.latents(torch.zeros(1, 3, *[self.vq.cfg.stride] * 2, device=device)).shape[-1]

    @torch.inference_mode()
    def __call__(self, images):
        z = self.vq.latents(images.to(self.device)).flatten(1, 2).float()  # (B, N, C)
        return torch.cat([z.mean(1), z.std(1, correction=0)], 1)


class Tower:
    """The image tower of a dual encoder (--model towers): (B, D) of norm 1.  Works offline."""

    def __init__(self, folder, device):
        self.pipe, self.device = Pipeline(folder, device), device
        self.hash, self.width = self.pipe.hash, self.pipe.model.cfg.n_embd
        self.name = f"image tower {self.hash}; compare with figures of the same tower only"

    @torch.inference_mode()
    def __call__(self, images):
        height, width = self.pipe.size
        if tuple(images.shape[-2:]) != (height, width):
            raise ValueError(
                f"these towers were trained on images of {height}x{width}; use --image_size {height}x{width}"
            )
        return self.pipe.model.image_feature(self.pipe.vq.encode(images.to(self.device)).flatten(1))


def pick_features(spec, device):
    """--features: "inception", a file of its weights, or the folder of a tokenizer, prior or dual encoder."""
    if Path(spec).is_dir():
        towers = read_config(spec).get("model", {}).get("model") == "towers"
        return (Tower if towers else Latents)(spec, device)
    if spec != "inception":
        if not Path(spec).is_file():
            raise ValueError(f"--features {spec} is not there; give 'inception', its weights, or a tokenizer's folder")
        return Inception(spec, device)
    weights = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        if not path.exists():
            weights.get_state_dict(check_hash=True)
    except OSError as e:  # URLError is one
        raise ValueError(
            f"Inception's weights cannot be fetched ({e}); fetch {weights.url} elsewhere and give "
            f"--features path/to/{path.name}, or compare offline with --features out/vq (a tokenizer's encoder)"
        ) from None
    return Inception(path, device)


# --- sets of images ----------------------------------------------------------------------------------


def image_set(spec, size, n=0, workers=0):
    """--real, --fake or --images (folder, shards or 'scenes') -> its first n images (0: all), centre crops."""
    cfg = DataConfig(data=f"scenes:{n}" if spec == "scenes" and n else spec, image_size=size, workers=workers)
    source = open_source(cfg.data, cfg)
    return Crops(source, np.arange(min(n or len(source), len(source))), cfg, captions=False)


def batches(crops, batch=64):
    """The readable images of a set: yields their rows (a list) and the images (B, 3, H, W)."""
    loader = torch.utils.data.DataLoader(crops, batch, num_workers=crops.images.cfg.workers, collate_fn=list)
    for chunk in tqdm(loader, unit="batch", leave=False):
        readable = [(row, image) for row, image in chunk if not isinstance(image, str)]
        if readable:
            rows, images = zip(*readable)
            yield list(rows), torch.stack(images)


def features(extract, crops, folder, change=lambda images: images, tag=""):
    """Features (n, D) float32 of a set's readable images, from a file in `folder` that is computed once.

    change: applied to the images first; `tag` names it in the file's key.  ValueError for fewer than two images.
    """

    def fill(array, _):
        array[:] = np.nan  # what cannot be read stays NaN
        for rows, images in batches(crops):
            array[rows] = extract(change(images)).float().cpu().numpy()

    key = hashlib.sha256(f"{extract.hash} {crops.digest()} {tag}".encode()).hexdigest()[:16]
    rows = cached_array(Path(folder, f"features-{key}.npy"), (len(crops), extract.width), np.float32, fill)
    readable = ~np.isnan(rows[:, 0])
    if readable.sum() < 2:
        raise ValueError(f"a distribution needs at least two images; {readable.sum()} of {len(crops)} could be read")
    return rows if readable.all() else rows[readable]


# --- distances ---------------------------------------------------------------------------------------


def moments(rows, chunk=1024):
    """rows (n, D), read in chunks -> mean (D,) and covariance (D, D) with n-1, in float64.

    Chan, Golub, LeVeque 1979: chunks are merged without subtracting large numbers.
    """
    n, mean, scatter = 0, 0.0, 0.0
    for k in range(0, len(rows), chunk):
        x = np.asarray(rows[k : k + chunk], np.float64)  # (m, D)
        m, new = len(x), x.mean(0)
        delta = new - mean
        scatter = scatter + (x - new).T @ (x - new) + np.outer(delta, delta) * n * m / (n + m)
        mean = mean + delta * m / (n + m)
        n += m
    return mean, scatter / (n - 1)


def frechet(mean1, cov1, mean2, cov2):
    """Frechet distance between two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)).  arXiv:1706.08500 eq. 6.

    tr sqrt(C1 C2) is the nuclear norm of C1^1/2 C2^1/2.  Both roots are of symmetric matrices, so sets with fewer
    images than features need no offset on the diagonal.
    """

    def root(c):
        values, vectors = np.linalg.eigh(c)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    cross = np.linalg.norm(root(cov1) @ root(cov2), "nuc")
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def inception_score(probabilities, rows, splits=10, chunk=1024):
    """exp(mean KL(p(y|x) || p(y))) over `splits` consecutive parts -> mean, standard deviation.  arXiv:1606.03498.

    probabilities: features (B, D) -> (B, classes); rows (n, D).
    """
    scores, splits = [], min(splits, len(rows))
    for k in range(splits):
        part = rows[k * len(rows) // splits : (k + 1) * len(rows) // splits]
        total, negative_entropy = 0.0, 0.0
        for i in range(0, len(part), chunk):
            p = np.asarray(probabilities(np.asarray(part[i : i + chunk])), np.float64)
            total = total + p.sum(0)
            negative_entropy += float((p * np.log(p.clip(1e-300))).sum())
        marginal = total / len(part)
        scores.append(np.exp(negative_entropy / len(part) - (marginal * np.log(marginal.clip(1e-300))).sum()))
    return float(np.mean(scores)), float(np.std(scores))


def fid(extract, real, fake, folder, radii=(0,)):
    """FID-k of two sets of images (Crops) for each blur radius k; IS of the second if the features are Inception's.

    Both sets are blurred by a Gaussian of k pixels first (DALL-E sec. 3.1; CogView, arXiv:2105.13290 table 1).
    """
    figures = {"features": extract.name}
    for k in radii:

        def blur(images):
            return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, k, k))) if k else images

        rows = [features(extract, crops, folder, blur, f"blur {k}" if k else "") for crops in (real, fake)]
        figures[f"FID-{k}"] = frechet(*moments(rows[0]), *moments(rows[1]))
        if k == 0 and isinstance(extract, Inception):
            figures["IS"], figures["IS_std"] = inception_score(extract.probabilities, rows[1])
    return figures | {"n_real": len(rows[0]), "n_fake": len(rows[1])}
