"""Decoding: a trained prior and its tokenizer turn prompts into pictures.

A filter maps logits (B, V) to logits.  The cached loop is written once, in `generate`.

Shapes: P prompts, n pictures of each, B = P*n, T text length, h w code grid, N = h*w, V codes.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from tqdm import tqdm

from minit2i.checkpoint import load_model, read_config
from minit2i.gpt import GPT, Cache, GPTConfig
from minit2i.t5 import T5Text, folder_hash
from minit2i.tokens import Text
from minit2i.train import pick
from minit2i.vq import VQ, VQConfig

PRETRAINED = Path(__file__).parent / "pretrained"  # the small prior that ships


@dataclass(frozen=True)
class SampleConfig:
    """How codes are drawn; every value is written into the pictures."""

    n: Annotated[int, "pictures of each prompt"] = 4
    cfg_scale: Annotated[float, "guidance: 1 follows the caption as trained, more follows it harder"] = 1.5
    cfg_schedule: Annotated[str, "guidance over the codes: constant, or rising from 1", ("constant", "rising")] = (
        "constant"
    )
    temperature: Annotated[float, "below 1 safer, above 1 more varied; 0 always takes the likeliest code"] = 1.0
    top_k: Annotated[int, "draw from the k likeliest codes; 0: from all"] = 0
    top_p: Annotated[float, "draw from the likeliest codes that hold this much probability"] = 0.9
    seed: Annotated[int, "picture i of a prompt is drawn with seed + i"] = 0

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"n {self.n} is less than one picture")
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is negative; use 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is negative; use 0 for all codes")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]; use 1 for all codes")
        if self.cfg_scale < 0:
            raise ValueError(f"cfg_scale {self.cfg_scale} is negative; use 0 or more")


# --- filters -----------------------------------------------------------------------------------------


def temperature(logits, t):
    """Divide by the temperature; at 0 only the likeliest code stays."""
    return top_k(logits, 1) if t == 0 else logits if t == 1 else logits / t


def top_k(logits, k):
    """Keep the k likeliest (and what ties with the last of them); k 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits, p):
    """Keep the fewest likeliest codes whose probabilities reach p.  Nucleus sampling, arXiv:1904.09751 sec. 3.1."""
    if p >= 1:
        return logits
    ordered, index = logits.sort(descending=True)
    held = ordered.softmax(-1)
    out = held.cumsum(-1) - held >= p  # the likelier ones hold p already
    return logits.masked_fill(out.scatter(-1, index, out), -torch.inf)


FILTERS = (("temperature", temperature), ("top_k", top_k), ("top_p", top_p))


def draw(logits, u):
    """One code per row by inverting the distribution function: logits (B, V), u (B,) in [0, 1) -> (B,)."""
    cdf = logits.float().softmax(-1).cumsum(-1)
    u = u[:, None] * cdf[:, -1:] * (1 - 1e-6)  # never past the end, so that no code of probability 0 is drawn
    return torch.searchsorted(cdf, u, right=True).squeeze(1)


def guide(conditional, unconditional, scale):
    """Classifier-free guidance, arXiv:2207.12598 eq. 6 with scale = 1 + w."""
    return unconditional + scale * (conditional - unconditional)


# --- the loop ----------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(model, text, empty, cfg, first=None, progress=None):
    """Draw codes for P prompts, cfg.n pictures each, one code at a time.

    text (P, T) ids, or (P, T, W) states; empty (T,) ids of the empty caption, or its states, for guidance; first (P*n, m) codes that are
    given (the first rows of a picture to finish) -> codes (P*n, N).  Picture i of each prompt is drawn
    with seed cfg.seed + i, whatever else is in the batch.
    """
    c, device = model.cfg, text.device
    guided = cfg.cfg_scale != 1
    b, t, n_image = len(text) * cfg.n, c.sequence.text_len, c.n_image
    m = 0 if first is None else first.shape[1]
    noise = [torch.rand(n_image, generator=torch.Generator().manual_seed(cfg.seed + i)) for i in range(cfg.n)]
    noise = torch.stack(noise).repeat(len(text), 1).to(device).t().contiguous()  # (N, B)

    rows = torch.arange(len(text), device=device).repeat_interleave(cfg.n)  # (B,) the prompt of each picture
    if guided:  # the unconditional half follows the conditional one
        text = torch.cat([text, empty[None]])
        rows = torch.cat([rows, rows.new_full((b,), len(text) - 1)])  # (2B,)
    prompt_cache = Cache(model, len(text), t)
    before, memory = model.read(text)
    hidden = model.trunk(before, 0, prompt_cache, memory)[:, -1:][rows]  # (2B, 1, D): predicts code 0
    cache = prompt_cache.spread(model, rows, t + n_image - 1)
    codes = torch.empty(b, n_image, dtype=torch.long, device=device)
    if m:
        codes[:, :m] = first
        if m < n_image:
            given = codes[:, :m].repeat(2 if guided else 1, 1)
            hidden = model.trunk(model.code_ids(given), t, cache)[:, -1:]
    for i in range(m, n_image):
        logits = model.image_head(hidden)[:, 0].float()  # (2B, V)
        if guided:
            rise = (i + 1) / n_image if cfg.cfg_schedule == "rising" else 1.0
            logits = guide(*logits.chunk(2), 1 + (cfg.cfg_scale - 1) * rise)
        for name, f in FILTERS:
            logits = f(logits, getattr(cfg, name))
        code = draw(logits, noise[i])
        codes[:, i] = code
        if progress:
            progress()
        if i + 1 < n_image:
            ids = model.code_ids(code)[:, None]
            hidden = model.trunk(torch.cat([ids, ids]) if guided else ids, t + i, cache)
    return codes


