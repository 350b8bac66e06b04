"""Decoding: a trained prior and its tokenizer turn prompts into pictures, or pictures into captions.

The cached loop is written once, in `generate`; masked priors draw in masked.py; filters.py has what lies between
logits and a code; windows.py moves a prior over pictures larger than its grid.

Shapes: P prompts, n pictures of each, B = P*n, T text length, h w code grid, N = h*w, M codes of a smaller
picture (super-resolution), V codes.
"""

import hashlib
import math
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minit2i.backbones import shrink
from minit2i.checkpoint import load_model, read_config
from minit2i.contrast import Contrast, mismatch
from minit2i.filters import SCHEDULES, draw, filtered, guide, scheduled
from minit2i.flags import pick
from minit2i.gpt import GPT, Cache, GPTConfig
from minit2i.masked import unmask
from minit2i.t5 import T5Text, folder_hash
from minit2i.tokens import Text
from minit2i.vq import VQ, VQConfig
from minit2i.windows import centre_outward, every_place, slide

PRETRAINED = Path(__file__).parent / "pretrained"  # the small prior that ships


@dataclass(frozen=True)
class SampleConfig:
    """How codes are drawn; every value is written into the pictures."""

    n: Annotated[int, "pictures of each prompt"] = 4
    cfg_scale: Annotated[float, "guidance: 1 follows the caption as trained, more follows it harder"] = 2.5
    cfg_schedule: Annotated[
        str, "guidance over the codes or steps: all of it throughout, or from 1 or to 1", tuple(SCHEDULES)
    ] = "rising"
    temperature: Annotated[float, "below 1 safer, above 1 more varied; 0 always takes the likeliest code"] = 0.8
    temperature_schedule: Annotated[str, "the same over the codes, from 1 or to 1", tuple(SCHEDULES)] = "constant"
    top_k: Annotated[int, "draw from the k likeliest codes; 0: from all"] = 0
    top_p: Annotated[float, "draw from the likeliest codes that hold this much probability"] = 0.9
    min_p: Annotated[float, "draw from the codes at least this many times as likely as the likeliest"] = 0.0
    steps: Annotated[int, "masked priors: steps that a picture is drawn in"] = 24
    choice_noise: Annotated[float, "masked priors: Gumbel noise, falling to 0, on which codes a step keeps"] = 4.5
    seed: Annotated[int, "picture i of prompt k (both from 0) is drawn with seed + k n + i"] = 0

    def __post_init__(self):
        for name, least in dict(n=1, steps=1, temperature=0, top_k=0, cfg_scale=0, choice_noise=0).items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} is not a number from {least} on")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]; use 1 for all codes")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} is not in [0, 1]; use 0 for all codes")


# --- the loop ----------------------------------------------------------------------------------------


