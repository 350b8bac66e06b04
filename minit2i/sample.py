"""Sampling: a trained prior and its tokenizer turn prompts into images, or images into captions.

    prompts (P) --Text--> ids (P, T) --model.generate--> codes (P*n, h, w) --VQ.decode--> images (P*n, 3, H, W)

The loop over codes belongs to the model: one code at a time in gpt.py, all in a few steps in papers/muse.py.  Both hand
their logits to a `Sampler`: classifier-free guidance, filters, and a random generator for each image.  `Pipeline` joins
all parts; sample_cli.py is the command line.

Shapes: P prompts, n images per prompt, B = P*n, T text length, h w code grid, N = h*w, V codebook size.
"""

import math
import runpy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch

from minit2i.checkpoint import file_hash, load_model, load_vq, read_config
from minit2i.config import Settings, at_least, between, known, merge, pick
from minit2i.gpt import MODELS, build_prior, conditions_of, views_of
from minit2i.tokens import Text
from minit2i.vq import shrink

SHIPPED = Path(__file__).parent / "pretrained"  # a folder for each model that ships

SCHEDULES = {  # guidance when the fraction u in (0, 1] of an image is sampled; 1 is neutral
    "constant": lambda scale, u: scale,
    "rising": lambda scale, u: 1 + (scale - 1) * u,
    "falling": lambda scale, u: 1 + (scale - 1) * (1 - u),
}


@dataclass(frozen=True)
class SampleConfig(Settings):
    """Sampling settings.  They are written into every PNG; a model may add its own (masked models: steps)."""

    group = "Sampling"

    n: Annotated[int, "images per prompt", at_least(1)] = 4
    cfg_scale: Annotated[float, "classifier-free guidance: 1 none, more follows the prompt harder", at_least(0)] = 2.5
    cfg_schedule: Annotated[str, "guidance over the codes: constant, from 1, or to 1", tuple(SCHEDULES)] = "rising"
    temperature: Annotated[float, "below 1 safer, above 1 more varied; 0 takes the likeliest code", at_least(0)] = 0.8
    top_k: Annotated[int, "keep the k likeliest codes; 0 keeps all", at_least(0)] = 0
    top_p: Annotated[float, "keep the likeliest codes that hold this probability", between(0, 1, open=True)] = 0.9
    min_p: Annotated[float, "drop codes less than this times as likely as the likeliest", between(0, 1)] = 0.0
    negative: Annotated[str, "negative prompt, which guidance leads away from (Muse); '' : no caption"] = ""
    seed: Annotated[int, "image i of prompt k (both from 0) has seed + k n + i", between(-(2**62), 2**62)] = 0


# --- from logits to a code -----------------------------------------------------------------------------


def guide(conditional, unconditional, scale):
    """Classifier-free guidance, arXiv:2207.12598 eq. 6 with scale = 1 + w."""
    return unconditional + scale * (conditional - unconditional)


def temperature(logits, t):
    """Divide by the temperature; 0 keeps only the likeliest code."""
    return top_k(logits, 1) if t == 0 else logits if t == 1 else logits / t


def top_k(logits, k):
    """Keep the k likeliest codes (and ties with the last of them); k 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits, p):
    """Keep the fewest likeliest codes whose probabilities reach p.  Nucleus sampling, arXiv:1904.09751 sec. 3.1."""
    if p >= 1:
        return logits
    ordered, index = logits.sort(descending=True)
    probability = ordered.softmax(-1)
    out = probability.cumsum(-1) - probability >= p  # the likelier codes already reach p
    out[..., 0] = False  # though p be less than float32 can tell from 0
    return logits.masked_fill(out.scatter(-1, index, out), -torch.inf)


def min_p(logits, p):
    """Drop codes less than p times as likely as the likeliest.  arXiv:2407.01082 sec. 3."""
    if p <= 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)


FILTERS = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}  # applied in this order


def sample_code(logits, uniform):
    """Sample from softmax(logits) by inverting the CDF: logits (..., V), uniform (...) in [0, 1) -> codes (...).

    A row with NaN or +Inf gives V, which is no code.
    """
    cdf = logits.float().softmax(-1).cumsum(-1)
    u = uniform[..., None] * cdf[..., -1:] * (1 - 1e-6)  # below the last value: no code of probability 0
    return torch.searchsorted(cdf, u, right=True).squeeze(-1)


class NotFinite(ValueError):
    """A prompt's logits are NaN or Inf; others may be sampled."""