# --- a prior with all that belongs to it ---------------------------------------------------------------


def file_hash(path):
    """The first 16 digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def load_vq(folder, device="cpu"):
    """A tokenizer's checkpoint folder -> VQ, frozen; ValueError if it is none."""
    config = read_config(folder)
    if config.get("kind") != "vq":
        raise ValueError(f"{folder} is not a tokenizer; train_vq.py makes one")
    return load_model(folder, VQ(pick(VQConfig, config["model"]))).to(device).requires_grad_(False)


def load_text(folder, config, device):
    """What reads the captions of the prior in `folder`: its own text model, or the frozen encoder it was trained with."""
    length, encoder = config["model"]["text_len"], config.get("text_encoder")
    if not encoder:
        return Text(Path(folder, "text.model").read_bytes(), length)
    if not Path(encoder["folder"], "config.json").exists() or folder_hash(encoder["folder"]) != encoder["hash"]:
        raise ValueError(
            f"{folder} reads its captions with the text encoder {encoder['hash']}, which is not in {encoder['folder']}; "
            "put it there, or name its folder under text_encoder in config.json"
        )
    return T5Text(encoder["folder"], length, device)


class Painter:
    """A prior's checkpoint folder, ready to draw: its tokenizer, its text model, its sizes."""

    def __init__(self, folder, device="cpu", dtype=torch.float32, vq=""):
        """vq: a folder whose decoder is used instead: a finetuned or enlarging one of the same codes."""
        config = read_config(folder)
        if config.get("kind") != "prior":
            raise ValueError(f"{folder} is not a prior; train_prior.py makes one")
        self.config, self.device = config, torch.device(device)
        self.prior = (
            load_model(folder, GPT(pick(GPTConfig, config["model"]))).to(self.device, dtype).requires_grad_(False)
        )
        self.vq = load_vq(Path(folder, "vq"), self.device)
        own = self.vq.quantizer.codebook
        if vq:
            self.vq = load_vq(vq, self.device)
            other = self.vq.quantizer.codebook
            if other.shape != own.shape or not torch.allclose(other, own, rtol=1e-2, atol=1e-3):  # float16 copies pass
                raise ValueError(f"the codes of {vq} are not those of {folder}; use one finetuned from its tokenizer")
        self.text = load_text(folder, config, self.device)
        self.hash = file_hash(Path(folder, "model.safetensors"))
        self.size = tuple(s * self.vq.cfg.stride for s in (self.prior.cfg.grid_h, self.prior.cfg.grid_w))

    def ids(self, prompts):
        """prompts -> ids (P, T), or states (P, T, W)."""
        return torch.stack([self.text.encode(prompt) for prompt in prompts]).to(self.device)

    def codes(self, prompts, cfg, first=None, progress=None):
        """prompts, cfg, first (P*n, m) codes or None -> codes (P*n, N): all pictures of a prompt, then the next's."""
        return generate(self.prior, self.ids(prompts), self.ids([""])[0], cfg, first, progress)

    def images(self, codes):
        """codes (B, N) -> images (B, 3, H, W) in [-1, 1]."""
        return self.vq.decode(codes.view(-1, self.prior.cfg.grid_h, self.prior.cfg.grid_w))

    def paint(self, prompts, cfg, first=None, batch=64, bar=False):
        """Any number of prompts, at most `batch` pictures at a time -> yields (prompt, images (n, 3, H, W)).

        first: codes (1, m) that all pictures begin with.
        """
        n, per = min(cfg.n, batch), max(1, batch // cfg.n)
        jobs = [(prompts[k : k + per], i) for k in range(0, len(prompts), per) for i in range(0, cfg.n, n)]
        codes = self.prior.cfg.n_image - (0 if first is None else first.shape[1])
        done = []  # pictures of one prompt, when they do not fit into one batch
        with tqdm(total=len(jobs) * codes, unit="code", disable=not bar) as count:
            for some, i in jobs:
                part = replace(cfg, n=min(n, cfg.n - i), seed=cfg.seed + i)
                given = None if first is None else first.repeat(len(some) * part.n, 1)
                images = self.images(self.codes(some, part, given, count.update))
                done.append(images.unflatten(0, (len(some), part.n)))
                if i + part.n == cfg.n:
                    yield from zip(some, torch.cat(done, 1))
                    done = []
