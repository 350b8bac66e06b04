"""Two towers, for captions and for pictures' codes, that tell which belong together: CLIP, arXiv:2103.00020.

The caption's tower is Parti's text encoder (gpt.py:Encoder), which is pre-trained so: hidden words are predicted (BERT,
arXiv:1810.04805 sec. 3.1) while caption and picture are told from the others of the batch (Parti, arXiv:2206.10789 sec. 2.2).
A Parti prior starts from it with --init, and sample.py --rerank contrastive sorts pictures by it, as DALL-E
(arXiv:2102.12092 sec. 2.6) and Parti do.

Deviations: the picture's tower reads the tokenizer's codes, not pixels; each tower's feature is the mean over its positions
(pads left out), not one mark's state; equal captions in a batch count as different, as they do in CLIP.

Shapes: B batch, over all processes b, T text length, N codes of a picture, D width, V words.
"""

import math
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather

from minit2i.blocks import Head, Linear, init_weights
from minit2i.fp16 import shrink_gradient
from minit2i.gpt import Encoder, check
from minit2i.parallel import processes

HOTTEST = math.log(100)  # CLIP sec. 2.5: logits are multiplied by 100 at most


def is_word(text, n_vocab):
    """Where text (B, T) has what may be hidden: no beginning or end mark, no pad -> (B, T)."""
    ids = text < n_vocab
    following = F.pad(ids[:, 1:], (0, 1))  # the end mark is the last before the pads, if any
    return ids & following & (torch.arange(text.shape[1], device=text.device) > 0)


def hide_words(text, n_vocab, mask, generator=None):
    """text (B, T) -> (B, 2, T): the ids to read, and those to predict, -100 elsewhere.  BERT sec. 3.1.

    15 % of the words are to be predicted: 80 % of those read as the id `mask`, 10 % as any word, 10 % as they are.
    """
    u, how = torch.rand(2, *text.shape, generator=generator).to(text.device)
    other = torch.randint(n_vocab, text.shape, generator=generator).to(text.device)
    chosen = is_word(text, n_vocab) & (u < 0.15)
    read = torch.where(chosen & (how < 0.8), mask, torch.where(chosen & (how >= 0.9), other, text))
    return torch.stack([read, text.masked_fill(~chosen, -100)], 1)


def everyones(x):
    """x (b, D) of each process, as many in all -> (B, D), whose gradients find back; the place of the own ones."""
    rank, world = processes()
    return (torch.cat(all_gather(x.contiguous())), rank * len(x)) if world > 1 else (x, 0)


def info_nce(text, image, scale):
    """Summed cross-entropy of finding each own caption's picture among all, and the reverse, halved -> (), in nats.

    text, image (b, D) of norm 1; scale multiplies their cosines.  CLIP fig. 3.  All processes' features are gathered, so
    that their sums add up to one process's on the whole batch.
    """
    texts, first = everyones(text)
    images, _ = everyones(image)
    own = torch.arange(first, first + len(text), device=text.device)
    to_image, to_text = scale * text @ images.T, scale * image @ texts.T  # (b, B)
    return (F.cross_entropy(to_image, own, reduction="sum") + F.cross_entropy(to_text, own, reduction="sum")) / 2


