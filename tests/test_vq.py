"""Tokenizer: nearest code and averages against loops, ranks against one process, shapes, tiles, learning."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from processes import fork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minit2i.collectives import gather_objects
from minit2i.papers.dalle import gumbel_softmax, logit_laplace
from minit2i.papers.lm import SpatialNorm
from minit2i.papers.parti import WDSR, ViTBlock
from minit2i.papers.taming import Norm, SelfAttention
from minit2i.train import Processes
from minit2i.vq import BACKBONES, OUTPUTS, QUANTIZERS, UPSAMPLERS, Codebook
from minit2i.vq import build_vq, inverse_cdf, is_local, nearest_code, reach, sample_indices

SMALL = dict(stride=4, ch=8, n_res=1, n_codes=16, code_dim=4)
CODEBOOKS = [name for name, kind in QUANTIZERS.items() if issubclass(kind, Codebook)]
LOCAL = ("vqvae", "dvae")


def small(**settings):
    return build_vq(SMALL | settings)


def make_quantizer(name, **settings):
    return small(quantizer=name, **settings).quantizer


def with_l2_norm(names):
    return [(name, l2_norm) for name in names for l2_norm in (False, True) if (name, l2_norm) != ("fsq", True)]


# --- nearest code ---


def test_nearest_code_equals_a_loop():
    z, codebook = torch.randn(50, 4), torch.randn(16, 4)
    expected = [min(range(16), key=lambda v: float(((z[i] - codebook[v]) ** 2).sum())) for i in range(50)]
    assert nearest_code(z, codebook).tolist() == nearest_code(z, codebook, block=100).tolist() == expected


def test_nearest_code_is_exact_far_from_zero():
    """|c|^2 - 2 z c alone cancels in float32: a tenth of the codes was wrong at this offset."""
    g = torch.Generator().manual_seed(0)
    z, codebook = (torch.randn(n, 32, generator=g) + 300 for n in (500, 64))
    assert nearest_code(z, codebook).equal(torch.cdist(z.double(), codebook.double()).argmin(1))


def test_nearest_code_reuses_one_buffer_of_distances(monkeypatch):
    """Fresh buffers, though freed, added up to the whole (N, V) in glibc's heap (measured: 512 MB for 16)."""
    seen, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, out, **kw: seen.append(out) or addmm(*args, out=out, **kw))
    nearest_code(torch.randn(50, 4), torch.randn(16, 4), block=100)
    assert len(seen) == 9 and {out.untyped_storage().data_ptr() for out in seen} == {seen[0].data_ptr()}
    assert seen[0].untyped_storage().nbytes() <= 4 * 100


