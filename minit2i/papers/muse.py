r"""Muse: Text-To-Image Generation via Masked Generative Transformers, Chang et al., 2023-01, arXiv:2301.00704.

The masked model is MaskGIT, Chang et al., 2022-02, arXiv:2202.04200.  Its masked tokens are "hidden codes" here: "mask"
means the attention mask.

What it adds
    tokenizer   Taming's VQGAN, convolutional throughout                       taming.py, --attention none
                its decoder is finetuned afterwards                            parti.py:load_frozen, --train decoder
    prior       hidden codes learned from visible ones; cosine mask rate       MaskedGPT.loss, hide
                all blocks attend to the caption: to a frozen T5's states,     FrozenEncoder, T5, T5Text
                to those of another prior's encoder, frozen,                   PriorText
                or to those of an encoder trained with the prior               parti.py:TextEncoder
                a tenth of the captions dropped: they attend to nothing        --cond_drop, Condition.memory_seen
                all codes sampled in parallel, over a few steps                MaskedGPT.generate, n_still_hidden
                super-resolution: a second masked model, of a finer            CoarseCodes, --enlarge_steps
                tokenizer's codes, attends to the text and the coarse codes
                inpainting and outpainting without finetuning                  MaskedGPT.generate (known)
                guidance that rises over the steps, negative prompts           sample.py:SCHEDULES, --negative

What differs here
    The recipe trains a text encoder of its own, whose positions are relative (rotary), as T5's are.  Hidden codes teach
    it slowly to tell "above" from "below" (results, "text-encoders").  --condition t5 reads the captions with a frozen
    encoder, as the paper does: a T5's, or that of another prior, such as parti's.
    Pads are hidden from attention, as T5 hides them; the paper does not say.
    Super-resolution is from the same image size unless --coarse_shrink 2 (Muse: 256 to 512 pixels).  That 2 blocks read
    the coarse codes, and one begin token stands before the codes, is our choice.
    Mask-free editing, which resamples a few codes of an image at a time, is left out.
    Sampling is at the temperature and top-p of all priors (MaskGIT: 1, all codes).
    AdamW replaces Adafactor, with the same beta2 and weight decay; learning rates fall along a cosine.

Commands
    python -m minit2i.papers.muse                                      both stages on generated scenes, in minutes
    python train_vq.py --recipe muse --data path/to/images --out out/muse-vq
    python train_prior.py --recipe muse --data path/to/images --vq out/muse-vq --out out/muse
    python train_prior.py --recipe muse --condition t5 --t5 path/to/t5-v1_1-base --data path/to/images \
        --vq out/muse-vq --out out/muse-t5                             or, on a laptop, --t5 out/parti
    python train_vq.py --recipe muse --stride 4 --data path/to/images --out out/muse-vq4
    python train_prior.py --recipe muse --condition encoder,coarse_codes --coarse_vq out/muse/vq \
        --data path/to/images --vq out/muse-vq4 --out out/muse-larger
    python sample.py --model out/muse --prompt "a red circle" --enlarge out/muse-larger
    python sample.py --model out/muse --prompt "a red circle" --steps 12 --image photo.png --inpaint_mask hole.png

results: minit2i/experiments/README.md, "priors", "six-tokenizers", "six-systems", "text-positions", "text-encoders",
    "masked-steps", "masked-guidance", "cascade"
"""

import hashlib
import math
import os
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from minit2i.checkpoint import file_hash, load_model, read_config, read_hf
from minit2i.config import Settings, at_least, between, pick
from minit2i.data import cached_array
from minit2i.demo import PATCHWISE, demo
from minit2i.gpt import CONDITIONS, GPT, MODELS, Condition, Context, Linear, Prior, View
from minit2i.gpt import build_prior, views_of, without_text
from minit2i.papers.dalle import gumbel_noise
from minit2i.papers.parti import Encoder
from minit2i.papers.taming import RECIPE as TAMING
from minit2i.tokens import Text, read_pieces
from minit2i.vq import build_vq, shrink

# --- STAGE 1: tokenizer ----------------------------------------------------------------------------------
# Nothing to add: Taming's VQGAN, with --attention none.