class Sampler:
    """Guidance, filters and random numbers of a batch of images.  Models call it between logits and codes.

    seeds: one for each image, which has its own generator: an image does not depend on the rest of its batch.
    """

    def __init__(self, cfg, seeds, device="cpu"):
        self.cfg, self.device, self.guided = cfg, device, cfg.cfg_scale != 1
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def __len__(self):
        """B images."""
        return len(self.generators)

    def uniform(self, *shape):
        """The next uniform numbers of each image: (B, *shape) in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators]).to(self.device)

    def scale(self, u):
        """The scale of guidance when the fraction u of an image is sampled."""
        return SCHEDULES[self.cfg.cfg_schedule](self.cfg.cfg_scale, u)

    def guide(self, logits, scale):
        """Conditional, then unconditional logits (2B, ...) -> guided (B, ...) in float32; unchanged if not `guided`."""
        return guide(*logits.float().chunk(2), scale) if self.guided else logits.float()

    def filter(self, logits):
        """logits (..., V) -> the same with temperature, top_k, top_p and min_p applied."""
        for name, f in FILTERS.items():
            logits = f(logits, getattr(self.cfg, name))
        return logits

    def draw(self, logits, scale, uniform):
        """Logits (2B or B, V), uniform (B,) -> codes (B,), V for NaN and Inf.  Changes nothing: it can be compiled."""
        return sample_code(self.filter(self.guide(logits, scale)), uniform)

    def valid(self, codes, n_codes):
        """Codes as drawn, without what is none; `check` tells of it: raising here would wait for the GPU."""
        self.finite = self.finite & (codes < n_codes).all()
        return codes.clamp_max(n_codes - 1)

    def pick(self, logits, uniform):
        """`sample_code`, `valid`."""
        return self.valid(sample_code(logits, uniform), logits.shape[-1])

    def check(self):
        """NotFinite if any logits were NaN or Inf."""
        if not self.finite:
            raise NotFinite(
                f"logits are NaN or Inf: cfg_scale {self.cfg.cfg_scale} or temperature {self.cfg.temperature} is too "
                "extreme, or training has diverged; try --cfg_scale 1, or an earlier checkpoint"
            )


# --- images larger than the model's grid ---------------------------------------------------------------

# Name -> f(grid (H, W), window (h, w), step) -> [(top, left, place)], windows in order; place (row, column): the one
# code that is sampled there, a number: that many rows.  A model's `window_plan` names its own.  Filled by papers/taming,
# cogview.
WINDOW_PLANS = {}


def slide(sample, codes, window, plan, watch=None):
    """codes (B, H, W) with -1 where to sample -> all sampled, in windows (h, w) at the plan's places.

    sample(part (B, h, w), k, top, left) -> part with its -1 sampled, in window k of the plan.
    watch(codes): called after each window.
    """
    codes, (h, w) = codes.clone(), window
    for k, (top, left, place) in enumerate(plan):
        part = codes[:, top : top + h, left : left + w]  # a view
        at = (slice(None), slice(place)) if isinstance(place, int) else (slice(None), *place)
        given = part.clamp_min(0)  # what is not sampled here comes later in raster order, unread: any value does
        given[at] = part[at]
        if (given < 0).any():
            part[at] = sample(given, k, top, left)[at]
        if watch:
            watch(codes)
    return codes


# --- a checkpoint folder, ready to sample ----------------------------------------------------------------


def find_model(name):
    """A checkpoint folder, or the name of a model that ships -> its folder."""
    return SHIPPED / name if not Path(name, "config.json").exists() and (SHIPPED / name).is_dir() else Path(name)


def store_by_columns(model):
    """Store the matrices of a frozen model by columns: one row of codes at a time, a CPU multiplies faster by them.

    Shapes and results stay.  Measured at 6 layers, 256 wide, float32, one core with AVX512, three rounds in turn:
    sampling code by code takes 0.84 (0.74 to 0.87) of the time for one image, 0.90 (0.89 to 1.20) for 16; masked codes
    1.02.  Not for training: safetensors saves contiguous tensors only.
    """
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = layer.weight.data.T.contiguous().T


def sample_settings(*configs):
    """The SampleConfig class with the extra settings of the models that these config.json dicts describe."""
    return merge(SampleConfig, *(MODELS[c["model"]["model"]].Sampling for c in configs))


def check_prior(config, flag, folder):
    """ValueError unless a folder's config.json is that of a prior with images; flag: what named the folder."""
    if config.get("kind") != "prior":
        raise ValueError(f"{flag} {folder} holds a tokenizer, not a prior; train_prior.py makes one")
    if known(MODELS, "model", config["model"].get("model")).data:
        raise ValueError(
            f"{flag} {folder} holds a language model, which knows no images; train a prior that starts from it: "
            f"train_prior.py --model llama --llama {Path(folder, 'lm')}"
        )


def load_text(folder, cfg, device="cpu"):
    """The reader of a prior's captions: its condition's (a frozen T5), or the folder's SentencePiece model."""
    for condition in conditions_of(cfg):
        if reader := condition.reader(cfg, device):
            return reader
    return Text(Path(folder, "text.model").read_bytes(), cfg.text_len)


