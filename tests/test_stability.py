"""The toy experiment in float16, as far as arithmetic alone decides how it ends."""

import torch

from minit2i.experiments import stability
from minit2i.experiments.stability import RUNS, TOY, StabilityConfig, provoke, stripes, train_toy
from minit2i.gpt import build_prior


def test_stripes_are_a_pure_function_of_the_step():
    a, b = stripes(3, 8), stripes(3, 8)
    assert all(v.equal(b[k]) for k, v in a.items()) and not stripes(4, 8)["codes"].equal(a["codes"])
    assert a["text"].shape == (8, 4) and int(a["codes"].max()) < TOY["n_codes"]


def test_provoking_scales_the_weights_it_names():
    torch.manual_seed(0)
    plain = build_prior(TOY)
    torch.manual_seed(0)
    model = build_prior(TOY)
    provoke(model, 8.0, 4.0)
    before, after = plain.blocks[0], model.blocks[0]
    d = TOY["n_embd"]
    ratio = after.attn.f.qkv.weight / before.attn.f.qkv.weight
    assert (ratio[: 2 * d] == 8).all() and (ratio[2 * d :] == 1).all()
    assert after.mlp.f.down.weight.equal(before.mlp.f.down.weight * 4)


def test_a_scale_beyond_float16_ends_a_run_at_once_and_float32_survives():
    """Branches 10^8 times larger exceed 65,504 in the first forward pass of float16, whatever the CPU."""
    cfg = StabilityConfig(steps=2, batch=1, scores=1.0, branches=1e8)
    losses, place, skipped = train_toy(cfg, **RUNS["none"])
    assert losses == [] and place and skipped == 0
    losses, place, _ = train_toy(cfg, **RUNS["float32"])
    assert len(losses) == 2 and place == ""


def test_curves_say_where_a_run_ended():
    results = {"a": ([1.0] * 10, "", 0), "b": ([1.0] * 4, "loss", 0)}
    assert set(stability.curves(results, 10)) == {"a", "b (ended after 4)"}