def test_nearest_code_is_computed_in_float32_under_autocast():
    """In bfloat16 1000 and 1001 are the same number."""
    codebook = torch.tensor([[1000.0], [1001.0], [1002.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_code(codebook, codebook).tolist() == [0, 1, 2]


# --- quantizers ---


@pytest.mark.parametrize("name, l2_norm", with_l2_norm(QUANTIZERS))
def test_every_quantizer_keeps_the_interface(name, l2_norm):
    """Latents -> (z_q, codes, loss), codes -> latents; forward changes no state; a gradient arrives."""
    quantizer = make_quantizer(name, l2_norm=l2_norm)
    wide, narrow = quantizer.widths(small(quantizer=name).cfg)
    z = torch.randn(30, wide, requires_grad=True)
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    z_q, codes, loss = quantizer(z)
    assert z_q.shape == (30, narrow) and codes.shape == (30,) and 0 <= codes.min() and codes.max() < 16 and loss >= 0
    assert torch.allclose(z_q, quantizer.lookup(codes), atol=1e-6)
    z_q, _, _ = quantizer(z, train=True, step=0)
    assert all(v.equal(before[k]) for k, v in quantizer.state_dict().items()), "forward must change no state"
    (grad,) = torch.autograd.grad((z_q * torch.randn(30, narrow)).sum(), z)
    assert grad.abs().sum(1).min() > 0
    quantizer.start(z.detach())
    quantizer.update(z.detach(), codes, 0)
    assert not quantizer.ema_count.equal(before["ema_count"])


@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_gradient_passes_straight_through(name):
    z, weight = torch.randn(30, 4, requires_grad=True), torch.randn(30, 4)
    (grad,) = torch.autograd.grad((make_quantizer(name)(z)[0] * weight).sum(), z)
    assert grad.equal(weight)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_beta_weights_the_commitment_loss_only(name):
    """The classic mistake is beta on the codebook's term."""
    quantizer = make_quantizer(name, beta=0.25)
    z = torch.randn(30, 4, requires_grad=True)
    _, codes, loss = quantizer(z)
    pull = 2 * (z - quantizer.codebook[codes]).detach() / z.numel()
    (grad,) = torch.autograd.grad(loss, z, retain_graph=True)
    assert torch.allclose(grad, 0.25 * pull, atol=1e-7)
    assert quantizer.codebook.requires_grad == quantizer.learned == (name in ("st", "gumbel_st"))
    if quantizer.learned:
        (grad,) = torch.autograd.grad(loss, quantizer.codebook)
        assert torch.allclose(grad, torch.zeros(16, 4).index_add_(0, codes, -pull), atol=1e-7)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_l2_norm_ignores_the_length_of_a_code(name):
    """Gradients and averages leave a codebook whose rows do not have length 1."""
    quantizer, z = make_quantizer(name, l2_norm=True), torch.randn(200, 4)
    codes = (F.normalize(z) @ quantizer.codebook.t()).argmax(1)
    quantizer.codebook.data *= torch.linspace(0.5, 2, 16)[:, None]
    assert quantizer(z)[1].equal(codes)


@pytest.mark.parametrize("l2_norm", [False, True])
def test_fixed_passes_latents_unquantized_until_its_codebook_is_set(l2_norm):
    quantizer, z = make_quantizer("fixed", free_steps=3, l2_norm=l2_norm), torch.randn(30, 4)
    for train, step, free in ((True, 0, True), (True, 2, True), (True, 3, False), (False, 0, False)):
        z_q, codes, loss = quantizer(z, train, step)
        assert z_q.equal(quantizer.norm(z) if free else z_q) and (loss == 0) == free
        assert free or torch.allclose(z_q, quantizer.lookup(codes), atol=1e-6)
    assert quantizer.first_step == 3 and make_quantizer("ema").first_step == 0


def test_gumbel_loss_and_schedules():
    """KL to the uniform distribution in closed form, weighted by 6.6 / 192 per code at stride 8; cosine schedules."""
    schedule = dict(stride=8, kl_steps=100, tau_steps=200)
    quantizer, z = make_quantizer("gumbel", **schedule), torch.randn(30, 16)
    p = z.double().softmax(1)
    kl = sum(float(q * (q * 16).log()) for q in p.flatten()) / 30
    for step, weight in ((0, 0.0), (50, 3.3), (100, 6.6), (1000, 6.6)):
        assert abs(float(quantizer(z, True, step)[2]) - weight / 192 * kl) < 1e-5
    assert quantizer(z * 0, True, 100)[2].abs() < 1e-6
    at_once = make_quantizer("gumbel", kl_steps=0, tau_steps=0)
    assert float(at_once(z, True, 1)[2]) > 0, "0 steps mean at once"
    distance = [
        float((quantizer(z, True, step)[0] - quantizer.codebook[:, None]).detach().norm(dim=2).min(0).values.mean())
        for step in (0, 200)
    ]
    assert distance[1] < 0.3 * distance[0], "a low temperature takes nearly one code"


def test_gumbel_softmax_samples_each_code_as_often_as_the_softmax_says():
    """At temperature 1 and 0.05: the largest share is code k with probability softmax(logits)_k."""
    logits, n = torch.tensor([2.0, 1.0, 0.0, -3.0, -30.0]), 20_000
    for tau in (1.0, 0.05):
        soft = gumbel_softmax(logits.expand(n, 5), tau)
        assert soft.isfinite().all() and torch.allclose(soft.sum(1), torch.ones(n))
        share = soft.argmax(1).bincount(minlength=5) / n
        assert (share - logits.softmax(0)).abs().max() < 0.02, "five deviations of the largest share are 0.017"


def start_logits(z):
    procs, quantizer = Processes("cpu"), make_quantizer("gumbel")
    quantizer.start(z.chunk(procs.world)[procs.rank])
    return gather_objects((quantizer.shift, quantizer.scale))


def test_gumbel_starts_with_centred_logits():
    """Mean 0 for each code and variance 1 overall, overflows left out; two ranks get the same."""
    z = 0.02 * torch.randn(200, 16) + torch.randn(16)
    z[7, 3] = torch.inf
    ((shift, scale),) = start_logits(z)
    kept = (torch.cat([z[:7], z[8:]]) - shift) * scale
    assert kept.mean(0).abs().max() < 1e-4 and abs(kept.square().mean() - 1) < 1e-4
    for other in fork(2, start_logits, z):
        assert torch.allclose(other[0], shift, atol=1e-5) and torch.allclose(other[1], scale, rtol=1e-4)


@pytest.mark.parametrize("n_codes", [16, 240, 1000, 1024])
def test_fsq_reaches_every_code_and_returns_to_it(n_codes):
    quantizer = make_quantizer("fsq", n_codes=n_codes)
    width = len(quantizer.levels)
    assert quantizer.codebook.unique(dim=0).shape == (n_codes, width)
    assert quantizer.codebook.min() == -1 and quantizer.codebook.max() <= 1
    z_q, codes, _ = quantizer(torch.randn(200_000, width) * 2)
    assert codes.unique().numel() == n_codes and torch.allclose(z_q, quantizer.lookup(codes), atol=1e-6)


def test_fsq_searches_its_levels_once(monkeypatch):
    quantizer = make_quantizer("fsq")
    monkeypatch.setattr("minit2i.vq.fsq_levels", None)
    assert quantizer(torch.randn(5, 1))[1].shape == (5,)


def test_fsq_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="leave out --l2_norm"):
        make_quantizer("fsq", l2_norm=True)
    with pytest.raises(ValueError, match="1021 is not a product"):
        make_quantizer("fsq", n_codes=1021)


def test_moving_average_equals_a_loop():
    quantizer = make_quantizer("ema", restart=0.0, decay=0.9)
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
    quantizer, z = make_quantizer("ema", restart=0.5), torch.randn(200, 4)
    z[:100] = 3.0 + torch.randn(100, 4) * 0.1
    quantizer.codebook[1:] = 1e3
    assert nearest_code(z, quantizer.codebook).unique().tolist() == [0]
    for step in range(60):
        quantizer.update(z, nearest_code(z, quantizer.codebook), step)
    assert nearest_code(z, quantizer.codebook).unique().numel() > 12
    assert torch.allclose(quantizer.codebook, quantizer.ema_sum / quantizer.ema_count[:, None], atol=1e-4)


def test_restarts_go_where_the_error_is_largest():
    """Sampled uniformly, 15 restarts would nearly all land on the background, which has its code already."""
    quantizer, z = make_quantizer("ema"), torch.zeros(1000, 4)
    z[:100] = (torch.randn(5, 4) + 10).repeat(20, 1)
    quantizer.codebook.fill_(1e3)
    quantizer.codebook[0] = 0
    quantizer.ema_count[1:] = 0
    quantizer.update(z, nearest_code(z, quantizer.codebook), 0)
    assert nearest_code(z, quantizer.codebook).unique().numel() == 6


@pytest.mark.parametrize("name", QUANTIZERS)
def test_an_overflow_does_not_reach_the_codebook(name):
    """In float16 a step can overflow; the scaler skips it, and the quantizer must too."""
    quantizer = make_quantizer(name)
    z = torch.randn(40, quantizer.widths(small(quantizer=name).cfg)[0])
    _, codes, _ = quantizer(z)
    z[3] = torch.nan
    quantizer.update(z, codes, 0)
    assert all(v.isfinite().all() for v in quantizer.state_dict().values())


@pytest.mark.parametrize("bad", [1, 40])
def test_no_code_restarts_on_an_overflow(bad):
    """Bad latents are set to zero, which is far from every code here."""
    quantizer, z = make_quantizer("ema"), torch.randn(40, 4) + 50
    quantizer.codebook.copy_(torch.randn(16, 4) + 50)
    quantizer.ema_sum.copy_(quantizer.codebook)
    quantizer.ema_count[1:] = 0
    z[:bad] = torch.inf
    quantizer.update(z, torch.zeros(40, dtype=torch.long), 0)
    assert (quantizer.codebook - 50).abs().max() < 10


def test_kmeans_initialisation_uses_every_code():
    quantizer, random, z = make_quantizer("ema"), make_quantizer("ema"), torch.randn(500, 4) + 20
    quantizer.start(torch.cat([z[:3] * torch.inf, z]))  # float16 may overflow
    assert (quantizer.codebook - 20).abs().max() < 5
    assert nearest_code(z, quantizer.codebook).unique().numel() == 16

    def error(q):
        return float((z - q.codebook[nearest_code(z, q.codebook)]).square().sum(1).mean())

    assert error(quantizer) < 0.5 * z.var(0).sum() < error(random)


@pytest.mark.parametrize("rows", [(), (4,)])
def test_a_gpu_samples_the_indices_that_a_cpu_samples(rows):
    weight, found = torch.rand(*rows, 300, dtype=torch.float64).square() * (torch.rand(300) < 0.7), []
    for seed in range(3):
        uniform = torch.rand(*rows, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found.append((inverse_cdf(weight, uniform), sample_indices(weight, 500, seed)))
    assert all(a.equal(b) for a, b in found) and not found[0][0].equal(found[1][0])
    assert inverse_cdf(torch.tensor([0.0, 0.0, 2.0, 0.0, 2.0]), torch.tensor([0.3, 0.6]).double()).tolist() == [2, 4]


class OnlyOnGPU(TorchDispatchMode):
    """Context in which no tensor may be copied from a (fake) GPU to the CPU; counts products, and choices of codes."""

    products = choices = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out, inputs = f(*args, **kwargs or {}), [x for x in tree_leaves(args) if torch.is_tensor(x)]
        if any(x.is_cuda for x in inputs) and torch.is_tensor(out) and out.is_cpu:
            raise TypeError(f"{f} waits for the GPU")
        self.products += "addmm" in str(f)
        self.choices += "nearest_code" in str(f)
        return out


@pytest.mark.skipif(torch.__version__.startswith("2.9"), reason="its fake tensors on a GPU need a driver")
@pytest.mark.parametrize("name", ["ema", "st", "fixed", "fsq"])
def test_codebooks_do_not_wait_for_a_gpu(name):
    """A number that is read raises an error for fake tensors.  4,096 x 4,096 distances are one product there."""
    vq = small(quantizer=name, n_codes=4096)
    quantizer = vq.quantizer
    with FakeTensorMode(), torch.device("cuda"):
        quantizer._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        z = torch.empty(4096, quantizer.widths(vq.cfg)[0])
        with OnlyOnGPU() as work:
            quantizer.start(z)
            codes = quantizer(z, train=True)[1]
            quantizer.update(z, codes, 0)
        assert codes.is_cuda and work.choices == (0 if name == "fsq" else 10 + 1)
        with OnlyOnGPU() as work:
            assert nearest_code._init_fn(z, z).is_cuda and work.products == 1
    with FakeTensorMode(), torch.device("cuda"), OnlyOnGPU(), pytest.raises(TypeError, match="waits for the GPU"):
        torch.ones(3).cpu()


class Largest(TorchDispatchMode):
    """Context that notes the number of elements of the largest tensor."""

    elements = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        for x in tree_leaves(out):
            if torch.is_tensor(x):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("name", ["ema", "st", "fixed", "fsq"])
def test_training_makes_no_table_of_latents_times_codes(name):
    """k-means, a step forward and backward, and its update, with restarts: at most a block of nearest_code's."""
    n, vq = 256, small(quantizer=name, n_codes=2**16, restart=0.5)
    quantizer = vq.quantizer
    z = torch.randn(n, quantizer.widths(vq.cfg)[0], requires_grad=True)
    with Largest() as largest:
        quantizer.start(z)
        z_q, codes, loss = quantizer(z, train=True, step=quantizer.first_step)
        (z_q.sum() + loss).backward()
        quantizer.update(z, codes, 0)
        assert largest.elements < n * 2**16 / 3
        torch.cdist(z, quantizer.codebook.float())
        assert largest.elements >= n * 2**16


def update_codebooks(names, z):
    """Ten updates of each codebook, with restarts, each rank with its share of a batch -> the states of all ranks."""
    procs, states = Processes("cpu"), {}
    share = z.chunk(procs.world, 1)[procs.rank]
    for name in names:
        torch.manual_seed(0)
        quantizer = make_quantizer(name, restart=0.4)
        quantizer.start(share[0])
        for step, batch in enumerate(share):
            quantizer.update(batch, nearest_code(batch, quantizer.codebook), step)
        states |= {f"{name}.{k}": v for k, v in quantizer.state_dict().items()}
    return gather_objects(states)


def test_two_ranks_match_one_on_the_same_global_batch():
    """Statistics, k-means and restarts see the latents of all ranks."""
    z = torch.randn(10, 64, 4)
    (one,), (first, second) = update_codebooks(CODEBOOKS, z), fork(2, update_codebooks, CODEBOOKS, z)
    for k, v in one.items():
        assert torch.allclose(v, first[k], atol=1e-5) and first[k].equal(second[k]), k


# --- backbones ---


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("stride, shape", [(2, (8, 12)), (4, (32, 32)), (8, (48, 16)), (16, (32, 32))])
def test_shapes_for_every_backbone_stride_and_oblong_images(backbone, stride, shape):
    vq = small(stride=stride, backbone=backbone)
    x = torch.rand(2, 3, *shape) * 2 - 1
    grid = tuple(s // stride for s in shape)
    codes = vq.encode(x)
    assert codes.shape == (2, *grid) and vq.grid(*shape) == grid
    assert vq.decode(codes).shape == x.shape and vq.decode(codes).abs().max() <= 1
    maps, z, flat, loss = vq(x, train=True)
    assert maps.shape == x.shape and flat.equal(codes.flatten()) and z.shape == (codes.numel(), 4)
    (maps.square().sum() + loss).backward()
    assert all(w.grad is not None for w in vq.parameters()), "DDP stops at a parameter that nothing uses"
    assert vq.last_weight.shape[0 if backbone != "vqvae" else 1] in (3, 3 * stride**2)


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_are_images(output):
    vq, x = small(output=output), torch.rand(2, 3, 16, 16) * 2 - 1
    maps, *_ = vq(x)
    assert maps.shape == (2, OUTPUTS[output][0], 16, 16) and vq.to_image(maps).shape == x.shape


@pytest.mark.parametrize(
    "backbone, quantizer, size, stride, k",
    [("dvae", "gumbel", 256, 8, 8192), ("vqgan", "st", 256, 16, 16384), ("vqgan", "st", 800, 16, 1024)],
)
def test_code_grids_of_the_papers(backbone, quantizer, size, stride, k):
    """DALL-E's 32x32 codes of 8,192; VQGAN's 16x16 of 16,384; CogView's fashion model has a VQGAN's 50x50."""
    vq = build_vq(dict(stride=stride, ch=2, n_res=1, quantizer=quantizer, n_codes=k, code_dim=8, backbone=backbone))
    x = torch.rand(1, 3, size, size) * 2 - 1
    codes = vq.encode(x)
    assert codes.shape == (1, size // stride, size // stride) and vq.decode(codes).shape == x.shape


def test_dvae_bottlenecks():
    """n_layers counts the blocks of all groups, and the branch is a quarter as wide.  DALL-E app. A.1."""
    blocks = [m for m in small(stride=8, n_res=2, backbone="dvae").encoder if hasattr(m, "gain")]
    assert len(blocks) == 8 and {b.gain for b in blocks} == {1 / 64}
    assert [b.branch[-1].out_channels // b.branch[1].out_channels for b in blocks] == [4] * 8
    x = torch.randn(1, 8, 4, 4)
    assert torch.allclose(blocks[0](x), x + blocks[0].branch(x) / 64)


def test_movq_norms_are_modulated_by_the_latents():
    """They start as plain GroupNorm; then positions with equal latents are scaled alike, with others differently."""
    norm, x = SpatialNorm(8, groups=8, code_dim=4), torch.randn(2, 8, 8, 8)
    z = torch.randn(2, 4, 2, 2)
    plain = F.group_norm(x, 8)
    assert torch.allclose(norm(x, z), plain, atol=1e-4)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    plain = F.group_norm(x, 8) * norm.weight[:, None, None] + norm.bias[:, None, None]
    z[0, :, 0, 0] = z[0, :, 1, 1]
    scale, shift, y = norm.conv_y(z), norm.conv_b(z), norm(x, z)
    for i, j in ((0, 0), (3, 5), (7, 7)):
        expected = plain[:, :, i, j] * scale[:, :, i // 4, j // 4] + shift[:, :, i // 4, j // 4]
        assert torch.allclose(y[:, :, i, j], expected, atol=1e-4)


def test_movq_norms_get_the_latents_before_post_quant_conv():
    """All of the decoder's norms, none of the encoder's."""
    vq, z, seen = small(backbone="movq", z_channels=6), torch.randn(1, 4, 4, 4), []
    for m in vq.modules():
        if isinstance(m, SpatialNorm):
            m.register_forward_hook(lambda m, inputs, out: seen.append(inputs[1]))
    vq.decoder(z)
    n_norms = sum(isinstance(m, Norm) for m in vq.decoder.modules())
    assert len(seen) == n_norms > 15 and all(latents.equal(z) for latents in seen)
    assert not any(isinstance(m, SpatialNorm) for m in vq.encoder.modules())


def test_vqgan_halves_with_padding_on_the_right_and_below():
    """As the release; ours padded on all sides once, which shifts every feature by half a pixel."""
    vq, x = small(backbone="vqgan", attention="none"), torch.randn(1, 8, 6, 6)
    at = next(i for i, m in enumerate(vq.encoder.layers) if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2))
    conv = vq.encoder.layers[at]
    y = conv(vq.encoder.layers[at - 1](x))
    for i, j in ((0, 0), (1, 2), (2, 2)):
        patch = torch.zeros(8, 3, 3)
        part = x[0, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        patch[:, : part.shape[1], : part.shape[2]] = part
        expected = (conv.weight * patch).sum((1, 2, 3)) + conv.bias
        assert torch.allclose(y[0, :, i, j], expected, atol=1e-5)


def test_vqgan_attention_stands_where_it_is_asked_for():
    """After each block of a resolution (2 in the encoder, 3 in the decoder) and once in the middle; Muse: nowhere."""

    def count(**settings):
        vq = build_vq(SMALL | dict(backbone="vqgan", n_res=2) | settings)
        return [sum(isinstance(m, SelfAttention) for m in net.modules()) for net in (vq.encoder, vq.decoder)]

    assert count() == [3, 4] and count(attention="last") == [2, 3] and count(attention="mid") == [1, 1]
    assert count(attention="1,2,mid") == [5, 7] and count(attention="none") == [0, 0]
    assert count(decoder_attention="none") == [3, 0] and count(backbone="movq", attention="2") == [2, 3]
    assert count(backbone="dvae", decoder="vqgan", decoder_attention="mid") == [0, 1]
    block, x = SelfAttention(6, partial(Norm, groups=6)), torch.randn(1, 6, 2, 3)
    q, k, v = (layer(block.norm(x, None).flatten(2).mT)[0] for layer in (block.q, block.k, block.v))  # (6, 6) each
    mixed = torch.stack([sum(w * v[j] for j, w in enumerate((q[i] @ k.T / 6**0.5).softmax(0))) for i in range(6)])
    assert torch.allclose(block(x, None), x + block.out(mixed).T.view(1, 6, 2, 3), atol=1e-5)


def test_vqgan_channels_per_resolution():
    encoder = build_vq(SMALL | dict(backbone="vqgan", ch_mult="2,1,5")).encoder
    assert [ch for ch, _ in encoder.levels] == [16, 8, 40] and encoder.layers[0].out_channels == 16
    assert [ch for ch, _ in small(backbone="vqgan", stride=32).encoder.levels] == [8, 8, 16, 16, 32, 32]
    last = small(backbone="vqgan", decoder_ch=4, norm_groups=2).decoder.layers[-3:]
    assert last[2].in_channels == 4 and last[0].num_groups == 2 and last[0].eps == 1e-6


@pytest.mark.parametrize("backbone", ["vqgan", "movq"])
def test_vqgan_norms_have_four_channels_a_group_or_more(backbone):
    """As the paper's at 128 channels.  A group of one channel would map flat images of all colours to the same."""
    for ch, groups in ((8, 2), (24, 6), (32, 8), (128, 32), (256, 32)):
        with torch.device("meta"):
            vq = small(backbone=backbone, ch=ch)
        assert {m.num_groups for m in vq.modules() if isinstance(m, Norm)} == {groups}
    vq = small(backbone=backbone, ch=16)
    norm, z = vq.decoder.layers[-3], torch.zeros(2, vq.cfg.code_dim, 2, 2)
    flat = torch.randn(2, 16, 1, 1).expand(2, 16, 8, 8)
    assert (norm(flat, z)[0] - norm(flat, z)[1]).abs().max() > 0.1


def test_vqgan_norms_are_precise_in_any_memory_format():
    """torch's GroupNorm over channels_last, which transposed latents have, is off by 4e-4 here."""
    x, norm = torch.randn(2, 64, 64, 64) * 0.3 + 2, Norm(64, 32)
    exact = F.group_norm(x.double(), 32, eps=1e-6).float()
    for y in (x, x.contiguous(memory_format=torch.channels_last)):
        assert (norm(y, None) - exact).abs().max() < 2e-5


def test_vit_attention_equals_a_loop():
    block, x = ViTBlock(8, 2), torch.randn(1, 6, 8)
    q, k, v = block.qkv(block.norm1(x))[0].view(6, 3, 2, 4).unbind(1)  # (6, 2, 4) each
    mixed = torch.zeros(6, 2, 4)
    for i in range(6):
        for h in range(2):
            weight = torch.stack([(q[i, h] * k[j, h]).sum() / 2 for j in range(6)]).softmax(0)
            mixed[i, h] = sum(weight[j] * v[j, h] for j in range(6))
    y = x + block.out(mixed.view(1, 6, 8))
    assert torch.allclose(block(x), y + block.mlp(block.norm2(y)), atol=1e-5)
    with pytest.raises(ValueError, match="not a multiple of its heads of 64; use 48"):
        small(ch=40, backbone="vit")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_without_nan(backbone, dtype):
    """Autocast, loss scaling, Gumbel or moving-average codes, logit-Laplace: finite and falling over 20 steps."""
    torch.manual_seed(0)
    quantizer = dict(quantizer="gumbel", kl_weight=0.1) if backbone == "dvae" else dict(quantizer="ema")
    vq = small(backbone=backbone, output="logit_laplace", **quantizer)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(vq.parameters(), 3e-3)
    x, seen = torch.rand(4, 3, 1, 1).expand(-1, -1, 8, 8) * 2 - 1, []
    for step in range(20):
        with torch.autocast("cpu", dtype):
            maps, z, codes, loss = vq(x, True, step)
            nll = logit_laplace(maps, None, x)
        assert nll.dtype == loss.dtype == vq.to_image(maps).dtype == torch.float32
        scaler.scale(nll + loss).backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        vq.quantizer.update(z, codes, step)
        seen.append(float(nll.detach()))
    assert torch.tensor(seen).isfinite().all() and seen[-1] < seen[0]
    assert all(v.isfinite().all() for v in vq.state_dict().values())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_reach_bounds_the_receptive_field_of_local_backbones(backbone):
    vq = small(backbone=backbone).double()
    x = torch.rand(1, 3, 128, 64, dtype=torch.double) * 2 - 1
    changed = x.clone()
    changed[:, :, :4, :4] += 1  # one code's own pixels
    far = (vq.latents(x) != vq.latents(changed)).any(-1)[0].any(1).nonzero().max()  # the last row that changed
    if is_local(vq.encoder):
        assert far <= reach(vq.encoder) / 4 + 1
    else:
        assert far == 31, "a backbone that sees everything is not local"
    if backbone in LOCAL:
        assert is_local(vq.encoder) and is_local(vq.decoder)


def test_a_code_depends_on_its_surroundings_only():
    """Otherwise each code would know the whole image, and the prior could recognise training images by their first."""
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    changed = x.clone()
    changed[:, :, 32:, 32:] = 0.5
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[8:, 8:] = True
    for patchwise in (False, True):
        vq = small(patchwise=patchwise)
        moved = (vq.latents(x) != vq.latents(changed)).any(-1)[0]  # (16, 16)
        assert moved[inside].all() and not moved[:4].any() and not moved[:, :4].any()
        assert moved.equal(inside) == patchwise


WDSR_SETTINGS = dict(upsampler="wdsr", upscale=2, sr_ch=8, sr_blocks=2)


@pytest.mark.parametrize("backbone, upsampler", [("vqvae", {}), ("dvae", WDSR_SETTINGS), ("vqgan", {})])
def test_tiles_give_the_same_codes_if_the_backbone_is_local(backbone, upsampler):
    """vqgan's norms see the whole image: there the shapes must be right."""
    torch.manual_seed(0)
    vq = small(backbone=backbone, **upsampler).double()
    x, s = torch.rand(2, 3, 64, 104, dtype=torch.double) * 2 - 1, vq.cfg.upscale
    codes, seen = vq.encode(x), []
    vq.encoder.register_forward_hook(lambda m, inputs, out: seen.append(out.shape[2] * out.shape[3]))
    tiled = vq.encode(x, tile=6)
    assert tiled.shape == codes.shape and len(seen) == 15 and max(seen) < codes[0].numel()
    images = vq.decode(codes), vq.decode(codes, tile=6)
    assert images[0].shape == images[1].shape == (2, 3, 64 * s, 104 * s)
    if is_local(vq.encoder):
        assert tiled.equal(codes) and torch.allclose(*images, atol=1e-6)


# --- upsamplers ---


@pytest.mark.parametrize("name", [name for name, kind in UPSAMPLERS.items() if kind])
def test_upsamplers_enlarge_the_decoded_image(name):
    vq, x = small(upsampler=name), torch.rand(2, 3, 16, 24) * 2 - 1
    s = vq.cfg.upscale
    assert s > 1 and vq.decode(vq.encode(x)).shape == (2, 3, 16 * s, 24 * s)
    assert vq.to_image(vq(x)[0]).shape == (2, 3, 16 * s, 24 * s)
    assert any(vq.last_weight is w for w in vq.upsampler.parameters())


@pytest.mark.parametrize("scale", [2, 4])
def test_wdsr_starts_as_bicubic_interpolation(scale):
    x, net = torch.rand(2, 3, 9, 6), small(**WDSR_SETTINGS | dict(upscale=scale)).upsampler
    expected = F.interpolate(x, scale_factor=scale, mode="bicubic")
    assert torch.allclose(net(x), expected, atol=1e-5)
    net(x).square().sum().backward()
    assert net.last.parametrizations.weight.original0.grad.abs().sum() > 0, "it must be able to leave that start"


def test_wdsr_has_the_size_that_parti_names():
    """About 15 M parameters for 12 blocks of 128 channels."""
    assert 14e6 < sum(w.numel() for w in WDSR(WDSR.Config()).parameters()) < 15e6


# --- errors, learning ---


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(backbone="unet"), "backbone 'unet' is not known; use one of vqvae"),
        (dict(decoder="unet"), "decoder 'unet' is not known; use one of vqvae"),
        (dict(quantizer="vq"), "quantizer 'vq' is not known; use one of ema"),
        (dict(upsampler="big"), "upsampler 'big' is not known; use one of none"),
        (dict(backbone="vit", patchwise=True), "--patchwise is for the vqvae backbone"),
        (dict(backbone="vqgan", ch_mult="1,2"), "ch_mult '1,2' is not 3 numbers, one for each stride from 1 to 4"),
        (dict(backbone="vqgan", ch_mult="1,2,x"), "ch_mult '1,2,x' is not 3 numbers"),
        (dict(backbone="vqgan", attention="8"), "attention '8' is not known; use 1, 2, 4, last, mid or none"),
        (dict(n_codes=0), "n_codes 0 is not a number of at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_a_size_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="height 60 is not a multiple of the tokenizer's stride 8; use 56 or 64"):
        small(stride=8).encode(torch.zeros(1, 3, 60, 64))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_overfits_one_batch(name):
    torch.manual_seed(0)
    fast = dict(tau_steps=100, kl_weight=0.01, free_steps=50)
    vq = small(quantizer=name, ch=16, n_codes=64, code_dim=8, **fast)
    x = torch.rand(4, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1  # 16x16: a colour per code
    optimizer, errors = torch.optim.AdamW(vq.parameters(), 3e-3), []
    for step in range(250 if name.startswith("gumbel") else 150):  # after 150: a ratio up to 0.3; after 250: 0.1
        if step == vq.quantizer.first_step:
            vq.quantizer.start(vq.latents(x).flatten(0, 2).detach())
        maps, z, codes, loss = vq(x, True, step)
        error = (maps - x).square().mean()
        (error + loss).backward()
        optimizer.step(), optimizer.zero_grad()
        vq.quantizer.update(z, codes, step)
        errors.append(float(error.detach()))
    assert (vq.decode(vq.encode(x)) - x).square().mean() < 0.2 * errors[0]
