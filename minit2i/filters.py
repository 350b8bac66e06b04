"""What happens between logits and a drawn code: schedules, guidance, filters, the draw.

A filter maps logits (B, V) and one setting to logits; FILTERS are applied in their order.  u in (0, 1] is how much of
a picture is drawn with this code (or, decoding in parallel, with this step).

Shapes: B pictures, V codes.
"""

import math

import torch

SCHEDULES = {  # how far a setting is from 1, its neutral value
    "constant": lambda u: 1.0,
    "rising": lambda u: u,
    "falling": lambda u: 1.0 - u,
}


def scheduled(value, schedule, u):
    """A setting at u: the value throughout, rising to it linearly from 1, or falling from it to 1."""
    return 1.0 + (value - 1.0) * SCHEDULES[schedule](u)


def guide(conditional, unconditional, scale):
    """Classifier-free guidance, arXiv:2207.12598 eq. 6 with scale = 1 + w."""
    return unconditional + scale * (conditional - unconditional)


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


def min_p(logits, p):
    """Drop what is less than p times as likely as the likeliest.  arXiv:2407.01082 sec. 3."""
    if p <= 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)


FILTERS = (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p))


def filtered(logits, cfg, u):
    """logits (B, V) -> filtered as cfg (sample.SampleConfig) says, at u."""
    for name, f in FILTERS:
        value = getattr(cfg, name)
        logits = f(logits, scheduled(value, cfg.temperature_schedule, u) if name == "temperature" else value)
    return logits


def draw(logits, u):
    """One code per row by inverting the distribution function: logits (B, V), u (B,) in [0, 1) -> (B,)."""
    cdf = logits.float().softmax(-1).cumsum(-1)
    u = u[:, None] * cdf[:, -1:] * (1 - 1e-6)  # never past the end, so that no code of probability 0 is drawn
    return torch.searchsorted(cdf, u, right=True).squeeze(1)
