"""The prior with a text encoder of its own (Parti): who sees what, cached against full, loss, scripts."""

from dataclasses import replace

import pytest
import torch
from test_gpt import TINY, batch, big_init
from test_sample import EMPTY, uncached
from test_train import PRIOR_FLAGS, call, equal, losses, pictures, vq  # noqa: F401 (fixtures)

import sample
import train_prior
from minit2i.blocks import CrossAttention
from minit2i.gpt import GPT, Cache, GPTConfig
from minit2i.sample import SampleConfig, generate

PARTI = replace(TINY, n_encoder=2, mask="conv", grid_h=3, grid_w=4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cross_attention_equals_a_loop(qk_norm):
    cfg = replace(PARTI, qk_norm=qk_norm)
    cross = big_init(CrossAttention(cfg))
    x, memory = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    k, v = (memory @ cross.kv.weight.t()).split(16, -1)
    q, out = x @ cross.q.weight.t(), torch.zeros(2, 3, 16)
    for b in range(2):
        for s in range(3):
            for part in (slice(0, 8), slice(8, 16)):
                one, keys = q[b, s, part], k[b, :, part]
                if qk_norm:
                    one, keys = cross.q_norm(one), cross.k_norm(keys)
                out[b, s, part] = (keys @ one / 8**0.5).softmax(0) @ v[b, :, part]
    assert torch.allclose(cross(x, memory, None), out @ cross.out.weight.t(), atol=1e-5)


@pytest.mark.parametrize("pos", ["learned", "rotary"])
def test_text_sees_all_text_and_codes_see_text_and_earlier_codes(pos):
    model = big_init(GPT(replace(PARTI, pos=pos, mask="full")))
    text, codes = batch(PARTI, 1)
    x = model.embed(text).detach().requires_grad_()
    for t in range(5):
        (grad,) = torch.autograd.grad(model.encoder(x, None)[0, t].sum(), x)
        assert (grad.abs().sum(2) > 0).all()
    logits = model.logits(text, codes)[1]
    for n in range(12):
        other = codes.clone()
        other[0, n] = (other[0, n] + 1) % 7
        changed = (model.logits(text, other)[1] - logits).abs().sum(2)[0] > 1e-6
        assert changed.tolist() == [i > n for i in range(12)]
    for t in range(5):
        other = text.clone()
        other[0, t] = (other[0, t] + 1) % TINY.n_vocab
        assert ((model.logits(other, codes)[1] - logits).abs().sum(2) > 1e-6).all()


@pytest.mark.parametrize(
    "settings",
    [{"mask": "full"}, {"pb_relax": True, "sandwich": True}, {"pos": "rotary", "norm": "rmsnorm", "qk_norm": True}],
    ids=str,
)
def test_cached_logits_equal_full_ones(settings):
    cfg = replace(PARTI, **settings)
    model = big_init(GPT(cfg)).eval()
    text, codes = batch(cfg)
    with torch.no_grad():
        expected = model.logits(text, codes)[1]
        prompts = Cache(model, 3, 1)
        before, memory = model.read(text)
        hidden, cache = [model.trunk(before, 0, prompts, memory)], prompts.spread(model, torch.arange(3), 12)
        hidden += [model.trunk(model.code_ids(codes[:, i : i + 1]), 1 + i, cache) for i in range(11)]
    assert torch.allclose(model.image_head(torch.cat(hidden, 1)), expected, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 1.0}, {"cfg_schedule": "rising", "top_k": 4}], ids=str)
def test_drawing_with_guidance_equals_the_naive_loop(settings):
    cfg = GPTConfig(n_layer=2, n_encoder=1, n_head=2, n_embd=16, text_len=5, n_vocab=11, n_codes=13, grid_h=3, grid_w=2)
    model = big_init(GPT(cfg)).requires_grad_(False)
    text, settings = torch.randint(0, 11, (3, 5)), SampleConfig(n=2, **settings)
    whole = generate(model, text, EMPTY, settings)
    assert whole.equal(uncached(model, text, EMPTY, settings))
    assert generate(
        model, text, EMPTY, settings, torch.cat([whole[:, :2], torch.full_like(whole[:, 2:], -1)], 1)
    ).equal(whole)


def test_gradients_under_block_scales_are_the_plain_ones():
    """Also those that reach the encoder through a decoder block, whose scale is another than the encoder's."""
    model = big_init(GPT(PARTI))
    text, codes = batch(PARTI)
    model(text, codes)[1].backward()
    plain = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    model.block_scales = 2.0 ** torch.tensor([3, -2, 5, 1])
    model(text, codes)[1].backward()
    for i, block in enumerate(model.all_blocks()):
        for p in block.parameters():
            p.grad /= model.block_scales[i]
    for k, p in model.named_parameters():
        assert torch.allclose(p.grad, plain[k], rtol=1e-4, atol=1e-5 * plain[k].abs().max()), k


def test_overfits_one_batch_on_image_loss_alone():
    model = GPT(replace(PARTI, n_embd=32, n_encoder=1))
    text, codes = batch(PARTI, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(180):
        text_loss, image_loss = model(text, codes)
        image_loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert text_loss == 0 == model.n_text_targets(text) and image_loss.item() / codes.numel() < 0.1
    sum(model(text, codes)).backward()
    assert all(p.grad is not None for p in model.parameters())  # DistributedDataParallel waits for each


def test_from_end_to_end_and_resumed(pictures, vq, tmp_path):  # noqa: F811
    flags = ["--data", pictures, "--vq", vq, "--cache", tmp_path / "cache", "--n_encoder", 1, *PRIOR_FLAGS]
    call(train_prior, *flags, "--out", tmp_path / "a", "--steps", 4, "--min_lr", 1)
    call(train_prior, *flags, "--out", tmp_path / "b", "--steps", 2, "--min_lr", 1)
    call(train_prior, "--out", tmp_path / "b", "--resume", "--steps", 4)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert equal(tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors")
    call(sample, "--model", tmp_path / "a", "--prompt", "a red circle", "--n", 2, "--out", tmp_path / "a.png")