class Contrast(nn.Module):
    """n_encoder blocks for captions, n_layer for codes.  Token ids as in GPT: text, pads, codes, the mask token last."""

    masked = text_ahead = False
    block_scales = None

    def __init__(self, cfg):
        super().__init__()
        check(cfg)
        if not cfg.n_encoder or cfg.low or cfg.n_states or cfg.order != "text":
            raise ValueError(
                "objective contrast trains a text encoder beside one of codes: it needs --n_encoder 1 or more, "
                "--order text, and neither --low nor --text_encoder"
            )
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.n_vocab + cfg.text_len + cfg.n_codes + 1, cfg.n_embd)
        self.encoder = Encoder(cfg)
        self.picture = Encoder(replace(cfg, n_encoder=cfg.n_layer, text_len=cfg.n_image, pos="learned"))
        self.text_head = Head(cfg, cfg.n_vocab)
        self.text_out, self.image_out = Linear(cfg.n_embd, cfg.n_embd), Linear(cfg.n_embd, cfg.n_embd)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))  # CLIP sec. 2.5
        init_weights(self, cfg.n_layer)

    def embed(self, ids):
        return shrink_gradient(self.embedding(ids), self.cfg.embed_grad)

    def hide(self, text, generator=None):
        return hide_words(text, self.cfg.n_vocab, len(self.embedding.weight) - 1, generator)

    def scale(self):
        return self.log_scale.float().clamp(max=HOTTEST).exp()

    def text_feature(self, text, states):
        """text (B, T), the encoder's states of it (B, T, D) -> (B, D), float32, of norm 1."""
        seen = (text < self.cfg.n_vocab)[..., None]
        mean = (states.float() * seen).sum(1) / seen.sum(1)
        return F.normalize(self.text_out(mean.to(states.dtype)).float(), dim=-1)

    def features(self, text, codes):
        """text (B, T), codes (B, N) -> two (B, D), float32, of norm 1."""
        return self.text_feature(text, self.encoder(self.embed(text), None)), self.image_feature(codes)

    def image_feature(self, codes):
        states = self.picture(self.embed(codes + self.cfg.n_vocab + self.cfg.text_len), None)
        return F.normalize(self.image_out(states.mean(1)).float(), dim=-1)

    def words_loss(self, states, target):
        """Summed cross-entropy of the hidden words: states (B, T, D), target (B, T) or -100 -> (), in nats."""
        return F.cross_entropy(self.text_head(states).float().flatten(0, 1), target.flatten(), reduction="sum")

    def forward(self, text, codes, low, shown, smoothing=0.0):
        """Training pass, GPT's signature -> summed losses: hidden words (), caption against picture (), in nats.

        shown: `hide(text)` (B, 2, T).  The towers see whole captions; one pass reads both.
        """
        read, target = shown.unbind(1)
        hidden, whole = self.encoder(self.embed(torch.cat([read, text])), None).chunk(2)  # (B, T, D)
        text_feature, image_feature = self.text_feature(text, whole), self.image_feature(codes)
        with torch.autocast(codes.device.type, enabled=False):
            contrast = info_nce(text_feature, image_feature, self.scale())
        return self.words_loss(hidden, target), contrast


@torch.no_grad()
def evaluate_towers(model, rows, batch=32):
    """(text, codes) of validation pictures -> loss of hidden words, of contrast, share of captions that find their picture.

    Each among `batch` pictures, whatever the number of processes; the same words are hidden every time.
    """
    sums, n_words, n = torch.zeros(3), 0, 0
    for first in range(0, len(rows) - len(rows) % batch or len(rows), batch):
        text, codes = (torch.stack(x).to(model.embedding.weight.device) for x in zip(*rows[first : first + batch]))
        read, target = model.hide(text, torch.Generator().manual_seed(first)).unbind(1)
        a, b = model.features(text, codes)
        cosine, own = a @ b.T, torch.arange(len(text), device=text.device)
        nce = (F.cross_entropy(model.scale() * cosine, own) + F.cross_entropy(model.scale() * cosine.T, own)) / 2
        words = model.words_loss(model.encoder(model.embed(read), None), target)
        sums += torch.stack([words, nce * len(text), (cosine.argmax(1) == own).sum()]).cpu()
        n_words, n = n_words + int((target >= 0).sum()), n + len(text)
    return float(sums[0]) / max(1, n_words), float(sums[1]) / n, float(sums[2]) / n


@torch.inference_mode()
def mismatch(model, text, codes):
    """1 - cosine of each picture with its caption: text (B, T), codes (B, N) -> (B,), 0 the best."""
    a, b = model.features(text, codes)
    return 1 - (a * b).sum(1)


def fit_encoder(tensors, model):
    """The towers' tensors for a prior with a text encoder, which alone is taken; ValueError if it has none."""
    own, n = model.state_dict(), model.cfg.n_vocab + model.cfg.text_len
    if not model.cfg.n_encoder:
        raise ValueError("two towers start a prior with a text encoder: use --n_encoder as they have it")
    words = torch.cat([tensors["embedding.weight"][:n].to(own["embedding.weight"]), own["embedding.weight"][n:]])
    return own | {k: v for k, v in tensors.items() if k.startswith("encoder.")} | {"embedding.weight": words}