# --- STAGE 2: prior --------------------------------------------------------------------------------------
# Shapes: P prompts, n images of each, B batch = P*n, T text length, N codes of an image, V codes, W width of T5
# states, H heads.


def hide(codes, generator=None):
    """codes (B, N) -> the same with -1 where they are hidden: a share cos(pi u / 2) of each image, u uniform; at
    least one.

    The share's density over (0, 1) is (2/pi) (1 - r^2)^(-1/2), its mean 2/pi.  Muse sec. 2.6.
    """
    b, n = codes.shape
    rate = torch.cos(torch.rand(b, generator=generator) * (math.pi / 2))
    count = (n * rate).round().clamp_min(1)
    rank = torch.rand(b, n, generator=generator).argsort(1).argsort(1)
    return codes.masked_fill((rank < count[:, None]).to(codes.device), -1)


def hide_each(codes, seeds):
    """`hide` with a seed for each row of codes (B, N), so that the rest of the batch does not matter."""
    return torch.cat([hide(row[None], torch.Generator().manual_seed(s)) for row, s in zip(codes, seeds)])


def n_still_hidden(n_at_start, n_hidden, u):
    """How many codes stay hidden after a step: (B,) long hidden at the start and before the step, u in (0, 1] -> (B,).

    floor(n_at_start cos(pi u / 2)), but each step keeps at least one code and leaves one for the last step.
    MaskGIT, arXiv:2202.04200 sec. 3.2, 3.3.
    """
    if u >= 1:
        return torch.zeros_like(n_hidden)
    return (n_at_start * math.cos(math.pi / 2 * u)).long().minimum(n_hidden - 1).clamp_min(1).minimum(n_hidden)


@dataclass(frozen=True)
class MaskedConfig(Settings):
    """Settings of --model masked."""

    group = "--model masked"
    label_smoothing: Annotated[float, "smoothing of the targets in training (MaskGIT)", between(0, 1)] = 0.1


@dataclass(frozen=True)
class MaskedSampling(Settings):
    """Sampling settings of masked priors."""

    group = "Masked priors"
    steps: Annotated[int, "parallel steps that an image is sampled in", at_least(1)] = 24
    enlarge_steps: Annotated[int, "the same for priors that enlarge images (Muse: 8)", at_least(1)] = 8
    choice_noise: Annotated[float, "Gumbel noise, falling to 0, on which codes a step keeps", at_least(0)] = 4.5