def picture_noise(seeds, n, device):
    """Uniform numbers (n, B) for n draws of each picture, a column from each of B seeds."""
    noise = [torch.rand(n, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(device).t().contiguous()


@torch.inference_mode()
def generate(model, text, empty, cfg, known=None, low=None, watch=None, seeds=None):
    """Draw codes for P prompts, cfg.n pictures each, one code at a time.

    text (P, T) ids, or (P, T, W) states; empty (T,) ids of the empty caption, or its states, for guidance; known (P*n, N)
    codes that are given, -1 where to draw (a code sees those before it only); low (P*n, M) codes of the smaller
    pictures -> codes (P*n, N).  watch(codes): called after each code, with -1 where there is none yet.
    seeds: of the P*n pictures, which are what they are whatever else is in the batch; else cfg.seed and those that follow.
    """
    c, device, guided = model.cfg, text.device, cfg.cfg_scale != 1
    b, t, p, n_image = len(text) * cfg.n, c.sequence.text_len, c.sequence.n_prefix, c.n_image
    noise = picture_noise(seeds or range(cfg.seed, cfg.seed + b), n_image, device)  # (N, B)
    codes = torch.full((b, n_image), -1, device=device) if known is None else known.clone()
    given = codes >= 0
    forced, free = given.any(0).tolist(), (~given.all(0)).nonzero().flatten().tolist()
    m, stop = (free[0], free[-1] + 1) if free else (0, 0)
    both = (lambda x: torch.cat([x, x])) if guided else (lambda x: x)  # the unconditional half follows

    rows = torch.arange(len(text), device=device).repeat_interleave(cfg.n)  # (B,) the prompt of each picture
    if guided:
        text = torch.cat([text, empty[None]])
        rows = torch.cat([rows, rows.new_full((b,), len(text) - 1)])  # (2B,)
    prompt_cache = Cache(model, len(text), t)
    begin, memory = model.read(text)
    hidden = model.trunk(begin, 0, prompt_cache, memory)[:, -1:][rows]  # (2B, 1, D): predicts code 0
    cache = prompt_cache.spread(model, rows, p + n_image - 1)
    before = torch.cat([codes[:, :0] if low is None else low, codes[:, :m]], 1)  # (B, M+m)
    if before.shape[1] and stop:
        hidden = model.trunk(model.code_ids(both(before)), t, cache)[:, -1:]
    places = torch.arange(p, p + n_image, device=device)
    for i in range(m, stop):
        logits, u = model.image_head(hidden)[:, 0].float(), (i + 1) / n_image  # (2B, V)
        if guided:
            logits = guide(*logits.chunk(2), scheduled(cfg.cfg_scale, cfg.cfg_schedule, u))
        code = draw(filtered(logits, cfg, u), noise[i])
        codes[:, i] = torch.where(given[:, i], codes[:, i], code) if forced[i] else code
        if watch:
            watch(codes)
        if i + 1 < stop:
            ids = both(model.code_ids(codes[:, i : i + 1]))
            if model.step:
                hidden = model.step(ids, places[i : i + 1], cache.upto(p + i + 1))
            else:
                hidden = model.trunk(ids, p + i, cache)
    return codes


def draw_codes(model, text, empty, cfg, known=None, low=None, watch=None, seeds=None):
    """`generate`, or for a masked prior `masked.unmask`."""
    loop = unmask if model.cfg.objective == "masked" else generate
    return loop(model, text, empty, cfg, known, low, watch, seeds)


# --- captions and scores -----------------------------------------------------------------------------


@torch.inference_mode()
def write_captions(model, codes, bos, eos, cfg):
    """A captioner (--order image) reads codes (P, N) -> ids (P*n, T), pads after the end mark."""
    t, b, n_image = model.cfg.text_len, len(codes) * cfg.n, codes.shape[1]
    noise = picture_noise(range(cfg.seed, cfg.seed + b), t, codes.device)
    rows = torch.arange(len(codes), device=codes.device).repeat_interleave(cfg.n)
    cache = Cache(model, len(codes), 1 + n_image)
    start = torch.cat([torch.full_like(codes[:, :1], bos), model.code_ids(codes)], 1)
    hidden = model.trunk(start, 0, cache)[:, -1:][rows]
    cache = cache.spread(model, rows, n_image + t - 1)
    ids = (model.cfg.n_vocab + torch.arange(t, device=codes.device)).repeat(b, 1)  # pads
    ids[:, 0], done = bos, torch.zeros(b, dtype=torch.bool, device=codes.device)
    for i in range(1, t):
        token = draw(filtered(model.text_head(hidden)[:, 0].float(), cfg, i / t), noise[i])
        ids[:, i] = torch.where(done, ids[:, i], token)
        done |= token == eos
        if done.all() or i + 1 == t:
            break
        hidden = model.trunk(ids[:, i : i + 1], n_image + i, cache)
    return ids


@torch.inference_mode()
def text_loss(model, text, codes):
    """CapLoss with a captioner: mean loss of each picture's caption tokens, text (B, T), codes (B, N) -> (B,) nats.

    CogView, arXiv:2105.13290 sec. 3.2 (the mean over tokens, not the sum).
    """
    target = model.text_targets(text)
    loss = F.cross_entropy(model.logits(text, codes)[0].float().mT, target, reduction="none")  # (B, T-1)
    return loss.sum(1) / (target >= 0).sum(1).clamp_min(1)


@torch.inference_mode()
def image_loss(model, text, codes, low=None):
    """Mean loss of each picture's codes under a causal prior, -log p(codes | text) / N: (B,) nats."""
    return F.cross_entropy(model.logits(text, codes, low)[1].float().mT, codes, reduction="none").mean(1)


# --- a prior with all that belongs to it ---------------------------------------------------------------


def file_hash(path):
    """The first 16 digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def load_vq(folder, device="cpu"):
    """A tokenizer's checkpoint folder -> VQ, frozen, which knows its weights' hash; ValueError if it is none."""
    config = read_config(folder)
    if config.get("kind") != "vq":
        raise ValueError(f"{folder} is not a tokenizer; train_vq.py makes one")
    vq = load_model(folder, VQ(pick(VQConfig, config["model"]))).to(device).requires_grad_(False)
    vq.hash = file_hash(Path(folder, "model.safetensors"))
    return vq


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

    def __init__(self, folder, device="cpu", dtype=torch.float32, vq="", kind="prior", compiled=False):
        """vq: a folder whose decoder is used instead: a finetuned or enlarging one of the same codes.

        compiled: drawing code by code is compiled, which pays for many pictures.
        kind "contrast": two towers, which score pictures and draw none.
        """
        config = read_config(folder)
        if config.get("kind") != kind:
            what = "not a prior" if kind == "prior" else "no pair of towers (--objective contrast)"
            raise ValueError(f"{folder} is {what}; train_prior.py makes one")
        self.config, self.device = config, torch.device(device)
        model = (GPT if kind == "prior" else Contrast)(pick(GPTConfig, config["model"]))
        self.prior = load_model(folder, model).to(self.device, dtype).requires_grad_(False)
        if compiled and kind == "prior":
            self.prior.compile_step()
        self.vq = load_vq(Path(folder, "vq"), self.device)
        own, self.vq_hash = self.vq.state_dict(), self.vq.hash
        if vq:
            self.vq = load_vq(vq, self.device)
            other = self.vq.state_dict()

            def same(a, b):  # float16 copies pass
                return b is not None and a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-3)

            stays = ("encoder.", "quantizer.codebook")  # the latter alone is alike in all of fsq
            if not all(same(v, other.get(k)) for k, v in own.items() if k.startswith(stays)):
                raise ValueError(f"the codes of {vq} are not those of {folder}; use one finetuned from its tokenizer")
        self.text = load_text(folder, config, self.device)
        self.hash = file_hash(Path(folder, "model.safetensors"))
        self.size = tuple(s * self.vq.cfg.stride for s in (self.prior.cfg.grid_h, self.prior.cfg.grid_w))

    def ids(self, prompts):
        """prompts -> ids (P, T), or states (P, T, W)."""
        return torch.stack([self.text.encode(prompt) for prompt in prompts]).to(self.device)

    def codes(self, prompts, cfg, known=None, low=None, watch=None, seeds=None):
        """Draw codes: all pictures of a prompt, then the next prompt's -> (P*n, h, w).

        known (P*n, h, w), -1 where to draw; its grid may be larger than the prior's.  low (P*n, h/f, w/f): the codes of
        the smaller pictures, for a prior that enlarges f times.  seeds as in `generate`.  ValueError if the sizes do not fit.
        """
        c, b = self.prior.cfg, len(prompts) * cfg.n
        own, f = (c.grid_h, c.grid_w), c.low
        if c.order == "image":
            raise ValueError("this prior is a captioner (--order image), which draws no pictures")
        if bool(f) != (low is not None):
            raise ValueError(
                "this prior enlarges pictures: give it one (sample.py --enlarge)"
                if f
                else "this prior does not enlarge pictures"
            )
        if known is None:
            grid = own if low is None else (f * low.shape[1], f * low.shape[2])
            known = torch.full((b, *grid), -1, device=self.device)
        grid, ids, empty = tuple(known.shape[1:]), self.ids(prompts), self.ids([""])[0]
        if grid[0] < own[0] or grid[1] < own[1]:
            raise ValueError(f"{grid[0]}x{grid[1]} codes are fewer than the {own[0]}x{own[1]} this prior draws")
        if f and (grid[0] % f or grid[1] % f):
            raise ValueError(f"{grid[0]}x{grid[1]} codes are not a multiple of {f}, the factor this prior enlarges by")
        seeds = seeds or range(cfg.seed, cfg.seed + b)

        def window(part, k, top, left):
            small = None
            if f:
                small = low[:, top // f : (top + own[0]) // f, left // f : (left + own[1]) // f].flatten(1)
            own_seeds = [s + 1_000_003 * k for s in seeds]  # noise of its own for each window
            alone = None if grid != own or watch is None else lambda codes: watch(codes.view(-1, *own))
            codes = draw_codes(self.prior, ids, empty, cfg, part.flatten(1), small, alone, own_seeds)
            return codes.view(-1, *own)

        if grid == own:
            return window(known, 0, 0, 0)
        causal = c.objective == "causal" and not f
        plan = every_place(grid, own) if causal else centre_outward(grid, own, f or 1)
        return slide(window, known, own, plan, watch)

    def captions(self, images, cfg):
        """A captioner reads images (B, 3, H, W) -> cfg.n captions for each, of printable characters."""
        codes, sp = self.vq.encode(images.to(self.device)).flatten(1), self.text.sp
        ids = write_captions(self.prior, codes, sp.bos_id(), sp.eos_id(), cfg)
        captions = ["".join(c for c in self.text.decode(row) if c.isprintable()) for row in ids]
        return [captions[i : i + cfg.n] for i in range(0, len(captions), cfg.n)]

    @torch.inference_mode()
    def images(self, codes):
        """codes (B, h, w) -> images (B, 3, H, W) in [-1, 1]; gray where a code is -1."""
        images = self.vq.decode(codes.clamp_min(0))
        s = images.shape[2] // codes.shape[1]
        hidden = (codes < 0)[:, None].repeat_interleave(s, 2).repeat_interleave(s, 3)
        return images.masked_fill(hidden, 0.0)

    def draw(self, prompts, cfg, known=None, batch=64, bar=None, watch=None, failed=None):
        """Any number of (k, prompt), at most `batch` pictures at a time -> yields (k, prompt, codes (n, h, w)).

        Picture i of prompt k has seed cfg.seed + k cfg.n + i.  known (1, h, w): of all pictures.  watch([(k, prompt)], codes
        (P, m, h, w)): called as they grow; bar: a tqdm bar that counts prompts.  failed(k, prompt, error): called for a
        prompt that cannot be drawn, which is then left out; without it the error is raised.
        """

        def batches(some):
            for i in range(0, cfg.n, batch):  # pictures of one prompt may not fit into one batch
                part = replace(cfg, n=min(batch, cfg.n - i))
                given = None if known is None else known.expand(len(some) * part.n, -1, -1)
                seeds = [cfg.seed + k * cfg.n + i + j for k, _ in some for j in range(part.n)]

                def grown(codes):
                    if bar is not None:
                        bar.show(lambda: len(some) * (i + float((codes >= 0).float().mean()) * part.n) / cfg.n)
                    if watch:
                        watch(some, codes.unflatten(0, (len(some), part.n)))

                codes = self.codes(
                    [p for _, p in some], part, given, None, grown if bar is not None or watch else None, seeds
                )
                yield codes.unflatten(0, (len(some), part.n))

        def attempt(some):
            try:
                return [(*which, codes) for which, codes in zip(some, torch.cat(list(batches(some)), 1))]
            except (RuntimeError, ValueError) as e:  # no memory left is a RuntimeError: try fewer at once
                if failed is None:
                    raise
                if len(some) == 1:
                    failed(*some[0], e)
                    return []
            # here, as the error holds what the failed attempt had on the device
            return attempt(some[: len(some) // 2]) + attempt(some[len(some) // 2 :])

        prompts = iter(prompts)
        while some := list(islice(prompts, max(1, batch // cfg.n))):
            yield from attempt(some)
            if bar is not None:
                bar.update(len(some))

    def paint(self, prompts, cfg, batch=64, bar=False):
        """As `draw`, of a list of prompts, but yields (prompt, images (n, 3, H, W)); bar: whether to show one."""
        with Bar(len(prompts), disable=not bar) as shown:
            for _, prompt, codes in self.draw(enumerate(prompts), cfg, batch=batch, bar=shown if bar else None):
                yield prompt, torch.cat([self.images(part) for part in codes.split(batch)])


@torch.inference_mode()
def code_losses(painter, other, prompt, codes, batch=64):
    """Loss of each of the codes (n, h, w) that painter drew for a prompt, lower is better -> (n,).

    other: a captioner, for the caption's loss; two towers, for their mismatch; None, for the codes' own loss.
    """
    judge, out = other or painter, []
    if other and other.prior.cfg.objective != "contrast" and other.prior.cfg.order != "image":
        raise ValueError("the loss of a caption needs a captioner; train one with --order image")
    for part in codes.split(batch):
        if judge.vq_hash != painter.vq_hash:
            part = judge.vq.encode(shrink(painter.images(part), painter.vq.cfg.upscale))
        c = judge.prior.cfg
        if tuple(part.shape[1:]) != (c.grid_h, c.grid_w) or c.low or c.objective == "masked":
            raise ValueError(
                f"pictures of {part.shape[1]}x{part.shape[2]} codes cannot be scored with a {c.objective} prior of "
                f"{c.grid_h}x{c.grid_w}" + (f" that enlarges {c.low} times" if c.low else "")
            )
        score = mismatch if c.objective == "contrast" else text_loss if other else image_loss
        out.append(score(judge.prior, judge.ids([prompt] * len(part)), part.flatten(1)))
    return torch.cat(out)


class Bar(tqdm):
    """A progress bar over prompts that also moves within one, at most five times a second."""

    def __init__(self, total=None, **how):
        super().__init__(
            total=total, bar_format="{l_bar}{bar}| {n:.1f}/{total_fmt} prompts [{elapsed}<{remaining}]", **how
        )

    def show(self, share):
        """share: function without arguments -> prompts' worth of work done since the last update."""
        if not self.disable and time.monotonic() - self.last_shown > 0.2:
            self.last_shown, n = time.monotonic(), self.n
            self.n = n + share()
            self.refresh()
            self.n = n

    last_shown = 0.0
