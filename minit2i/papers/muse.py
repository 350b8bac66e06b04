r"""Muse: Text-To-Image Generation via Masked Generative Transformers, Chang et al., 2023-01, arXiv:2301.00704.

The masked model is MaskGIT, Chang et al., 2022-02, arXiv:2202.04200.  Its masked tokens are "hidden codes" here: "mask"
means the attention mask.

What it adds
    tokenizer   Taming's VQGAN; its decoder is finetuned afterwards            parti.py:load_frozen, --train decoder
    prior       hidden codes learned from visible ones; cosine mask rate       MaskedGPT.loss, hide
                all codes sampled in parallel, over a few steps                MaskedGPT.generate, n_still_hidden
                inpainting and outpainting without finetuning                  MaskedGPT.generate (known)
                a frozen T5 encoder reads the caption, for cross-attention     FrozenT5, T5, T5Text
                guidance that rises over the steps, negative prompts           sample.py:SCHEDULES, --negative
                a tenth of the captions dropped in training                    tokens.py:Coded, --cond_drop
                super-resolution by a second masked model                      --model masked --condition text,coarse

What differs here
    The VQGAN keeps its attention (Muse's is convolutional throughout, for images larger than it was trained on).
    Captions are SentencePiece ids in the prefix unless --condition t5 names a T5 folder; its pads are learned vectors.
    Super-resolution encodes the smaller image with the same tokenizer and puts its codes in the prefix (Muse: codes of
    a finer tokenizer, which attends to the coarse codes).
    Mask-free editing is left out.
    Sampling is at the temperature and top-p of all priors (MaskGIT: 1, all codes).
    AdamW replaces Adafactor, with the same beta2 and weight decay; learning rates fall along a cosine.

Commands
    python -m minit2i.papers.muse                                      both stages on generated scenes, in minutes
    python train_vq.py --recipe muse --data path/to/images --out out/muse-vq
    python train_prior.py --recipe muse --data path/to/images --vq out/muse-vq --out out/muse
    python train_prior.py --recipe muse --condition t5 --t5 path/to/t5-v1_1-base --data path/to/images \
        --vq out/muse-vq --out out/muse-t5
    python sample.py --model out/muse --prompt "a red circle" --steps 12 --image photo.png --inpaint_mask hole.png

results: minit2i/experiments/README.md, "masked-steps", "masked-guidance"
"""

import hashlib
import math
import os
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from minit2i.checkpoint import read_config, read_hf
from minit2i.config import Settings, at_least, between, pick
from minit2i.data import cached_array
from minit2i.demo import demo
from minit2i.gpt import CONDITIONS, GPT, MODELS, Condition, Linear, Prior, cross_entropy, without_text
from minit2i.papers.taming import RECIPE as TAMING
from minit2i.tokens import read_pieces

# --- STAGE 1: tokenizer ----------------------------------------------------------------------------------
# Nothing to add: Taming's VQGAN.


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
    choice_noise: Annotated[float, "Gumbel noise, falling to 0, on which codes a step keeps", at_least(0)] = 4.5


