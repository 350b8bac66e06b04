"""Masked priors (MaskGIT, arXiv:2202.04200; Muse, arXiv:2301.00704): which codes training hides, and how they are drawn.

A code -1 is one that is not known.  Drawing starts with all (or the unknown part) of a picture hidden; every step
draws all hidden codes at once and keeps the surest.

Shapes: P prompts, n pictures of each, B = P*n, T text length, N codes of a picture, M codes of a smaller one, V codes.
"""

import math

import torch
import torch.nn.functional as F

from minit2i.filters import draw, filtered, guide, scheduled


def hide(codes, generator=None):
    """codes (B, N) -> the same with -1 where they are hidden: a share cos(pi u / 2) of each picture, u uniform.

    Its density over (0, 1) is (2/pi) (1 - r^2)^(-1/2), its mean 2/pi.  At least one.  Muse sec. 2.6.
    """
    b, n = codes.shape
    rate = torch.cos(torch.rand(b, generator=generator) * (math.pi / 2))
    count = (n * rate).round().clamp_min(1)
    rank = torch.rand(b, n, generator=generator).argsort(1).argsort(1)
    return codes.masked_fill((rank < count[:, None]).to(codes.device), -1)


def hide_each(codes, seeds, how=hide):
    """As `hide`, each row of codes (B, N) as its own seed says, so that it does not matter who else is in the batch."""
    return torch.cat([how(row[None], torch.Generator().manual_seed(s)) for row, s in zip(codes, seeds)])


def still_hidden(at_start, hidden, u):
    """How many codes stay hidden after a step: at_start and hidden before it (B,) long, u in (0, 1] -> (B,).

    floor(at_start cos(pi u / 2)), but at least one code is kept by each step and one left for the last.
    MaskGIT sec. 3.2, 3.3.
    """
    if u >= 1:
        return torch.zeros_like(hidden)
    return (at_start * math.cos(math.pi / 2 * u)).long().minimum(hidden - 1).clamp_min(1).minimum(hidden)


@torch.inference_mode()
def unmask(model, text, empty, cfg, known=None, low=None, watch=None, seeds=None):
    """Draw codes for P prompts, cfg.n pictures each, all places at once in cfg.steps steps.

    Arguments and seeds as in sample.generate; known codes never change.  Confidence is the drawn code's log
    probability with guidance, before filters, plus Gumbel noise times cfg.choice_noise (1 - u).  MaskGIT sec. 3.2.
    """
    device, guided, b = text.device, cfg.cfg_scale != 1, len(text) * cfg.n
    n_image = model.cfg.n_image
    codes = torch.full((b, n_image), -1, device=device) if known is None else known.clone()
    at_start = (codes < 0).sum(1)  # (B,)
    sources = [torch.Generator().manual_seed(s) for s in seeds or range(cfg.seed, cfg.seed + b)]
    text = text.repeat_interleave(cfg.n, 0)  # (B, T)
    if guided:
        text = torch.cat([text, empty.expand_as(text)])  # (2B, T)
    both = (lambda x: None if x is None else torch.cat([x, x])) if guided else (lambda x: x)
    low = both(low)
    for step in range(cfg.steps):
        u = (step + 1) / cfg.steps
        noise = torch.stack([torch.rand(2, n_image, generator=s) for s in sources])  # (B, 2, N)
        pick, choice = noise.to(device).unbind(1)  # (B, N)
        logits = model.logits(text, both(codes), low)[1].float()  # (2B, N, V)
        if guided:
            logits = guide(*logits.chunk(2), scheduled(cfg.cfg_scale, cfg.cfg_schedule, u))
        drawn = draw(filtered(logits.flatten(0, 1), cfg, u), pick.flatten()).view(b, -1)  # (B, N)
        sure = -F.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="none").view(b, -1)
        gumbel = -(-choice.clamp_min(1e-20).log()).clamp_min(1e-20).log()
        sure = sure + cfg.choice_noise * (1 - u) * gumbel
        hidden = codes < 0
        rank = sure.masked_fill(~hidden, torch.inf).argsort(1).argsort(1)  # the least sure first
        stay = still_hidden(at_start, hidden.sum(1), u)
        codes = torch.where(hidden, drawn, codes).masked_fill(hidden & (rank < stay[:, None]), -1)
        if watch:
            watch(codes)
    return codes
