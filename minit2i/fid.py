"""Sets of pictures against each other: FID over blur radii, Inception score, and the features they are taken from.

Shapes: B batch, H W picture, n pictures of a set, D features of a picture.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy import ndimage
from tqdm import tqdm

from minit2i.checkpoint import load_tensors, read_config
from minit2i.data import DataConfig, open_source
from minit2i.sample import Painter, file_hash, load_vq
from minit2i.tokens import Crops

# --- features of a picture ---------------------------------------------------------------------------


class Inception:
    """torchvision's Inception v3: images (B, 3, H, W) in [-1, 1] -> its last pooled features (B, 2048).

    Pictures are resized to 299x299 bicubically with antialiasing (clean-fid, arXiv:2104.11222).  The weights are not
    those of the TensorFlow graph of 2015 that published figures use: compare with what this extractor measured.
    """

    width = 2048

    def __init__(self, path, device):
        self.name, self.hash = f"torchvision's Inception v3 ({Path(path).name})", file_hash(path)
        net = torchvision.models.inception_v3(weights=None, transform_input=False, init_weights=False)
        try:
            safe = Path(path).suffix == ".safetensors"
            net.load_state_dict(load_tensors(path)[0] if safe else torch.load(path, "cpu", weights_only=True))
        except Exception as e:  # torch.load raises what it likes for what is no file of weights
            raise ValueError(f"{path} holds no weights of torchvision's Inception v3: {str(e)[:200]}") from None
        self.head, net.fc, net.AuxLogits = net.fc.to(device).eval(), torch.nn.Identity(), None
        self.net, self.device = net.to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, images):
        images = F.interpolate(images.to(self.device), (299, 299), mode="bicubic", antialias=True)
        return self.net(images.clamp(-1, 1))

    @torch.inference_mode()
    def probabilities(self, rows):
        """features (B, 2048) -> probabilities of the 1,000 classes (B, 1000)."""
        return self.head(torch.as_tensor(rows, device=self.device)).double().softmax(1)


class Latents:
    """A tokenizer's encoder: the mean and the spread of each latent channel over the grid, (B, 2 C).  Works offline."""

    def __init__(self, folder, device):
        config = read_config(folder)
        folder = Path(folder, "vq") if config.get("kind") == "prior" else Path(folder)
        self.vq, self.device = load_vq(folder, device), device
        self.hash = self.vq.hash
        self.name = f"encoder of the tokenizer {self.hash}; compare with figures of the same encoder only"
        self.width = 2 * self.vq.latents(torch.zeros(1, 3, *[self.vq.cfg.stride] * 2, device=device)).shape[-1]

    @torch.inference_mode()
    def __call__(self, images):
        z = self.vq.latents(images.to(self.device)).flatten(1, 2).float()  # (B, N, C)
        return torch.cat([z.mean(1), z.std(1, correction=0)], 1)


class Tower:
    """What the picture tower of --objective contrast tells captions from: (B, D) of norm 1.  Works offline."""

    def __init__(self, folder, device):
        self.painter, self.device = Painter(folder, device, kind="contrast"), device
        self.hash, self.width = self.painter.hash, self.painter.prior.cfg.n_embd
        self.name = f"picture tower {self.hash}; compare with figures of the same tower only"

    @torch.inference_mode()
    def __call__(self, images):
        height, width = self.painter.size
        if tuple(images.shape[-2:]) != (height, width):
            raise ValueError(f"these towers have seen pictures of {height}x{width} only; use --size {height}x{width}")
        return self.painter.prior.image_feature(self.painter.vq.encode(images.to(self.device)).flatten(1))


def pick_features(spec, device):
    """--features: "inception", a file of its weights, or the checkpoint folder of a tokenizer, a prior or two towers."""
    if Path(spec).is_dir():
        return (Tower if read_config(spec).get("kind") == "contrast" else Latents)(spec, device)
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


# --- sets --------------------------------------------------------------------------------------------


