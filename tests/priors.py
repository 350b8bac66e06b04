"""Tiny priors of every kind, and batches that fit them."""

from dataclasses import replace

import torch

from minit2i.gpt import CONDITIONS, Condition, prior_config

TINY = dict(n_layer=2, n_head=2, n_embd=16, text_len=5, n_vocab=11, n_codes=7, grid_h=2, grid_w=3)
GPT2 = dict(norm="layernorm", mlp="gelu", qk_norm=False)  # in float64 exact to 1e-12: RMSNorm computes in float32
COARSE = dict(coarse_vq="nowhere", coarse_hash="0", coarse_stride=8, coarse_n_codes=5, coarse_ratio=2)
NEEDED = {"t5": dict(t5="nowhere", t5_width=12, t5_hash="0"), "coarse_codes": COARSE}  # what a part cannot do without
EMPTY = torch.tensor([1, 12, 13, 14, 15])  # the empty caption: a begin token and pads

# every condition; one that is another image's codes stands beside the text
CASES = [f"text,{k}" if v.extra_codes is not Condition.extra_codes else k for k, v in CONDITIONS.items()]


def build(**changes):
    """A prior, made as train_prior.py makes it: its settings are settled before the vocabulary is known."""
    settings = TINY | changes
    for name in settings.get("condition", "text").split(","):
        settings = NEEDED.get(name, {}) | settings
    model, cfg = prior_config(settings | {"n_vocab": 0})
    reads = any(CONDITIONS[name].reads_captions for name in cfg.condition.split(","))
    return model(replace(cfg, n_vocab=0 if reads else settings["n_vocab"]))


def big(model, std=0.3):
    """Large weights: a wrong connection shows."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def batch(model, b=3, seed=1):
    """Captions, the first with pads, and codes; states in place of ids where a frozen encoder reads the captions."""
    cfg, g = model.cfg, torch.Generator().manual_seed(seed)
    conditions = [*model.conditions.values()] if hasattr(model, "conditions") else []
    text = torch.randint(max(1, cfg.n_vocab), (b, cfg.text_len), generator=g)
    text[0, 3:] = cfg.n_vocab + torch.arange(3, cfg.text_len)
    if any(c.reads_captions for c in conditions):
        text = torch.randn(b, cfg.text_len, cfg.t5_width, generator=g, dtype=next(model.parameters()).dtype)
        text[0, 3:] = 0
    found = {"text": text, "codes": torch.randint(max(1, cfg.n_codes), (b, cfg.n_image), generator=g)}
    for c in conditions:
        if view := c.extra_codes(cfg):
            n = cfg.n_image // view.ratio**2
            found[view.key] = torch.randint(getattr(cfg, "coarse_n_codes", cfg.n_codes), (b, n), generator=g)
    return found


def empty_of(batch):
    """The empty caption for guidance: ids (T,) or states (T, W)."""
    if not batch["text"].is_floating_point():
        return EMPTY
    return torch.zeros_like(batch["text"][0])
