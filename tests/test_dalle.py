"""DALL-E: the encoder's pixels, sampled codes, schedules as shares of the training.

The rest stands by subject: the dVAE and gumbel in test_vq.py, logit-Laplace in test_tokenizer_losses.py, masks in
test_attention.py, block scales in test_fp16.py, PowerSGD and shards in test_parallel.py, crops and filters in
test_data.py.
"""

from dataclasses import replace

import pytest
import torch

import train_vq
from minit2i.data import DataConfig
from minit2i.papers.dalle import EPS, RECIPE
from minit2i.vq import QUANTIZERS, build_vq

DVAE = dict(backbone="dvae", quantizer="gumbel", stride=4, ch=8, n_res=1, n_codes=6, code_dim=4)


def tokenizer(**settings):
    torch.manual_seed(0)
    vq = build_vq(DVAE | settings)
    vq.quantizer.start(vq.latents(torch.rand(8, 3, 16, 16) * 2 - 1).flatten(0, 2))
    return vq


def test_the_encoder_reads_phi_of_the_pixels():
    """-1 and 1 arrive as 0.1 and 0.9 (app. A.3)."""
    vq, seen = tokenizer(), []
    vq.encoder[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.tensor([-1.0, 0.0, 1.0, 0.5]).expand(1, 3, 4, 4)
    vq.encode(image)
    assert torch.allclose(seen[0], torch.tensor([EPS, 0.5, 1 - EPS, 0.7]).expand(1, 3, 4, 4))


def test_upsampling_after_1x1_convolutions_gives_the_same():
    """App. A.1 upsamples first.  The layers' numbers are those of a list that holds the upsampling."""
    decoder, x = tokenizer().decoder.double(), torch.randn(2, 4, 3, 5, dtype=torch.double)
    widths, out = [], x
    for layer in decoder:
        if hasattr(layer, "branch"):
            layer.branch[1].register_forward_hook(lambda module, args, y: widths.append(y.shape[3]))
    got = decoder(x)
    assert widths == [5, 5, 10] and got.shape == (2, 3, 12, 20), "the 1x1 convolutions see the smaller input"
    for i, layer in enumerate(decoder):
        out = out.repeat_interleave(2, 2).repeat_interleave(2, 3) if i in (2, 4) else out
        out = layer.skip(out) + layer.gain * layer.branch(out) if i in (1, 3, 5) else layer(out)
    assert torch.allclose(got, out)


def test_the_encoder_computes_channels_last():
    """Its pooling is slow on a CPU otherwise."""
    vq, seen = tokenizer(), []
    for layer in vq.encoder:
        layer.register_forward_hook(lambda module, args, y: seen.append(y))
    vq.encode(torch.rand(2, 3, 16, 16))
    assert len(seen) == 8 and all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)


# --- sampled codes ---


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_likeliest_code_is_the_one_encoded(name):
    """Every quantizer's logits agree with its codes: those that are sampled at a temperature near 0."""
    vq = tokenizer(quantizer=name, n_codes=30, backbone="vqvae")
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    z = vq.latents(image).flatten(0, 2)
    logits, codes = vq.quantizer.logits(z), vq.quantizer(z)[1]
    assert logits.shape == (32, 30)
    assert torch.allclose(logits.gather(1, codes[:, None])[:, 0], logits.max(1).values, atol=1e-4)
    sampled = vq.sample_codes(image, 3, 1e-6, [0, 1])  # (2, 3, 4, 4)
    assert sampled.eq(vq.encode(image)[:, None]).float().mean() > 0.9, "but for ties"


def test_sampled_codes_follow_the_softmax():
    """In each place, with the frequencies of softmax(logits / temperature)."""
    vq, n = tokenizer(), 20_000
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    logits = vq.quantizer.logits(vq.latents(image).flatten(0, 2)).view(2, 4, 6)
    for temperature in (1.0, 0.5):
        codes = vq.sample_codes(image, n, temperature, [3, 4])
        assert codes.shape == (2, n, 2, 2)
        found = torch.nn.functional.one_hot(codes.flatten(2), 6).float().mean(1)  # (2, 4, 6)
        p = (logits / temperature).softmax(-1)
        assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()
    assert (p.max(-1).values < 0.95).any(), "the test needs places that are not certain"
    first, again, other = (vq.sample_codes(image, 50, 1.0, seeds) for seeds in ([3, 4], [3, 4], [5, 4]))
    assert first.equal(again) and not first[0].equal(other[0]) and first[1].equal(other[1])


# --- schedules ---


def test_schedules_below_one_are_shares_of_the_training():
    """DALL-E's proportions: the temperature falls over 5 % of the steps, the KL weight rises over 0.2 %."""
    cfg = train_vq.VQTrainConfig(out="", steps=3000)
    model_cfg = build_vq(DVAE | RECIPE["vq"]).cfg
    quantizer = train_vq.make_model(model_cfg, DataConfig(image_size="16"), cfg, torch.device("cpu")).quantizer
    assert (quantizer.cfg.kl_steps, quantizer.cfg.tau_steps) == (6, 150)
    given = train_vq.in_steps(replace(model_cfg, kl_steps=0, tau_steps=700), 3000)
    assert (given.kl_steps, given.tau_steps) == (0, 700)