class MaskedGPT(GPT):
    """A prior that learns hidden codes from visible ones, and samples all of them in a few parallel steps.

    All positions see each other; a hidden code is -1 in the batch's "visible_codes", and has the row of the embedding
    table that follows the codes'.
    """

    Config, Sampling = MaskedConfig, MaskedSampling
    window_plan = "centre_outward"
    learns_text = False
    n_extra_tokens = 1

    @classmethod
    def settle(cls, cfg):
        if cfg.mask not in ("causal", "bidirectional"):  # causal is the default
            raise ValueError(f"a masked prior sees all positions, which mask {cfg.mask} does not; leave out --mask")
        return replace(cfg, mask="bidirectional")

    def embed_codes(self, codes):
        return super().embed_codes(torch.where(codes < 0, self.cfg.n_codes, codes))

    def corrupt(self, batch, seeds):
        return batch | {"visible_codes": hide_each(batch["codes"], seeds)}

    def states(self, batch):
        """-> None, hidden states that predict the codes (B, N, D), each at its own position."""
        return None, self.code_states(batch.get("visible_codes", batch["codes"]), *self.condition(batch))

    def code_states(self, codes, prefix, context):
        """codes (B, N) with -1 where hidden, and what `condition` returns -> (B, N, D)."""
        x = self.trunk(self.arrange(prefix, self.embed_codes(codes)), context=context)  # (B, L, D)
        return x[:, self.layout.n_prefix :]

    def loss(self, batch, train=False):
        """Cross-entropy of the hidden codes alone (Muse sec. 2.6); label smoothing in training."""
        target = batch["codes"].masked_fill(batch["visible_codes"] >= 0, -100)
        smoothing, states = self.cfg.label_smoothing if train else 0.0, self.states(batch)[1]
        head = self.image_head.weight, target, self.cfg.fp32_logits
        return {"image": self.head_loss(states, *head, label_smoothing=smoothing)}

    def n_targets(self, batch):
        return {"image": (batch["visible_codes"] < 0).sum()}

    def check(self, text_weight):
        """Nothing to check: no code is predicted from those before it."""

    def score(self, batch):
        return Prior.score(self, batch)  # hidden codes have no joint likelihood

    @torch.inference_mode()
    def generate(self, batch, empty, sampler, known=None, watch=None):
        """Sample all codes in parallel in `steps` steps; arguments as GPT.generate, but known codes may lie anywhere.

        Confidence is the sampled code's log probability with guidance, before filters, plus Gumbel noise times
        choice_noise (1 - u).  MaskGIT sec. 3.2.
        """
        n_prompts, b, n_image, device = len(batch["text"]), len(sampler), self.cfg.n_image, batch["text"].device
        codes = torch.full((b, n_image), -1, device=device) if known is None else known.clone()
        enlarges = any(view.ratio > 1 for view in views_of(self.cfg))
        n_at_start, n_steps = (codes < 0).sum(1), sampler.cfg.enlarge_steps if enlarges else sampler.cfg.steps  # (B,)
        rows = torch.arange(n_prompts, device=device).repeat_interleave(b // n_prompts)  # (B,) the prompt of each image
        if sampler.guided:  # the unconditional half follows
            batch, rows = without_text(batch, empty), torch.cat([rows, rows + n_prompts])
        prefix, context = self.condition(batch)  # a prompt is read once for all its images and steps
        prefix, context = prefix[rows], Context(*(None if x is None else x[rows] for x in context))
        for step in range(n_steps):
            u, noise = (step + 1) / n_steps, sampler.uniform(2, n_image)  # (B, 2, N)
            both = torch.cat([codes, codes]) if sampler.guided else codes
            logits = self.image_head(self.code_states(both, prefix, context)).float()  # (2B, N, V)
            logits = sampler.guide(logits, sampler.scale(u)).flatten(0, 1)  # (B N, V)
            sampled = sampler.pick(sampler.filter(logits), noise[:, 0].flatten()).view(b, -1)  # (B, N)
            log_p = -F.cross_entropy(logits, sampled.flatten(), reduction="none").view(b, -1)
            confidence = log_p + sampler.cfg.choice_noise * (1 - u) * gumbel_noise(noise[:, 1])
            hidden = codes < 0
            rank = confidence.masked_fill(~hidden, torch.inf).argsort(1).argsort(1)  # the least confident first
            n_stay = n_still_hidden(n_at_start, hidden.sum(1), u)
            codes = torch.where(hidden, sampled, codes).masked_fill(hidden & (rank < n_stay[:, None]), -1)
            if watch:
                watch(codes)
        return codes


MODELS["masked"] = MaskedGPT


# A frozen T5 v1.1 encoder (arXiv:1910.10683; gated GELU, arXiv:2002.05202) from a local folder in the Hugging Face
# layout: config.json, spiece.model, model.safetensors or its shards.  The residual stream, the attention scores, the
# softmax and the last feed-forward product are float32 whatever the weights are, as they overflow in float16.


@dataclass(frozen=True)
class T5Config:
    """The fields of T5's config.json that matter here, under their names there."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


def bucket(distance, n, far):
    """Bucket of a key's distance from the query: half of the n buckets for each direction, single distances first, then
    logarithmically wider ones up to `far`, which all larger ones share.  T5 sec. 2.1."""
    n //= 2
    d, single = distance.abs(), n // 2
    wide = single + ((d.clamp_min(1) / single).log() / math.log(far / single) * (n - single)).long()
    return (distance > 0) * n + torch.where(d < single, d, wide.clamp_max(n - 1))


class T5Norm(nn.RMSNorm):
    """RMSNorm in float32."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.float(), self.eps)


class T5Block(nn.Module):
    """x (B, T, W) float32, bias (B, H, T, T) -> (B, T, W).  T5 does not divide scores by sqrt K."""

    def __init__(self, cfg):
        super().__init__()
        width, inner = cfg.d_model, cfg.num_heads * cfg.d_kv
        self.norm1, self.norm2 = (T5Norm(width, cfg.layer_norm_epsilon) for _ in range(2))
        self.n_head = cfg.num_heads
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width, bias=False)
        self.wi_0, self.wi_1 = (nn.Linear(width, cfg.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(cfg.d_ff, width, bias=False)

    def forward(self, x, bias):
        h = self.norm1(x).to(self.q.weight.dtype)
        q, k, v = (f(h).unflatten(2, (self.n_head, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        share = (q.float() @ k.float().transpose(2, 3) + bias).softmax(-1)  # (B, H, T, T)
        x = x + self.o((share.to(v.dtype) @ v).transpose(1, 2).flatten(2)).float()
        h = self.norm2(x).to(self.q.weight.dtype)
        gate = F.gelu(self.wi_0(h), approximate="tanh").float()
        return x + F.linear(gate * self.wi_1(h).float(), self.wo.weight.float())


class T5(nn.Module):
    """The encoder: ids (B, T), seen (B, T) False at pads -> states (B, T, W) float32."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.relative = nn.Embedding(cfg.relative_attention_num_buckets, cfg.num_heads)
        self.blocks = nn.ModuleList(T5Block(cfg) for _ in range(cfg.num_layers))
        self.norm = T5Norm(cfg.d_model, cfg.layer_norm_epsilon)

    def forward(self, ids, seen):
        at, cfg = torch.arange(ids.shape[1], device=ids.device), self.cfg
        buckets = bucket(at - at[:, None], cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance)
        bias = self.relative(buckets).float().permute(2, 0, 1)  # (H, T, T), query by key
        bias = bias[None].masked_fill(~seen[:, None, None], -torch.inf)  # (B, H, T, T)
        x = self.embedding(ids).float()
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


T5_NAMES = (  # of the Hugging Face layout -> ours
    ("encoder.block.", "blocks."),
    ("layer.0.SelfAttention.", ""),
    ("layer.1.DenseReluDense.", ""),
    ("layer.0.layer_norm", "norm1"),
    ("layer.1.layer_norm", "norm2"),
    ("encoder.final_layer_norm", "norm"),
    ("encoder.embed_tokens", "embedding"),
    ("shared", "embedding"),
    ("blocks.0.relative_attention_bias", "relative"),
)


def load_t5(folder, dtype=torch.float32):
    """The encoder of a folder, frozen, weights in dtype; ValueError if it is not a T5 v1.1."""
    config, weights = read_config(folder, ["model_type"]), {}
    if config.get("model_type") != "t5" or config.get("feed_forward_proj") != "gated-gelu":
        raise ValueError(
            f"{folder} is not a T5 v1.1 (no gated-gelu t5 in its config.json); use google/t5-v1_1-* or alike"
        )
    if missing := [f.name for f in fields(T5Config) if f.default is MISSING and f.name not in config]:
        raise ValueError(f"the config.json of {folder} lacks {', '.join(missing)}")
    for name, tensor in read_hf(folder):
        if not name.startswith(("decoder.", "lm_head.")):
            for theirs, ours in T5_NAMES:
                name = name.replace(theirs, ours)
            weights[name] = tensor.to(dtype)
    with torch.device("meta"):
        model = T5(pick(T5Config, config))
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {e}") from e
    return model.eval().requires_grad_(False)


def folder_hash(folder):
    """16 digits that identify a text encoder: its small files, and size and last MiB of each file of weights."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".json", ".model", ".safetensors")):
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 2**20))
            digest.update(f"{path.name} {size} ".encode() + f.read())
    return digest.hexdigest()[:16]


class FrozenText:
    """Captions -> states (T, W) of a frozen encoder, in place of tokens.Text and its ids.  Positions of pads, and all
    of an empty caption, are zero vectors; `FrozenEncoder.memory_seen` hides them.

    `remember` encodes all captions of a training set once, into a cache.
    """

    n_vocab = 0  # no text tokens, so no text loss
    fixed = True  # each caption is encoded once: an entry keeps one wording

    def __init__(self, folder, length, device="cpu", dtype=torch.float32):
        self.length, self.device, self.dtype, self.n_cut, self.rows = length, device, dtype, 0, {}
        self.hash, self.model = folder_hash(folder), self.load(folder).to(device)

    def load(self, folder):
        """-> the encoder: ids (B, T), seen (B, T) -> states (B, T, W)."""
        raise NotImplementedError

    def ids(self, captions):
        """captions -> ids (B, T), seen (B, T) False at pads; one that is too long is cut, and counted in n_cut."""
        raise NotImplementedError

    @torch.inference_mode()
    def states(self, captions):
        """captions -> states (B, T, W) float32."""
        ids, seen = (x.to(self.device) for x in self.ids(captions))
        empty = seen.sum(1, keepdim=True) == 1  # its begin or end token alone
        return self.model(ids, seen) * (seen & ~empty)[..., None]

    def encode(self, caption, dropout=0.0, rng=None):
        """caption -> states (T, W); dropout and rng are for tokens.Text."""
        if caption in self.rows:
            self.ids([caption])  # counts one that is cut
            return torch.from_numpy(self.memory[self.rows[caption]].astype(np.float32))
        return self.states([caption])[0].cpu()

    def __getstate__(self):
        """A spawned worker receives no model, and maps what is remembered again."""
        return self.__dict__ | ({"model": None, "memory": None} if self.rows else {})

    def __setstate__(self, state):
        self.__dict__ |= state
        if self.rows:
            self.memory = np.load(self.path, mmap_mode="r")

    def remember(self, captions, folder, procs, batch=64):
        """Encode all captions once, each process a share, into a float16 array (n, T, W) that later runs find."""
        captions = sorted({"", *captions})
        text = "\0".join([self.hash, str(self.dtype), str(self.length), *captions]).encode("utf-8", "replace")
        path, n = Path(folder, f"captions-{hashlib.sha256(text).hexdigest()[:16]}.npy"), len(captions)

        def fill(array, rows):
            for k in tqdm(range(rows.start, rows.stop, batch), desc="encoding captions", disable=not procs.main):
                part = slice(k, min(k + batch, rows.stop))
                array[part] = self.states(captions[part]).cpu().numpy()

        self.path, self.memory = path, cached_array(path, (n, self.length, self.width), np.float16, fill)
        self.rows = {caption: k for k, caption in enumerate(captions)}


class T5Text(FrozenText):
    """Reads captions with a T5 v1.1 encoder, its weights in dtype."""

    def load(self, folder):
        model, self.sp = load_t5(folder, self.dtype), read_pieces(Path(folder, "spiece.model").read_bytes())
        self.width = model.cfg.d_model
        return model

    def ids(self, captions):
        pieces = self.sp.encode(list(captions))
        self.n_cut += sum(len(p) > self.length - 1 for p in pieces)
        pieces = [[*p[: self.length - 1], self.sp.eos_id()] for p in pieces]
        ids = torch.tensor([p + [self.sp.pad_id()] * (self.length - len(p)) for p in pieces])
        return ids, torch.tensor([[t < len(p) for t in range(self.length)] for p in pieces])


class PriorText(FrozenText):
    """Reads captions with the text encoder of a trained prior (--t5 out/parti), in float32, which stands in for T5 on a
    laptop.  Pads are hidden from cross-attention even if that prior's own decoder sees them."""

    def load(self, folder):
        prior = load_model(folder, build_prior(read_config(folder)["model"])).requires_grad_(False)
        self.text, self.width = Text(Path(folder, "text.model").read_bytes(), self.length), prior.cfg.n_embd
        return PriorEncoder(prior)

    def ids(self, captions):
        before, ids = self.text.n_cut, torch.stack([self.text.encode(caption) for caption in captions])
        self.n_cut += self.text.n_cut - before
        return ids, ids < self.text.n_vocab


class PriorEncoder(nn.Module):
    """A prior's text encoder as a module: ids (B, T) -> states (B, T, W)."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, ids, seen):
        return self.prior.conditions["encoder"].memory({"text": ids}, self.prior.embed)  # knows its pads by their ids


def text_reader(folder, length):
    """A folder with a text encoder, the captions' length -> the class that reads with it, the width of its states.

    ValueError if it is neither a T5 v1.1 nor a prior with an encoder of captions of this length.
    """
    config = read_config(folder, ())
    if "kind" not in config:
        return T5Text, read_config(folder, ["d_model"])["d_model"]
    model = config.get("model", {})
    if model.get("model") == "towers" or "encoder" not in model.get("condition", "").split(","):
        raise ValueError(f"--t5 {folder} is neither a T5 v1.1 nor a prior of --condition encoder")
    if model["text_len"] != length:
        raise ValueError(f"--text_len {length}: the encoder in {folder} reads {model['text_len']} tokens; use as many")
    return PriorText, model["n_embd"]


@dataclass(frozen=True)
class FrozenEncoderConfig(Settings):
    """Settings of --condition t5."""

    group = "--condition t5"
    t5: Annotated[str, "folder of a frozen text encoder: a T5 v1.1 in Hugging Face's layout, or a prior's"] = ""
    t5_width: int = 0
    t5_hash: str = ""


class FrozenEncoder(Condition):
    """States of a frozen text encoder (T5's, or another prior's), linearly projected, as a memory for cross-attention
    (Muse sec. 2.1, 2.3).  It stays in its folder, and is known by its hash.

    One begin token stands before the codes.  Pads are hidden from attention as in T5 itself, whatever --pads says, and
    so is the whole empty caption: a dropped caption leaves self-attention alone (sec. 2.7).
    """

    Config = FrozenEncoderConfig
    reads_captions = True
    length = 1

    def __init__(self, cfg):
        super().__init__(cfg)
        self.memory_length = cfg.text_len
        self.begin = nn.Parameter(torch.empty(1, 1, cfg.n_embd))
        if cfg.pos == "learned":
            self.pos = nn.Parameter(torch.empty(1, cfg.n_embd))
        self.project = Linear(cfg.t5_width, cfg.n_embd)

    @classmethod
    def settle(cls, cfg):
        if not cfg.t5:
            raise ValueError("--condition t5 needs --t5, the folder of a frozen T5 v1.1 encoder or of a prior with one")
        cfg = replace(cfg, t5=str(Path(cfg.t5).resolve()))
        if cfg.t5_hash:
            return cfg
        return replace(cfg, t5_width=text_reader(cfg.t5, cfg.text_len)[1], t5_hash=folder_hash(cfg.t5))

    @staticmethod
    def reader(cfg, device, dtype=torch.float32):
        if not Path(cfg.t5, "config.json").exists() or folder_hash(cfg.t5) != cfg.t5_hash:
            raise ValueError(
                f"this prior reads its captions with the text encoder {cfg.t5_hash}, which is not in {cfg.t5}; put it "
                "there, or name its folder under t5 in config.json (to go on training: with --t5)"
            )
        return text_reader(cfg.t5, cfg.text_len)[0](cfg.t5, cfg.text_len, device, dtype)

    def prefix(self, batch, embed):
        return self.begin.expand(len(batch["text"]), 1, -1)

    def memory(self, batch, embed):
        return self.project(batch["text"].to(self.project.weight.dtype))  # (B, T, W) -> (B, T, D)

    def memory_seen(self, batch):
        return batch["text"].any(-1)


CONDITIONS["t5"] = FrozenEncoder


@dataclass(frozen=True)
class CoarseCodesConfig(Settings):
    """Settings of --condition coarse_codes."""

    group = "--condition coarse_codes"
    coarse_vq: Annotated[str, "the tokenizer of the prior whose images are enlarged, its folder's vq"] = ""
    coarse_shrink: Annotated[int, "how many times smaller its images are (Muse: 2)", at_least(1)] = 1
    n_coarse: Annotated[int, "blocks that read the coarse codes", at_least(1)] = 2
    coarse_hash: str = ""
    coarse_stride: int = 0
    coarse_n_codes: int = 0
    coarse_ratio: int = 0  # codes for each coarse code, in each direction


class CoarseCodes(Condition):
    """Super-resolution: the codes that a coarser tokenizer gives the image, or a smaller one, as a memory (sec. 2.4).

    Blocks of self-attention read the coarse codes; all blocks attend to their states and the text's.  Stands beside a
    text condition.
    """

    Config = CoarseCodesConfig

    def __init__(self, cfg):
        super().__init__(cfg)
        self.window_plan = "centre_outward" if cfg.mask == "bidirectional" else "centre_continuous"
        if cfg.grid_h % cfg.coarse_ratio or cfg.grid_w % cfg.coarse_ratio:
            raise ValueError(
                f"{cfg.grid_h}x{cfg.grid_w} codes are not a multiple of {cfg.coarse_ratio}, the codes for each coarse "
                "one; use another --image_size"
            )
        self.memory_length = (cfg.grid_h // cfg.coarse_ratio) * (cfg.grid_w // cfg.coarse_ratio)
        self.embedding = nn.Embedding(cfg.coarse_n_codes, cfg.n_embd)
        self.encoder = Encoder(cfg, cfg.n_coarse, self.memory_length, learned=True)

    @classmethod
    def settle(cls, cfg):
        if cfg.condition == "coarse_codes":
            raise ValueError("coarse_codes stands beside a caption: use --condition encoder,coarse_codes or alike")
        if cfg.coarse_hash:
            return cfg
        if not cfg.coarse_vq:
            raise ValueError("--condition coarse_codes needs --coarse_vq, the vq of the folder of a prior to enlarge")
        with torch.device("meta"):
            vq = build_vq(read_config(cfg.coarse_vq)["model"]).cfg
        found = file_hash(Path(cfg.coarse_vq, "model.safetensors"))
        return replace(cfg, coarse_hash=found, coarse_stride=vq.stride, coarse_n_codes=vq.n_codes)

    @classmethod
    def fit(cls, cfg, stride):
        ratio, rest = divmod(cfg.coarse_stride * cfg.coarse_shrink, stride)
        if rest or ratio < 2:
            raise ValueError(
                f"the coarse tokenizer's stride {cfg.coarse_stride}, times coarse_shrink {cfg.coarse_shrink}, is not a "
                f"multiple of the stride {stride} of --vq, or not above it; use a finer tokenizer as --vq"
            )
        return replace(cfg, coarse_ratio=ratio)

    @staticmethod
    def extra_codes(cfg):
        name = f"shrink{cfg.coarse_shrink}" if cfg.coarse_shrink > 1 else ""
        view = partial(shrink, scale=cfg.coarse_shrink)
        return View("coarse", view, name, cfg.coarse_ratio, cfg.coarse_vq, cfg.coarse_hash)

    def memory(self, batch, embed):
        return self.encoder(self.embedding(batch["coarse"]))  # (B, M, D)


CONDITIONS["coarse_codes"] = CoarseCodes


# --- RECIPE ----------------------------------------------------------------------------------------------

RECIPE = {  # sec. 2; sizes, codebook and steps are a laptop's, for images of 64 pixels
    "vq": TAMING["vq"] | dict(attention="none"),
    "prior": dict(model="masked", condition="encoder", n_encoder=2, pads="hidden")
    | dict(norm="layernorm", mlp="gelu", qk_norm=False, pos="learned")
    | dict(label_smoothing=0.1, text_weight=0.0, bpe_dropout=0.0, beta2=0.96, weight_decay=0.045),
}


if __name__ == "__main__":
    demo(
        "muse",
        __doc__,
        expect="the right colours, striped cyan squares, a star; a masked prior learns every order, which takes more steps",
        vq=PATCHWISE  # cogview's tokenizer: a masked prior learns VQGAN's codes too slowly
        + " --backbone vqvae --quantizer ema --recon l2 --discriminator none --beta1 0.9 --beta2 0.95",
        prior="--steps 3000",
        sample="--steps 12 --choice_noise 1",
    )
