"""Tokenizer: nearest code and moving average against loops, processes against one, shapes, learning."""

from dataclasses import replace

import pytest
import torch
from processes import fork

from minit2i import backbones
from minit2i.backbones import BACKBONES, is_local, reach
from minit2i.losses import logit_laplace
from minit2i.train import Processes
from minit2i.vq import QUANTIZERS, VQ, VQConfig, nearest_code

SMALL = VQConfig(stride=4, ch=8, n_res=1, n_codes=16, code_dim=4)


def test_nearest_code_equals_a_loop():
    z, codebook = torch.randn(50, 4), torch.randn(16, 4)
    expected = [min(range(16), key=lambda v: float(((z[i] - codebook[v]) ** 2).sum())) for i in range(50)]
    assert nearest_code(z, codebook).tolist() == nearest_code(z, codebook, most=100).tolist() == expected


def test_nearest_code_holds_one_block_of_distances(monkeypatch):
    """A block for each part, though freed, ended as the whole (N, V) in glibc's heap (measured: 512 MB for 16)."""
    seen, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, out, **kw: seen.append(out) or addmm(*args, out=out, **kw))
    nearest_code(torch.randn(50, 4), torch.randn(16, 4), most=100)
    assert len(seen) == 9 and {out.untyped_storage().data_ptr() for out in seen} == {seen[0].data_ptr()}
    assert seen[0].untyped_storage().nbytes() <= 4 * 100