def picture_set(spec, size, n=0, workers=0):
    """--real, --fake, --images (folder, shards or 'scenes') -> its first n pictures (0: all), cropped centrally."""
    cfg = DataConfig(data=spec, size=size, captions=False, workers=workers, **({"n_scenes": n} if n else {}))
    source = open_source(spec, cfg)
    return Crops(source, np.arange(min(n or len(source), len(source))), cfg)


def batches(crops, batch=64):
    """The pictures of a set that can be read, (B, 3, H, W) at a time."""
    loader = torch.utils.data.DataLoader(crops, batch, num_workers=crops.pictures.cfg.workers, collate_fn=list)
    for chunk in tqdm(loader, unit="batch", leave=False):
        images = [image for _, image in chunk if not isinstance(image, str)]
        if images:
            yield torch.stack(images)


def features(extract, crops, folder, change=lambda images: images, tag=""):
    """Features of a set's pictures (n, D) float32, in a file that is made once and read where it lies.

    change: what is done to the pictures before, which `tag` names.
    """
    key = hashlib.sha256(f"{extract.hash} {crops.digest()} {tag}".encode()).hexdigest()[:16]
    path = Path(folder, f"features-{key}.f32")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with open(part, "wb") as f:
            for images in batches(crops):
                f.write(extract(change(images)).float().cpu().numpy().tobytes())
        os.replace(part, path)
    n = path.stat().st_size // (4 * extract.width)
    if n < 2:
        raise ValueError(f"a distribution needs two pictures or more; {n} of {len(crops)} could be read")
    return np.memmap(path, np.float32, "r", shape=(n, extract.width))


# --- distances ---------------------------------------------------------------------------------------


def moments(rows, part=1024):
    """rows (n, D), of which `part` are looked at at a time -> mean (D,), covariance (D, D) with n-1, in float64.

    Chan, Golub, LeVeque 1979: parts are joined without subtracting large numbers.
    """
    n, mean, scatter = 0, 0.0, 0.0
    for k in range(0, len(rows), part):
        x = np.asarray(rows[k : k + part], np.float64)  # (m, D)
        m, new = len(x), x.mean(0)
        delta = new - mean
        scatter = scatter + (x - new).T @ (x - new) + np.outer(delta, delta) * n * m / (n + m)
        mean = mean + delta * m / (n + m)
        n += m
    return mean, scatter / (n - 1)


def frechet(mean1, cov1, mean2, cov2):
    """Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)).  arXiv:1706.08500 eq. 6.

    tr sqrt(C1 C2) is the sum of the singular values of C1^1/2 C2^1/2, and those roots are of symmetric matrices, so
    that sets with fewer pictures than features need no offset on the diagonal.
    """

    def root(c):
        values, vectors = np.linalg.eigh(c)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    cross = np.linalg.norm(root(cov1) @ root(cov2), "nuc")
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def inception_score(probabilities, rows, splits=10, part=1024):
    """exp(mean KL(p(y|x) || p(y))) of each of `splits` parts in order -> mean, standard deviation.  arXiv:1606.03498.

    probabilities: features (B, D) -> (B, classes); rows (n, D).
    """
    scores, splits = [], min(splits, len(rows))
    for k in range(splits):
        rows_k = rows[k * len(rows) // splits : (k + 1) * len(rows) // splits]
        total, negative_entropy = 0.0, 0.0
        for i in range(0, len(rows_k), part):
            p = np.asarray(probabilities(np.asarray(rows_k[i : i + part])).cpu(), np.float64)
            total = total + p.sum(0)
            negative_entropy += float((p * np.log(p.clip(1e-300))).sum())
        marginal = total / len(rows_k)
        scores.append(np.exp(negative_entropy / len(rows_k) - (marginal * np.log(marginal.clip(1e-300))).sum()))
    return float(np.mean(scores)), float(np.std(scores))


def fid(extract, real, fake, folder, radii=(0,)):
    """FID-k for each blur radius k of two sets of pictures (Crops), and IS of the second if Inception looks.

    Both sets are blurred by a Gaussian of k pixels before (DALL-E sec. 3.1, CogView, arXiv:2105.13290 table 1).
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