class MaskedGPT(GPT):
    """A prior that learns hidden codes from visible ones, and samples all of them in a few parallel steps.

    All positions see each other; a hidden code is -1 in the batch's "visible_codes" and the last token id in the table.
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

    def logits(self, batch):
        """-> None, logits of all codes (B, N, n_codes), each from its own position."""
        prefix, context = self.condition(batch)
        codes = batch.get("visible_codes", batch["codes"])
        x = self.trunk(self.arrange(prefix, self.embed_codes(codes)), context=context)
        return None, self.image_head(x[:, self.layout.n_prefix :])

    def loss(self, batch, train=False):
        """Cross-entropy of the hidden codes alone (Muse sec. 2.6); label smoothing in training."""
        target = batch["codes"].masked_fill(batch["visible_codes"] >= 0, -100)
        smoothing = self.cfg.label_smoothing if train else 0.0
        return {"image": cross_entropy(self.logits(batch)[1], target, label_smoothing=smoothing)}

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
        b, n_image, device = len(sampler), self.cfg.n_image, batch["text"].device
        codes = torch.full((b, n_image), -1, device=device) if known is None else known.clone()
        n_at_start, n_steps = (codes < 0).sum(1), sampler.cfg.steps  # (B,)
        batch = {k: v.repeat_interleave(b // len(v), 0) for k, v in batch.items()}
        if sampler.guided:
            batch = without_text(batch, empty)  # (2B, ...)
        for step in range(n_steps):
            u, noise = (step + 1) / n_steps, sampler.uniform(2, n_image)  # (B, 2, N)
            both = torch.cat([codes, codes]) if sampler.guided else codes
            logits = self.logits(batch | {"codes": both})[1].float()  # (2B, N, V)
            logits = sampler.guide(logits, u).flatten(0, 1)  # (B N, V)
            sampled = sampler.pick(sampler.filter(logits), noise[:, 0].flatten()).view(b, -1)  # (B, N)
            log_p = -F.cross_entropy(logits, sampled.flatten(), reduction="none").view(b, -1)
            gumbel = -(-noise[:, 1].clamp_min(1e-20).log()).clamp_min(1e-20).log()
            confidence = log_p + sampler.cfg.choice_noise * (1 - u) * gumbel
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


class T5Text:
    """Captions -> states (T, W) of the frozen encoder, zeros at pads; in place of tokens.Text and its ids.

    `remember` encodes all captions of a training set once, into a cache.
    """

    n_vocab = 0  # no text tokens, so no text loss
    fixed = True  # each caption is encoded once: an entry keeps one wording

    def __init__(self, folder, length, device="cpu", dtype=torch.float32):
        self.model, self.length, self.device = load_t5(folder, dtype).to(device), length, device
        self.sp = read_pieces(Path(folder, "spiece.model").read_bytes())
        self.width, self.hash, self.n_cut, self.rows = self.model.cfg.d_model, folder_hash(folder), 0, {}

    @torch.inference_mode()
    def states(self, captions):
        """captions -> states (B, T, W) float32; one that is too long is cut, and counted in n_cut."""
        pieces = self.sp.encode(list(captions))
        self.n_cut += sum(len(p) > self.length - 1 for p in pieces)
        pieces = [[*p[: self.length - 1], self.sp.eos_id()] for p in pieces]
        ids = torch.tensor([p + [self.sp.pad_id()] * (self.length - len(p)) for p in pieces])
        seen = torch.tensor([[t < len(p) for t in range(self.length)] for p in pieces])
        states = self.model(ids.to(self.device), seen.to(self.device))
        return states * seen[..., None].to(self.device)

    def encode(self, caption, dropout=0.0, rng=None):
        """caption -> states (T, W); dropout and rng are for tokens.Text."""
        if caption in self.rows:
            self.n_cut += len(self.sp.encode(caption)) > self.length - 1
            return torch.from_numpy(self.memory[self.rows[caption]].astype(np.float32))
        return self.states([caption])[0].cpu()

    def remember(self, captions, folder, procs, batch=64):
        """Encode all captions once, each process a share, into a float16 array (n, T, W) that later runs find."""
        captions = sorted({"", *captions})
        text = "\0".join([self.hash, str(self.length), *captions]).encode("utf-8", "replace")
        path, n = Path(folder, f"states-{hashlib.sha256(text).hexdigest()[:16]}.npy"), len(captions)

        def fill(array, rows):
            for k in tqdm(range(rows.start, rows.stop, batch), desc="encoding captions", disable=not procs.main):
                part = slice(k, min(k + batch, rows.stop))
                array[part] = self.states(captions[part]).cpu().numpy()

        self.memory = cached_array(path, (n, self.length, self.width), np.float16, fill)
        self.rows = {caption: k for k, caption in enumerate(captions)}


@dataclass(frozen=True)
class FrozenT5Config(Settings):
    """Settings of --condition t5."""

    group = "--condition t5"
    t5: Annotated[str, "folder of a frozen T5 v1.1 encoder, Hugging Face layout, that reads the captions"] = ""
    t5_width: int = 0
    t5_hash: str = ""


class FrozenT5(Condition):
    """States of a frozen T5 encoder, linearly projected, as a memory for cross-attention (Muse sec. 2.1, 2.3).

    One begin token stands before the codes.  Deviation: a pad is a learned vector of its text position, as in DALL-E.
    """

    Config = FrozenT5Config
    reads_captions = True
    length = 1

    def __init__(self, cfg):
        super().__init__(cfg)
        self.memory_length = cfg.text_len
        self.begin, self.pads = (
            nn.Parameter(torch.empty(1, 1, cfg.n_embd)),
            nn.Parameter(torch.empty(cfg.text_len, cfg.n_embd)),
        )
        if cfg.pos == "learned":
            self.pos = nn.Parameter(torch.empty(1, cfg.n_embd))
        self.project = Linear(cfg.t5_width, cfg.n_embd)

    @classmethod
    def settle(cls, cfg):
        if cfg.t5_hash:
            return cfg
        if not cfg.t5:
            raise ValueError("--condition t5 needs --t5, the folder of a frozen T5 v1.1 encoder")
        return replace(
            cfg,
            t5=str(Path(cfg.t5).resolve()),
            t5_width=read_config(cfg.t5, ["d_model"])["d_model"],
            t5_hash=folder_hash(cfg.t5),
        )

    @staticmethod
    def reader(cfg, device, dtype=torch.float32):
        if not Path(cfg.t5, "config.json").exists() or folder_hash(cfg.t5) != cfg.t5_hash:
            raise ValueError(
                f"this prior reads its captions with the text encoder {cfg.t5_hash}, which is not in {cfg.t5}; put it "
                "there, or name its folder under t5 in config.json"
            )
        return T5Text(cfg.t5, cfg.text_len, device, dtype)

    def prefix(self, batch, embed):
        return self.begin.expand(len(batch["text"]), 1, -1)

    def memory(self, batch, embed):
        states = batch["text"]  # (B, T, W), zeros at pads
        projected = self.project(states.to(self.project.weight.dtype))
        return torch.where(states.any(-1, keepdim=True), projected, self.pads)


CONDITIONS["t5"] = FrozenT5


# --- RECIPE ----------------------------------------------------------------------------------------------

RECIPE = {  # sec. 2; sizes, codebook and steps are a laptop's, for images of 64 pixels
    "vq": TAMING["vq"],
    "prior": dict(model="masked", norm="layernorm", mlp="gelu", qk_norm=False, pos="learned")
    | dict(label_smoothing=0.1, text_weight=0.0, bpe_dropout=0.0, beta2=0.96, weight_decay=0.045),
}


if __name__ == "__main__":
    demo(
        "muse",
        __doc__,
        expect="blobs of the right colours: a masked prior learns every order, which takes several times the steps",
        vq="--ch 16 --decoder vqvae --decoder_ch 32 --recon l2 --quantizer ema --discriminator none --lr 2e-3",
        prior="--optimizer muon --lr 3e-3",
        sample="--steps 12 --choice_noise 1",
    )