def same_codes(own, vq):
    """Whether two tokenizers give an image the same codes: equal encoders and codebooks, up to float16."""
    a, b = own.state_dict(), vq.state_dict()
    fixed = [k for k in a if k.startswith(("encoder.", "quantizer.codebook"))]  # fsq has no codebook of its own
    return all(k in b and a[k].shape == b[k].shape and a[k].allclose(b[k], 1e-2, 1e-3) for k in fixed)


def load_decoder(folder, own, device):
    """The tokenizer in `folder`, to decode the codes of the tokenizer `own`; ValueError if its codes are others."""
    vq = load_vq(folder, device)
    if not same_codes(own, vq):
        raise ValueError(f"--vq {folder} has other codes than this prior's tokenizer; use one finetuned from it")
    return vq


class Pipeline:
    """A prior's checkpoint folder, ready to sample.

    model, vq, text: the prior, its tokenizer, its caption reader; grid (h, w) and size (H, W) of its images; view and
    view_vq: of a prior that enlarges, the View of the smaller image and its tokenizer; hash of the prior's weights,
    vq_hash of its own tokenizer's; sampling: SampleConfig of class defaults and the config's "sampling".
    """

    def __init__(self, folder, device="cpu", dtype=torch.float32, vq="", compile=False):
        """folder: a checkpoint, or a shipped model's name; dtype: of the prior's weights; vq: folder of another decoder
        of the same codes, finetuned or enlarging; compile: compile the loop over codes: pays for many images."""
        folder, self.device = find_model(folder), torch.device(device)
        self.config = read_config(folder)
        check_prior(self.config, "the folder", folder)
        settings = sample_settings(self.config)
        self.model = load_model(folder, build_prior(self.config["model"])).to(self.device, dtype).requires_grad_(False)
        if self.device.type == "cpu":
            store_by_columns(self.model)
        if compile:
            self.model.compile_step()
        own = load_vq(folder / "vq", self.device)
        self.vq_hash, self.vq = own.hash, load_decoder(vq, own, self.device) if vq else own
        self.view, self.view_vq = next(iter(views_of(self.model.cfg)), None), own
        if self.view and self.view.vq:
            self.view_vq = load_vq(folder / f"{self.view.key}_vq", self.device)
        self.text = load_text(folder, self.model.cfg, self.device)
        self.hash = file_hash(folder / "model.safetensors")
        self.grid = self.model.cfg.grid_h, self.model.cfg.grid_w
        self.size = tuple(side * self.vq.cfg.stride for side in self.grid)
        self.sampling = pick(settings, self.config.get("sampling", {}))

    def encode_prompts(self, prompts):
        """prompts -> ids (P, T), or a frozen encoder's states (P, T, W)."""
        return torch.stack([self.text.encode(prompt) for prompt in prompts]).to(self.device)

    def sample_codes(self, prompts, cfg, known=None, coarse=None, watch=None, seeds=None):
        """Sample codes: all images of a prompt, then the next prompt's -> (P*n, h, w).

        known (P*n, h, w): given codes, -1 where to sample; its grid may be larger than the model's.  coarse
        (P*n, h/f, w/f): codes of the smaller images, for a super-resolution prior, or (f = 1) of a spatial condition.
        watch(codes): called as they grow.
        seeds: of the P*n images, default cfg.seed and those after it.  ValueError if the sizes do not fit.
        """
        b, own, f = len(prompts) * cfg.n, self.grid, self.view.ratio if self.view else 0
        if f == 1 and coarse is None:
            raise ValueError(f"this prior needs --image, an image whose {self.view.name} it is conditioned on")
        if bool(f) != (coarse is not None):
            need = "enlarges images: give it with --enlarge, beside the --model" if f else "does not enlarge images"
            raise ValueError(f"this prior {need} (--condition text,coarse trains one that does)")
        if known is None:
            grid = own if coarse is None else (f * coarse.shape[1], f * coarse.shape[2])
            known = torch.full((b, *grid), -1, device=self.device)
        grid, step = tuple(known.shape[1:]), f or 1
        if grid[0] < own[0] or grid[1] < own[1] or grid[0] % step or grid[1] % step:
            raise ValueError(f"{grid} codes must be at least the prior's {own}, and multiples of {step}")
        seeds = range(cfg.seed, cfg.seed + b) if seeds is None else seeds
        text, empty = self.encode_prompts(prompts), self.encode_prompts([cfg.negative])[0]

        def sample(part, k=0, top=0, left=0, watch=None):
            """Window k, at (top, left): part (B, h, w) with -1 where to sample -> (B, h, w)."""
            sampler = Sampler(cfg, [seed + 1_000_003 * k for seed in seeds], self.device)  # noise of its own
            batch = {"text": text}
            if f:  # each image has a condition of its own
                window = coarse[:, top // f : (top + own[0]) // f, left // f : (left + own[1]) // f]
                batch = {"text": text.repeat_interleave(cfg.n, 0), self.view.key: window.flatten(1)}  # (B, T), (B, M)
            grown = watch and (lambda codes: watch(codes.view(-1, *own)))
            codes = self.model.generate(batch, empty, sampler, known=part.flatten(1), watch=grown)  # (B, N)
            sampler.check()
            return codes.view(-1, *own)

        if grid == own:
            return sample(known, watch=watch)
        return slide(sample, known, own, WINDOW_PLANS[self.model.window_plan](grid, own, step), watch)

    def sample_prompts(self, prompts, cfg, known=None, batch=64, watch=None, condition=None):
        """[(k, prompt)] -> codes (len(prompts), n, h, w), at most `batch` images of each prompt at a time.

        Image i of prompt k has seed cfg.seed + k n + i.  known (1, h, w): given codes of all images; condition
        (1, h, w): the codes of their spatial condition.
        """
        parts, texts = [], [prompt for _, prompt in prompts]
        for first in range(0, cfg.n, batch):
            some = range(first, min(first + batch, cfg.n))
            seeds = [cfg.seed + k * cfg.n + i for k, _ in prompts for i in some]
            given, map_ = (None if x is None else x.expand(len(seeds), -1, -1) for x in (known, condition))
            codes = self.sample_codes(texts, replace(cfg, n=len(some)), given, map_, watch, seeds)
            parts.append(codes.unflatten(0, (len(texts), -1)))
        return torch.cat(parts, 1)

    @torch.inference_mode()
    def decode(self, codes):
        """codes (B, h, w) -> images (B, 3, H, W) in [-1, 1]; gray where a code is -1."""
        images = self.vq.decode(codes.clamp_min(0))
        side = images.shape[2] // codes.shape[1]
        hidden = (codes < 0)[:, None].repeat_interleave(side, 2).repeat_interleave(side, 3)  # (B, 1, H, W)
        return images.masked_fill(hidden, 0.0)

    def captions(self, images, cfg):
        """A captioner reads images (B, 3, H, W) -> cfg.n captions of each, of printable characters."""
        codes = self.vq.encode(images.to(self.device)).flatten(1).repeat_interleave(cfg.n, 0)  # (B, N)
        sampler, sp = Sampler(cfg, range(cfg.seed, cfg.seed + len(codes)), self.device), self.text.sp
        ids = self.model.write_captions(codes, sampler, sp.bos_id(), sp.eos_id())
        sampler.check()
        captions = ["".join(c for c in self.text.decode(row) if c.isprintable()) for row in ids]
        return [captions[i : i + cfg.n] for i in range(0, len(captions), cfg.n)]

    def __call__(self, prompts, cfg=None, batch=64):
        """Prompts (or one) -> yields (prompt, images (n, 3, H, W)), sampling at most `batch` images at a time."""
        cfg, todo = cfg or self.sampling, enumerate([prompts] if isinstance(prompts, str) else prompts)
        while some := list(islice(todo, max(1, batch // cfg.n))):
            for (_, prompt), codes in zip(some, self.sample_prompts(some, cfg, batch=batch)):
                yield prompt, torch.cat([self.decode(part) for part in codes.split(batch)])


# --- scores, and codes of other tokenizers ---------------------------------------------------------------


def as_codes_of(vq, pipeline, codes):
    """Codes (n, h, w) that `pipeline` sampled -> the same images as codes of another tokenizer."""
    if vq.hash == pipeline.vq_hash or same_codes(vq, pipeline.vq):
        return codes
    return vq.encode(shrink(pipeline.decode(codes), pipeline.vq.cfg.upscale))


@torch.inference_mode()
def score_codes(pipeline, judge, prompt, codes, batch=64):
    """The judge's loss of each of the codes (n, h, w) that `pipeline` sampled for a prompt: (n,), lower is better.

    judge: Pipeline of a captioner or of two towers; None: the loss of the codes themselves.  ValueError if it cannot.
    """
    who, judge, scores = "the judge" if judge else "the likelihood", judge or pipeline, []
    for part in codes.split(batch):
        part = as_codes_of(judge.vq, pipeline, part)
        if judge.view:
            raise ValueError(f"{who} is of a prior that enlarges images; use another --judge")
        if part.shape[1:] != judge.grid:
            raise ValueError(
                f"{who} scores images of {judge.grid} codes, not {(*part.shape[1:],)}; use another --judge"
            )
        text = judge.encode_prompts([prompt] * len(part))
        scores.append(judge.model.score({"text": text, "codes": part.flatten(1)}))
    return torch.cat(scores)


if __name__ == "__main__":  # python -m minit2i.sample: the command line, which imports this file
    runpy.run_module("minit2i.sample_cli", run_name="__main__")