def test_nearest_code_is_computed_in_float32_under_autocast():
    """In bfloat16 1000 and 1001 are the same number."""
    codebook = torch.tensor([[1000.0], [1001.0], [1002.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_code(codebook, codebook).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "name, l2_norm", [(n, b) for n in QUANTIZERS for b in (False, True) if (n, b) != ("fsq", True)]
)
def test_quantizer_door(name, l2_norm):
    """latents -> (z_q, codes, loss); codes -> latents; forward changes nothing; a gradient arrives."""
    cfg = replace(SMALL, quantizer=name, l2_norm=l2_norm)
    quantizer = QUANTIZERS[name](cfg)
    wide, narrow = quantizer.widths(cfg)
    z = torch.randn(30, wide, requires_grad=True)
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    z_q, codes, loss = quantizer(z)
    assert z_q.shape == (30, narrow) and codes.shape == (30,) and 0 <= codes.min() and codes.max() < 16 and loss >= 0
    assert torch.allclose(z_q, quantizer.lookup(codes), atol=1e-6)
    assert all(v.equal(before[k]) for k, v in quantizer.state_dict().items()), "forward must change nothing"
    z_q, _, _ = quantizer(z, step=0)
    (grad,) = torch.autograd.grad((z_q * torch.randn(30, narrow)).sum(), z)
    assert grad.abs().sum(1).min() > 0


@pytest.mark.parametrize("name", ["ema", "st", "fixed"])
def test_the_gradient_passes_straight_through(name):
    quantizer = QUANTIZERS[name](replace(SMALL, quantizer=name))
    z, weight = torch.randn(30, 4, requires_grad=True), torch.randn(30, 4)
    (grad,) = torch.autograd.grad((quantizer(z)[0] * weight).sum(), z)
    assert grad.equal(weight)


@pytest.mark.parametrize("name", ["ema", "st", "fixed"])
def test_beta_weighs_the_pull_on_the_encoder_and_nothing_else(name):
    """The classic mistake is beta on the codebook's term."""
    quantizer = QUANTIZERS[name](replace(SMALL, quantizer=name))
    z = torch.randn(30, 4, requires_grad=True)
    _, codes, loss = quantizer(z)
    pull = 2 * (z - quantizer.codebook[codes]).detach() / z.numel()
    (grad,) = torch.autograd.grad(loss, z, retain_graph=True)
    assert torch.allclose(grad, SMALL.beta * pull, atol=1e-7)
    assert quantizer.codebook.requires_grad == (name == "st")
    if name == "st":
        (grad,) = torch.autograd.grad(loss, quantizer.codebook)
        assert torch.allclose(grad, torch.zeros(16, 4).index_add_(0, codes, -pull), atol=1e-7)


@pytest.mark.parametrize("name", ["ema", "st", "fixed"])
def test_on_the_sphere_the_length_of_a_code_means_nothing(name):
    """Gradients, and averages of weights, leave a codebook that is not of length 1."""
    quantizer = QUANTIZERS[name](replace(SMALL, quantizer=name, l2_norm=True))
    z = torch.randn(200, 4)
    codes = (torch.nn.functional.normalize(z) @ quantizer.codebook.t()).argmax(1)
    quantizer.codebook.data *= torch.linspace(0.5, 2, 16)[:, None]
    assert quantizer(z)[1].equal(codes)


@pytest.mark.parametrize("l2_norm", [False, True])
def test_a_fixed_codebook_lets_latents_pass_until_it_is_set(l2_norm):
    quantizer, z = QUANTIZERS["fixed"](replace(SMALL, free_steps=3, l2_norm=l2_norm)), torch.randn(30, 4)
    for step, free in ((0, True), (2, True), (3, False), (None, False)):
        z_q, codes, loss = quantizer(z, step)
        assert z_q.equal(quantizer.norm(z) if free else z_q) and (loss == 0) == free
        assert free or torch.allclose(z_q, quantizer.lookup(codes), atol=1e-6)
    assert quantizer.first_step == 3 and QUANTIZERS["ema"](SMALL).first_step == 0


def test_gumbel_loss_and_schedules():
    """KL to the even distribution in closed form, weighted by 6.6 / (3 * 64) a code at stride 8; cosine schedules."""
    cfg = replace(SMALL, quantizer="gumbel", stride=8, kl_steps=100, tau_steps=200)
    quantizer, z = QUANTIZERS["gumbel"](cfg), torch.randn(30, 16)
    p = z.double().softmax(1)
    kl = sum(float(q * (q * 16).log()) for q in p.flatten()) / 30
    for step, weight in ((0, 0.0), (50, 3.3), (100, 6.6), (1000, 6.6)):
        assert abs(float(quantizer(z, step)[2]) - weight / 192 * kl) < 1e-5
    assert quantizer(z * 0, 100)[2].abs() < 1e-6
    assert float(QUANTIZERS["gumbel"](replace(cfg, kl_steps=0, tau_steps=0))(z, 1)[2]) > 0, "no steps: at once"
    nearness = [
        float((quantizer(z, step)[0] - quantizer.codebook[:, None]).norm(dim=2).min(0).values.mean())
        for step in (0, 200)
    ]
    assert nearness[1] < 0.3 * nearness[0], "a low temperature takes nearly one code"


def start_logits(z):
    quantizer = QUANTIZERS["gumbel"](replace(SMALL, quantizer="gumbel"))
    p = Processes("cpu")
    quantizer.start(z.chunk(p.world)[p.rank])
    return p.gather((quantizer.shift, quantizer.scale))


def test_gumbel_starts_without_a_favourite():
    """Logits of mean 0 for each code and variance 1 in all, whatever overflows; on two processes the same."""
    z = 0.02 * torch.randn(200, 16) + torch.randn(16)
    z[7, 3] = torch.inf
    ((shift, scale),) = start_logits(z)
    kept = (torch.cat([z[:7], z[8:]]) - shift) * scale
    assert kept.mean(0).abs().max() < 1e-4 and abs(kept.square().mean() - 1) < 1e-4
    for other in fork(2, start_logits, z):
        assert torch.allclose(other[0], shift, atol=1e-5) and torch.allclose(other[1], scale, rtol=1e-4)


def test_a_gumbel_tokenizer_without_a_start_keeps_its_logits():
    quantizer, z = QUANTIZERS["gumbel"](replace(SMALL, quantizer="gumbel")), torch.randn(30, 16)
    old = {k: v for k, v in quantizer.state_dict().items() if k not in ("shift", "scale")}
    quantizer.load_state_dict(old)
    assert quantizer(z)[1].equal(z.argmax(1)) and len(old) == 2


@pytest.mark.parametrize("n_codes", [16, 240, 1000, 1024])
def test_fsq_reaches_every_code_and_returns_to_it(n_codes):
    cfg = replace(SMALL, quantizer="fsq", n_codes=n_codes)
    quantizer = QUANTIZERS["fsq"](cfg)
    assert quantizer.codebook.unique(dim=0).shape == (n_codes, quantizer.widths(cfg)[0])
    assert quantizer.codebook.min() == -1 and quantizer.codebook.max() <= 1
    z_q, codes, _ = quantizer(torch.randn(200_000, quantizer.widths(cfg)[0]) * 2)
    assert codes.unique().numel() == n_codes and torch.allclose(z_q, quantizer.lookup(codes), atol=1e-6)


def test_fsq_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="leave out --l2_norm"):
        QUANTIZERS["fsq"](replace(SMALL, quantizer="fsq", l2_norm=True))
    with pytest.raises(ValueError, match="1021 is no product"):
        QUANTIZERS["fsq"](replace(SMALL, quantizer="fsq", n_codes=1021))


def test_moving_average_equals_a_loop():
    cfg = replace(SMALL, restart=0.0, decay=0.9)
    quantizer = QUANTIZERS["ema"](cfg)
    count, total = quantizer.ema_count.clone().double(), quantizer.ema_sum.clone().double()
    for step in range(5):
        z = torch.randn(40, 4)
        codes = nearest_code(z, quantizer.codebook)
        quantizer.update(z, codes, step)
        for v in range(16):
            mine = z[codes == v].double()
            count[v] = 0.9 * count[v] + 0.1 * len(mine)
            total[v] = 0.9 * total[v] + 0.1 * mine.sum(0)
    assert torch.allclose(quantizer.codebook.double(), total / count[:, None], atol=1e-5)


def test_dead_codes_restart_on_latents_with_a_fresh_average():
    quantizer = QUANTIZERS["ema"](replace(SMALL, restart=0.5))
    z = torch.randn(200, 4)
    z[:100] = 3.0 + torch.randn(100, 4) * 0.1
    quantizer.codebook[1:] = 1e3
    assert nearest_code(z, quantizer.codebook).unique().tolist() == [0]
    for step in range(60):
        quantizer.update(z, nearest_code(z, quantizer.codebook), step)
    assert nearest_code(z, quantizer.codebook).unique().numel() > 12
    assert torch.allclose(quantizer.codebook, quantizer.ema_sum / quantizer.ema_count[:, None], atol=1e-4)


def test_restarts_go_where_the_codebook_is_worst():
    """Drawn evenly, 15 restarts would nearly all land on the background, which has its code already."""
    quantizer = QUANTIZERS["ema"](SMALL)
    z = torch.zeros(1000, 4)
    z[:100] = (torch.randn(5, 4) + 10).repeat(20, 1)
    quantizer.codebook.fill_(1e3)
    quantizer.codebook[0] = 0
    quantizer.ema_count[1:] = 0
    quantizer.update(z, nearest_code(z, quantizer.codebook), 0)
    assert nearest_code(z, quantizer.codebook).unique().numel() == 6


def test_an_overflow_does_not_reach_the_codebook():
    """In float16 a step can overflow; the scaler skips it, and the codebook must too."""
    quantizer = QUANTIZERS["ema"](SMALL)
    z = torch.randn(40, 4)
    z[3] = torch.nan
    quantizer.update(z, nearest_code(z.nan_to_num(), quantizer.codebook), 0)
    assert all(v.isfinite().all() for v in quantizer.state_dict().values())


@pytest.mark.parametrize("bad", [1, 40])
def test_no_code_restarts_on_an_overflow(bad):
    """The bad latents are set to zero, which is far from every code here."""
    quantizer = QUANTIZERS["ema"](SMALL)
    z = torch.randn(40, 4) + 50
    quantizer.codebook.copy_(torch.randn(16, 4) + 50)
    quantizer.ema_sum.copy_(quantizer.codebook)
    quantizer.ema_count[1:] = 0
    z[:bad] = torch.inf
    quantizer.update(z, torch.zeros(40, dtype=torch.long), 0)
    assert (quantizer.codebook - 50).abs().max() < 10


def test_kmeans_start_uses_every_code():
    quantizer = QUANTIZERS["ema"](SMALL)
    z = torch.randn(500, 4) + 20
    quantizer.start(torch.cat([z[:3] * torch.inf, z]))  # as float16 may overflow
    assert (quantizer.codebook - 20).abs().max() < 5
    assert nearest_code(z, quantizer.codebook).unique().numel() == 16
    random = QUANTIZERS["ema"](SMALL)

    def error(q):
        return float((z - q.codebook[nearest_code(z, q.codebook)]).square().sum(1).mean())

    assert error(quantizer) < 0.5 * z.var(0).sum() < error(random)


def update_codebooks(names, z):
    """Ten updates of each, a restart threshold that bites, each process with its share of every batch -> all states."""
    p, states = Processes("cpu"), {}
    share = z.chunk(p.world, 1)[p.rank]
    for name in names:
        torch.manual_seed(0)
        quantizer = QUANTIZERS[name](replace(SMALL, quantizer=name, restart=0.4))
        quantizer.start(share[0])
        for step, batch in enumerate(share):
            quantizer.update(batch, nearest_code(batch, quantizer.codebook), step)
        states |= {f"{name}.{k}": v for k, v in quantizer.state_dict().items()}
    return p.gather(states)


def test_two_processes_equal_one_with_the_doubled_batch():
    """Statistics, k-means start and restarts see the latents of all processes."""
    z, names = torch.randn(10, 64, 4), ("ema", "st", "fixed")
    (one,), (first, second) = update_codebooks(names, z), fork(2, update_codebooks, names, z)
    for k, v in one.items():
        assert torch.allclose(v, first[k], atol=1e-5) and first[k].equal(second[k]), k


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("stride, shape", [(2, (8, 12)), (4, (32, 32)), (8, (48, 16)), (16, (32, 32))])
def test_shapes_for_every_backbone_stride_and_oblong_pictures(backbone, stride, shape):
    vq = VQ(replace(SMALL, stride=stride, backbone=backbone))
    x = torch.rand(2, 3, *shape) * 2 - 1
    grid = tuple(s // stride for s in shape)
    codes = vq.encode(x)
    assert codes.shape == (2, *grid) and vq.grid(*shape) == grid
    assert vq.decode(codes).shape == x.shape and vq.decode(codes).abs().max() <= 1
    recon, z, flat, loss = vq(x)
    assert recon.shape == x.shape and flat.equal(codes.flatten()) and z.shape == (codes.numel(), 4)
    (recon.square().sum() + loss).backward()
    assert all(w.grad is not None for w in vq.parameters()), "a parameter that nothing uses would stop DDP"
    assert vq.last_weight.shape[0 if backbone != "vqvae" else 1] in (3, 3 * stride**2)


@pytest.mark.parametrize(
    "quantizer, size, stride, k", [("gumbel", 256, 8, 8192), ("ema", 256, 16, 8192), ("ema", 800, 8, 1024)]
)
def test_the_papers_sizes(quantizer, size, stride, k):
    """DALL-E's 32x32 codes of 8,192, VQGAN's 16x16, CogView's fashion pictures."""
    vq = VQ(VQConfig(stride=stride, ch=4, n_res=1, quantizer=quantizer, n_codes=k, code_dim=8, backbone="dvae"))
    x = torch.rand(1, 3, size, size) * 2 - 1
    codes = vq.encode(x)
    assert codes.shape == (1, size // stride, size // stride) and vq.decode(codes).shape == x.shape


def test_bottlenecks_are_dalles():
    """n_layers counts the blocks of all groups, and the branch is a quarter as wide."""
    blocks = [m for m in VQ(replace(SMALL, stride=8, n_res=2, backbone="dvae")).encoder if hasattr(m, "gain")]
    assert len(blocks) == 8 and {b.gain for b in blocks} == {1 / 64}
    assert [b.branch[-1].out_channels // b.branch[1].out_channels for b in blocks] == [4] * 8
    x = torch.randn(1, 8, 4, 4)
    assert torch.allclose(blocks[0](x), x + blocks[0].branch(x) / 64)


def test_movq_norms_are_modulated_by_the_codes():
    """They start as plain GroupNorm; then two places of the same codes are scaled alike, of other codes otherwise."""
    norm, x = backbones.Norm(8, 4), torch.randn(2, 8, 8, 8)
    z = torch.randn(2, 4, 2, 2)
    plain = torch.nn.functional.group_norm(x, 8)
    assert torch.allclose(norm(x, z), plain, atol=1e-4)
    torch.nn.init.normal_(norm.modulate.weight), torch.nn.init.normal_(norm.modulate.bias)
    z[0, :, 0, 0] = z[0, :, 1, 1]
    scale, shift = norm.modulate(z).chunk(2, 1)
    y = norm(x, z)
    for i, j in ((0, 0), (3, 5), (7, 7)):
        expected = plain[:, :, i, j] * (1 + scale[:, :, i // 4, j // 4]) + shift[:, :, i // 4, j // 4]
        assert torch.allclose(y[:, :, i, j], expected, atol=1e-4)


def test_vit_attention_equals_a_loop():
    block, x = backbones.ViTBlock(8, 2), torch.randn(1, 6, 8)
    q, k, v = block.qkv(block.norm1(x))[0].view(6, 3, 2, 4).unbind(1)  # (6, 2, 4) each
    mixed = torch.zeros(6, 2, 4)
    for i in range(6):
        for h in range(2):
            weight = torch.stack([(q[i, h] * k[j, h]).sum() / 2 for j in range(6)]).softmax(0)
            mixed[i, h] = sum(weight[j] * v[j, h] for j in range(6))
    y = x + block.out(mixed.view(1, 6, 8))
    assert torch.allclose(block(x), y + block.mlp(block.norm2(y)), atol=1e-5)
    with pytest.raises(ValueError, match="not a multiple of its heads of 64; use 48"):
        VQ(replace(SMALL, ch=40, backbone="vit"))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_without_nan(backbone, dtype):
    """Autocast, loss scaling, gumbel's or moving-average codes, logit-Laplace: finite and falling over 20 steps."""
    torch.manual_seed(0)
    quantizer = "gumbel" if backbone == "dvae" else "ema"
    vq = VQ(replace(SMALL, backbone=backbone, quantizer=quantizer, maps=6, kl_weight=0.1))
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(vq.parameters(), 3e-3)
    x, seen = torch.rand(4, 3, 1, 1).expand(-1, -1, 8, 8) * 2 - 1, []
    for step in range(20):
        with torch.autocast("cpu", dtype):
            maps, z, codes, loss = vq(x, step)
            nll = logit_laplace(maps, None, x)
        assert nll.dtype == loss.dtype == vq.picture(maps).dtype == torch.float32
        scaler.scale(nll + loss).backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        vq.quantizer.update(z, codes, step)
        seen.append(float(nll.detach()))
    assert torch.tensor(seen).isfinite().all() and seen[-1] < seen[0]
    assert all(v.isfinite().all() for v in vq.state_dict().values())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_codes_of_local_backbones_look_no_further_than_said(backbone):
    vq = VQ(replace(SMALL, stride=4, backbone=backbone)).double()
    x = torch.rand(1, 3, 128, 64, dtype=torch.double) * 2 - 1
    changed = x.clone()
    changed[:, :, :4, :4] += 1  # one code's own pixels
    far = (vq.latents(x) != vq.latents(changed)).any(-1)[0].any(1).nonzero().max()  # the last row that moved
    assert is_local(vq.encoder) == is_local(vq.decoder) == (backbone in ("vqvae", "dvae"))
    assert far <= reach(vq.encoder) / 4 + 1 if is_local(vq.encoder) else far == 31


def test_a_code_depends_on_its_surroundings_only():
    """Else each code would know the whole picture, and the prior could tell training pictures by their first one."""
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    changed = x.clone()
    changed[:, :, 32:, 32:] = 0.5
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[8:, 8:] = True
    for patchwise in (False, True):
        vq = VQ(replace(SMALL, stride=4, patchwise=patchwise))
        moved = (vq.latents(x) != vq.latents(changed)).any(-1)[0]  # (16, 16)
        assert moved[inside].all() and not moved[:4].any() and not moved[:, :4].any()
        assert moved.equal(inside) == patchwise


@pytest.mark.parametrize("backbone, upscale", [("vqvae", 1), ("dvae", 2), ("vqgan", 1)])
def test_tiles_give_the_same_codes_where_the_backbone_is_local(backbone, upscale):
    """vqgan's norms see the whole picture: there it only has to work."""
    torch.manual_seed(0)
    cfg = replace(SMALL, backbone=backbone, upscale=upscale, sr_ch=8, sr_blocks=2)
    vq = VQ(cfg).double()
    x = torch.rand(2, 3, 64, 104, dtype=torch.double) * 2 - 1
    codes, seen = vq.encode(x), []
    vq.encoder.register_forward_hook(lambda m, inputs, out: seen.append(out.shape[2] * out.shape[3]))
    tiled = vq.encode(x, tile=6)
    assert tiled.shape == codes.shape and len(seen) == 15 and max(seen) < codes[0].numel()
    pictures = vq.decode(codes), vq.decode(codes, tile=6)
    assert pictures[0].shape == pictures[1].shape == (2, 3, 64 * upscale, 104 * upscale)
    if is_local(vq.encoder):
        assert tiled.equal(codes) and torch.allclose(*pictures, atol=1e-6)


@pytest.mark.parametrize("scale", [2, 4])
def test_super_resolution_starts_as_bicubic(scale):
    x = torch.rand(2, 3, 9, 6)
    net = backbones.WDSR(scale, 8, 2)
    expected = torch.nn.functional.interpolate(x, scale_factor=scale, mode="bicubic")
    assert torch.allclose(net(x), expected, atol=1e-5)
    net(x).square().sum().backward()
    assert net.last.parametrizations.weight.original0.grad.abs().sum() > 0, "it must be able to leave that start"


def test_wdsr_has_the_size_that_parti_names():
    """About 15 M parameters for 12 blocks of 128 channels."""
    assert 14e6 < sum(w.numel() for w in backbones.WDSR(2, 128, 12).parameters()) < 15e6


def test_what_a_backbone_cannot_do_is_refused():
    with pytest.raises(ValueError, match="backbone 'unet' is not known; use one of vqvae"):
        VQ(replace(SMALL, backbone="unet"))
    with pytest.raises(ValueError, match="--patchwise is for the vqvae backbone"):
        VQ(replace(SMALL, backbone="vit", patchwise=True))
    with pytest.raises(ValueError, match="n_codes 0 is less than 1"):
        VQ(replace(SMALL, n_codes=0))


def test_a_size_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="height 60 is not a multiple of the tokenizer's stride 8; use 56 or 64"):
        VQ(replace(SMALL, stride=8)).encode(torch.zeros(1, 3, 60, 64))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_overfits_one_batch(name):
    torch.manual_seed(0)
    vq = VQ(replace(SMALL, quantizer=name, ch=16, n_codes=64, code_dim=8, tau_steps=100, kl_weight=0.01, free_steps=50))
    x = torch.rand(4, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1  # 16x16: a colour per code
    optimizer = torch.optim.AdamW(vq.parameters(), 3e-3)
    for step in range(150):
        if step == vq.quantizer.first_step:
            vq.quantizer.start(vq.latents(x).flatten(0, 2).detach())
        recon, z, codes, loss = vq(x, step)
        error = (recon - x).square().mean()
        (error + loss).backward()
        optimizer.step(), optimizer.zero_grad()
        vq.quantizer.update(z, codes, step)
        first = float(error.detach()) if step == 0 else first  # noqa: F821
    decoded = (vq.decode(vq.encode(x)) - x).square().mean()
    assert decoded < 0.2 * first
