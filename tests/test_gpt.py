"""Prior: what depends on what, cached against full logits, losses by hand, all registries' entries alike."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from priors import CASES, EMPTY, GPT2, TINY, batch, big, build, empty_of

from minit2i.attention import MASK_ORDERS, MASKS, dense_attention
from minit2i.config import merge
from minit2i.gpt import CONDITIONS, MODELS, NORMS, Attention, Cache, CrossAttention, GPTConfig, Head
from minit2i.gpt import last_seen, prior_config, resize_grid, rotary_tables, rotate
from minit2i.papers.cogview import CogView
from minit2i.sample import SampleConfig, Sampler

CAUSAL = [name for name in MASKS if name != "bidirectional"]
PICTURE = dict(grid_h=4, grid_w=4)
EPS = torch.finfo(torch.float32).eps
BLOCKS = [  # every norm, each value of every other choice
    *(dict(norm=norm) for norm in NORMS),
    *(
        dict(zip(("pos", "mlp", "qk_norm"), v))
        for v in product(("learned", "rotary"), ("gelu", "swiglu"), (False, True))
    ),
    dict(pos="sequence", n_kv_head=1, mlp_inner=24),
    dict(pos="index"),
    dict(pb_relax=True, sandwich=True, embed_grad=0.1, fp32_logits=True),
]


def label(v):
    return "-".join(map(str, v.values())) if isinstance(v, dict) else str(v)


# --- what may depend on what ---


def reach(model):
    """Which positions each position's state depends on: the product of all layers' masks -> bool (L, L)."""
    own = torch.eye(model.layout.length, dtype=torch.bool)
    seen = own
    for name in model.masks:
        seen = ((model.attention_masks[name].dense | own).float() @ seen.float()) > 0
    return seen


def dependence(outputs, inputs):
    """outputs (N, V) of one sample, inputs [(1, S, D)] -> whether each output depends on each position, bool (N, sum of S)."""
    weight, rows = torch.randn_like(outputs), []
    for out, w in zip(outputs, weight):
        grads = torch.autograd.grad((out * w).sum(), inputs, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([torch.zeros(x.shape[1]) if g is None else g[0].abs().sum(1) for x, g in zip(inputs, grads)])
        )
    return torch.stack(rows) > 0


def leaves(model):
    """From now on each result of the model's embedding table is a leaf, appended to the returned list."""
    found = []

    def detach(module, args, out):
        found.append(out.detach().requires_grad_())
        return found[-1]

    model.embedding.register_forward_hook(detach)
    return found


@pytest.mark.parametrize("mask", [*MASKS, *MASK_ORDERS, "row,column"])
def test_logits_depend_on_what_their_masks_show(mask, monkeypatch):
    """The gradients' support equals the masks' product, over text and codes, text and image logits."""
    monkeypatch.setattr("minit2i.attention.WINDOW", 2)
    model = big(build(mask=mask, n_layer=1 if mask in MASKS else 4, **PICTURE)).double()
    if model.codes_ahead:
        model.check_causal = lambda: None  # refused: see below
    inputs, one = leaves(model), batch(model, 1)
    text_logits, image_logits = model.logits(one)
    seen = reach(model)
    assert dependence(image_logits[0], inputs).equal(seen[4:-1])
    assert dependence(text_logits[0], inputs).equal(seen[:4])
    if mask in MASKS and mask != "bidirectional":
        assert not seen[4:-1, 5:].triu().any()  # no code is shown to its own prediction


@pytest.mark.parametrize("pos", ["learned", "rotary"])
@pytest.mark.parametrize("condition", CASES)
def test_codes_depend_on_conditions_and_earlier_codes(condition, pos):
    """All of a condition reaches each code; of the codes, those that the masks show."""
    model = big(build(condition=condition, pos=pos, mask="row", **PICTURE)).double()
    inputs, one = leaves(model), batch(model, 1, seed=2)
    if one["text"].is_floating_point():
        one["text"].requires_grad_(), inputs.append(one["text"])
    logits = model.logits(one)[1]
    found, seen = dependence(logits[0], inputs), reach(model)[model.layout.n_prefix - 1 : -1, model.layout.n_prefix :]
    assert found[:, :-16].equal(torch.ones(16, found.shape[1] - 16, dtype=torch.bool) & read(model, one))
    assert found[:, -16:].equal(seen) and not seen.triu().any()


def read(model, one):
    """Conditions that are read in full: frozen states at pads are replaced by learned vectors, other pads hidden."""
    if one["text"].is_floating_point():
        return one["text"].detach().abs().sum(2) > 0
    seen = model.condition(one)[1].seen
    return torch.tensor(True) if seen is None else seen[:, : model.layout.n_prefix]


def test_masks_that_show_codes_ahead_are_refused():
    model = build(mask="row,bidirectional")
    for use in (lambda: model.check(0.0), lambda: model.logits(batch(model)), lambda: Cache(model, 1, 5)):
        with pytest.raises(ValueError, match="mask row,bidirectional shows a code those after it.*use a causal mask"):
            use()


def test_text_that_sees_ahead_has_no_loss():
    model = build(mask="causal,prefix")
    loss, n = model(batch(model)), model.n_targets(batch(model))
    assert loss["text"] == 0 == n["text"] and loss["image"] > 0
    model.check(0.0)
    with pytest.raises(ValueError, match="mask causal,prefix .*needs --text_weight 0"):
        model.check(0.125)


# --- layers ---


@pytest.mark.parametrize("norm", NORMS)
def test_norms_against_their_formula(norm):
    """With and without gradients, which take different ways on a CPU."""
    layer = NORMS[norm](24, 1e-6)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    centred = norm != "rmsnorm"
    for dtype, scale in ((torch.float32, 1.0), (torch.float32, 1e-3), (torch.bfloat16, 1.0)):
        x = (torch.randn(5, 3, 24) * scale).to(dtype)
        y = x.double() - centred * x.double().mean(-1, keepdim=True)
        unit = y.abs().amax(-1, keepdim=True) if norm == "pb_layernorm" else 1  # its eps is beside x / max
        eps = 1e-6 if norm == "rmsnorm" else 1e-5
        expected = y / (y.square().mean(-1, keepdim=True) + eps * unit**2).sqrt() * layer.weight.double()
        expected = expected + (layer.bias.double() if centred else 0)
        with torch.no_grad():
            sampling = layer(x)
        for found in (layer(x), sampling):
            # a mean of 24 squares; 8 bits of bfloat16 in input, sums and output
            tolerance = 1e-5 if dtype == torch.float32 else 0.1 if norm == "pb_layernorm" else 0.03
            close = torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
            assert close and (found.dtype == dtype or norm == "layernorm")


def test_attention_with_grouped_queries_against_a_loop():
    """Each of two key heads serves two query heads."""
    cfg = GPTConfig(**TINY | GPT2 | dict(n_head=4, n_kv_head=2, qk_norm=True))
    layer, x = big(Attention(cfg)).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    mask = build(n_head=4).attention_masks["causal"]
    q, k, v = (x @ layer.qkv.weight.t()).split([16, 8, 8], -1)
    out = torch.zeros(2, 5, 16, dtype=torch.float64)
    for b, s, head in product(range(2), range(5), range(4)):
        part, pair = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        one, keys = layer.q_norm(q[b, s, part]), layer.k_norm(k[b, : s + 1, pair])
        out[b, s, part] = (keys @ one / 2).softmax(0) @ v[b, : s + 1, pair]
    assert torch.allclose(layer(x, mask, 0, None, None), out @ layer.out.weight.t(), atol=1e-10)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cross_attention_against_a_loop(qk_norm):
    cross = big(CrossAttention(GPTConfig(**TINY | GPT2 | dict(qk_norm=qk_norm)))).double()
    x, memory = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    k, v = (memory @ cross.kv.weight.t()).split(16, -1)
    q, out = x @ cross.q.weight.t(), torch.zeros(2, 3, 16, dtype=torch.float64)
    for b, s, part in product(range(2), range(3), (slice(0, 8), slice(8, 16))):
        one, keys = q[b, s, part], k[b, :, part]
        if qk_norm:
            one, keys = cross.q_norm(one), cross.k_norm(keys)
        out[b, s, part] = (keys @ one / 8**0.5).softmax(0) @ v[b, :, part]
    assert torch.allclose(cross(x, memory, None), out @ cross.out.weight.t(), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_hidden_memory_is_as_if_absent(dtype):
    """What is hidden is not read; where all is hidden, cross-attention gives exactly zero, and no gradient."""
    cross = big(CrossAttention(GPTConfig(**TINY | GPT2))).to(dtype)
    x, memory = (torch.randn(3, n, 16).to(dtype).requires_grad_() for n in (4, 5))
    seen = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    y = cross(x, memory, None, seen)
    for b, row in enumerate(seen):
        expected = cross(x[b : b + 1], memory[b : b + 1, row], None)[0] if row.any() else torch.zeros(4, 16)
        assert torch.allclose(y[b].double(), expected.double(), atol=1e-12 if dtype == torch.float64 else 0.1)
    assert (y[2] == 0).all()
    y.float().sum().backward()
    grads = [x.grad, memory.grad, *(p.grad for p in cross.parameters())]
    assert all(g.isfinite().all() for g in grads) and (memory.grad[~seen] == 0).all() and (x.grad[2] == 0).all()
    assert (memory.grad[seen] != 0).any(1).all()


def test_heads_compute_in_float32_on_request():
    for fp32, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        head = Head(GPTConfig(**TINY | dict(fp32_logits=fp32)), 7)
        with torch.autocast("cpu", torch.bfloat16):
            assert head(torch.randn(2, 3, 16)).dtype == dtype


# --- positions ---


def test_learned_positions_are_rows_plus_columns():
    model = build()
    positions = model.positions()
    assert positions[:5].equal(model.conditions["text"].pos)
    for n in range(6):
        expected = model.grid.row[n // 3, 0] + model.grid.column[0, n % 3]
        assert positions[5 + n].equal(expected)


@pytest.mark.parametrize("pos", ["rotary", "sequence"])
def test_rotary_positions_against_a_loop(pos):
    """Half of the pairs turn with the row and half with the column, or all with the place in the sequence."""
    model = build(pos=pos, grid_h=3, grid_w=4, n_head=1)
    x = torch.randn(17, 16)
    expected = x.clone()
    for n, i in product(range(17), range(8)):
        row, column = (n - 5, n - 5) if n < 5 else divmod(n - 5, 4)  # text: on the diagonal before the grid
        angle = (row if i % 8 < 4 else column) * 100 ** (-(i % 4) / 4) if pos == "rotary" else n * 10000 ** (-i / 8)
        expected[n, i] = x[n, i] * math.cos(angle) - x[n, i + 8] * math.sin(angle)
        expected[n, i + 8] = x[n, i] * math.sin(angle) + x[n, i + 8] * math.cos(angle)
    assert torch.allclose(rotate(x, model.cos, model.sin), expected, atol=100 * EPS)


def test_rotary_scores_depend_on_distances():
    cfg = GPTConfig(**TINY | dict(pos="rotary", n_head=1))
    q, k = torch.randn(2, 16, dtype=torch.float64)

    def score(a, b):
        cos, sin = rotary_tables(cfg, torch.tensor([a, b]).float())
        turned = rotate(torch.stack([q, k]), cos.double(), sin.double())
        return float(turned[0] @ turned[1])

    assert math.isclose(score((2, 3), (1, 1)), score((5, 4), (4, 2)), rel_tol=1e-5)
    assert abs(score((2, 3), (1, 1)) - score((2, 3), (1, 2))) > 1e-3


# --- losses ---


def test_loss_by_hand_and_pads_are_no_targets():
    model = build()
    inputs = batch(model)
    text, codes = inputs["text"], inputs["codes"]
    text_logits, image_logits = (x.detach().double().log_softmax(2) for x in model.logits(inputs))
    pairs = [(b, t) for b in range(3) for t in range(4) if text[b, t + 1] < 11]
    loss, n = model(inputs), model.n_targets(inputs)
    by_hand = -sum(float(text_logits[b, t, text[b, t + 1]]) for b, t in pairs)
    assert math.isclose(loss["text"].item(), by_hand, rel_tol=1e-5) and n["text"] == len(pairs) == 2 + 4 + 4
    by_hand = -sum(float(image_logits[b, i, codes[b, i]]) for b in range(3) for i in range(6))
    assert math.isclose(loss["image"].item(), by_hand, rel_tol=1e-5) and n["image"] == 18
    score = [-float(image_logits[b].gather(1, codes[b][:, None]).mean()) for b in range(3)]
    assert torch.allclose(model.score(inputs).double(), torch.tensor(score).double(), rtol=1e-5)
    found = model.evaluate(inputs)
    assert found["text_loss"] == (loss["text"], 10) and found["image_loss"] == (loss["image"], 18)


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize("model", MODELS)
def test_models_start_at_a_uniform_guess(model):
    """ln V nats per token, about ln B for one caption among B images; inputs are not changed."""
    model = build(model=model, n_embd=64, n_vocab=500, n_codes=300, text_len=12)
    inputs = batch(model, 8)
    before = {k: v.clone() for k, v in inputs.items()}
    corrupted = model.corrupt(inputs, range(8))
    loss, n = model(corrupted), model.n_targets(corrupted)
    assert loss.keys() == n.keys() and same(before, inputs) and same(corrupted, model.corrupt(inputs, range(8)))
    codes = hasattr(model, "image_head")  # towers: cosines times 14 at the start
    guess = {"text": (math.log(500), 0.1), "image": (math.log(300), 0.1) if codes else (math.log(8), 1.0)}
    if isinstance(model, CogView):  # one softmax over words, codes and separators
        guess = dict.fromkeys(("text", "image"), (math.log(500 + 300 + 7), 0.1))
    for name, total in loss.items():
        expected, margin = guess[name]
        assert total.dtype == torch.float32 and n[name] > 0
        assert abs(total.item() / int(n[name]) - expected) < margin, name
    assert model.evaluate(corrupted).keys() >= {f"{name}_loss" for name in loss}


PAIRS = [("gpt", condition) for condition in CASES] + [(model, "text") for model in MODELS if model != "gpt"]


@pytest.mark.parametrize("model, condition", PAIRS)
def test_one_batch_is_learned(model, condition):
    """Every parameter takes part, as DistributedDataParallel needs."""
    model = build(model=model, condition=condition, n_embd=32, text_len=8, n_layer=1, grid_h=4, grid_w=2)
    inputs = batch(model, 4)
    if not inputs["text"].is_floating_point():
        inputs["text"][:, 0] = torch.arange(4)  # otherwise the second token cannot be known
    inputs = model.corrupt(inputs, range(4))
    optimizer, n = torch.optim.AdamW(model.parameters(), 5e-3), model.n_targets(inputs)
    for _ in range(90):
        loss = model(inputs)
        optimizer.zero_grad()
        sum(loss[name] / n[name] for name in loss).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    floor = 4 * math.log(4) if getattr(model, "token_ids", None) else 0.0  # no begin tokens: which caption is unknown
    for name, total in model(inputs).items():
        assert total.item() < 0.2 * int(n[name]) + floor, name


def test_parameter_count_in_closed_form():
    d = 32
    expected = (11 + 5 + 7) * d + (5 + 2 + 3) * d  # tables, positions
    expected += 3 * (12 * d * d + 4 * d) + 2 * d + d * (11 + 7)  # blocks, last norm, heads
    assert sum(p.numel() for p in build(n_embd=d, n_layer=3, **GPT2).parameters()) == expected


# --- sampling ---


def sampling(model, b, **settings):
    cfg = merge(SampleConfig, type(model).Sampling)(**settings)
    return Sampler(cfg, range(cfg.seed, cfg.seed + b))


def generate(model, inputs, n=2, known=None, watch=None, **settings):
    """Codes of n images for each row of a batch."""
    given = {k: v for k, v in inputs.items() if k != "codes"}
    sampler = sampling(model, n * len(inputs["text"]), **settings)
    return model.generate(given, empty_of(inputs), sampler, known, watch)


def naive(model, inputs, n=2, known=None, **settings):
    """The same by computing all logits for each code, one image at a time."""
    out = []
    for b in range(n * len(inputs["text"])):
        sampler = sampling(model, 1, **settings | {"seed": settings.get("seed", 0) + b})
        noise, one = sampler.uniform(model.cfg.n_image), {k: v[b // n][None] for k, v in inputs.items()}
        codes = torch.zeros(1, model.cfg.n_image, dtype=torch.long)
        for i in range(model.cfg.n_image):
            u, both = (i + 1) / model.cfg.n_image, [one, one | {"text": empty_of(inputs)[None]}]
            logits = torch.cat([model.logits(x | {"codes": codes})[1][:, i] for x in both[: 1 + sampler.guided]])
            codes[:, i] = sampler.pick(sampler.filter(sampler.guide(logits, sampler.scale(u))), noise[:, i])
            if known is not None and known[b, i] >= 0:
                codes[:, i] = known[b, i]
        out.append(codes[0])
    return torch.stack(out)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@torch.no_grad()
def test_a_memory_hidden_in_part_or_whole_is_sampled_from_a_cache(cfg_scale, monkeypatch):
    """Also where only the half without captions is hidden."""
    model = big(build(condition="encoder", grid_h=4, grid_w=2, **GPT2)).double()
    shown = lambda self, batch: (batch["text"] < 11) & (batch["text"][:, 1:2] < 11)  # noqa: E731  empty: nothing
    monkeypatch.setattr(CONDITIONS["encoder"], "memory_seen", shown)
    inputs = batch(model, 3)
    inputs["text"][1] = EMPTY
    codes = generate(model, inputs, cfg_scale=cfg_scale)
    assert codes.equal(naive(model, inputs, cfg_scale=cfg_scale))
    other = big(build(condition="encoder", grid_h=4, grid_w=2, **GPT2), 0.5).double().conditions["encoder"]
    before, model.conditions["encoder"].encoder = codes, other.encoder
    after = generate(model, inputs, cfg_scale=cfg_scale)
    assert after[2:4].equal(before[2:4]) and not after.equal(before)  # the encoder does not matter to the empty caption


def cached_logits(model, inputs, tensors=False):
    """Code logits (B, N, V) from a cache, one code at a time; tensors: positions in tensors, as the compiled loop's."""
    p, codes, rows = model.layout.n_prefix, inputs["codes"], torch.arange(len(inputs["text"]))
    prompts = Cache(model, len(rows), p)
    prefix, context = model.condition(inputs)
    hidden = [last_seen(model.trunk(prefix, 0, prompts, context), context.seen)]
    cache = prompts.spread(model, rows, model.layout.length - 1)
    for i in range(codes.shape[1] - 1):
        start = torch.tensor([p + i]) if tensors else p + i
        part = cache.upto(p + i + 1) if tensors else cache
        hidden.append(model.trunk(model.embed_codes(codes[:, i : i + 1]), start, part))
    return model.image_head(torch.cat(hidden, 1))


VARIANTS = [*BLOCKS, *({"mask": name} for name in CAUSAL), {"mask": "dalle", "n_layer": 4}]
VARIANTS += [{"condition": name, "pos": pos} for name in CASES for pos in ("learned", "rotary")]
VARIANTS += [{"mask": mask, "condition": "text,coarse"} for mask in ("prefix", "conv,prefix")]  # read in one pass
VARIANTS += [variant | {"pads": "hidden"} for variant in VARIANTS if variant.keys() & {"mask", "condition"}]
VARIANTS += [{"pos": "index", "pads": "hidden"}]


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
@torch.no_grad()
def test_cached_logits_equal_full_ones(variant, monkeypatch):
    monkeypatch.setattr("minit2i.attention.WINDOW", 2)
    model = big(build(**PICTURE | variant)).double()
    inputs = batch(model)
    expected = model.logits(inputs)[1]
    atol = 1000 * EPS * float(expected.abs().max())  # RMSNorm and rotary tables are float32, over a few layers
    assert torch.allclose(cached_logits(model, inputs), expected, atol=atol)
    assert torch.allclose(cached_logits(model, inputs, tensors=True), expected, atol=atol)
    # several codes at once, as given codes are read
    p, cache = model.layout.n_prefix, Cache(model, 3, model.layout.length - 1)
    prefix, context = model.condition(inputs)
    model.trunk(prefix, 0, cache, context)
    some = model.trunk(model.embed_codes(inputs["codes"][:, :4]), p, cache)
    assert torch.allclose(model.image_head(some), expected[:, 1:5], atol=atol)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cfg_scale": 1.0},
        {"cfg_scale": 0.0, "cfg_schedule": "falling"},
        {"temperature": 0.0, "top_k": 4, "min_p": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("condition", CASES)
@torch.no_grad()
def test_sampling_equals_the_naive_loop(condition, settings):
    model = big(build(condition=condition, grid_h=4, grid_w=2, **GPT2)).double()
    inputs = batch(model, 2)
    assert generate(model, inputs, n=1 if "coarse" in inputs else 2, **settings).equal(
        naive(model, inputs, n=1 if "coarse" in inputs else 2, **settings)
    )


@torch.no_grad()
def test_known_codes_are_kept_and_read():
    """At the start, in the middle and everywhere; in one image only; the caller's tensors do not change."""
    model = big(build(**GPT2)).double()
    inputs = batch(model)
    before = {k: v.clone() for k, v in inputs.items()}
    for places in ([], [0], [3], [0, 1, 4], [5], range(6)):
        known = torch.full((6, 6), -1)
        known[:, places] = torch.arange(6)[:, None] % 7
        given = known.clone()
        assert generate(model, inputs, known=known).equal(naive(model, inputs, known=known)) and known.equal(given)
    known[1, 2] = -1
    assert generate(model, inputs, known=known).equal(naive(model, inputs, known=known))
    assert same(inputs, before) and EMPTY.tolist() == [1, 12, 13, 14, 15]


@pytest.mark.parametrize("m", [1, 5, 6])
@torch.no_grad()
def test_a_given_start_is_finished_as_before(m):
    model = big(build(**GPT2)).double()
    inputs = batch(model)
    whole = generate(model, inputs)
    known = whole.clone()
    known[:, m:] = -1
    assert generate(model, inputs, known=known).equal(whole)


@pytest.mark.parametrize("model", ["gpt", "masked"])
@torch.no_grad()
def test_images_depend_on_their_seed_alone(model):
    """Not on the other images of a batch, nor on their number."""
    model = big(build(model=model, grid_h=4, grid_w=4, **GPT2)).double()
    inputs = batch(model)
    together = generate(model, inputs, n=3, seed=5)
    for k in range(3):
        alone = generate(model, {key: x[k : k + 1] for key, x in inputs.items()}, n=3, seed=5 + 3 * k)
        assert together[3 * k : 3 * k + 3].equal(alone)
    first = {key: x[:1] for key, x in inputs.items()}
    assert generate(model, first, n=1, seed=6)[0].equal(together[1]) and not together[0].equal(together[1])


@torch.no_grad()
def test_guidance_of_one_and_zero():
    model = big(build(**GPT2)).double()
    inputs = batch(model)
    unconditional = generate(model, inputs | {"text": EMPTY.repeat(3, 1)}, cfg_scale=1.0)
    assert generate(model, inputs, cfg_scale=0.0, cfg_schedule="constant").equal(unconditional)
    assert not generate(model, inputs, cfg_scale=1.0).equal(unconditional)


@torch.no_grad()
def test_watch_sees_each_code():
    model, seen = big(build()), []
    codes = generate(model, batch(model), watch=lambda c: seen.append(c.clone()))
    assert [int((c >= 0).sum()) for c in seen] == [6, 12, 18, 24, 30, 36] and seen[-1].equal(codes)


OFFERS = {  # what else than a loss a model has
    "gpt": {"generate", "score"},
    "masked": {"generate"},
    "captioner": {"score", "write_captions"},
    "cogview": {"generate", "score"},
    "cogview_captioner": {"score", "write_captions"},
    "towers": {"score"},
    "language_model": set(),
    "llama": {"generate", "score"},
}
REFUSALS = {"generate": "samples no images", "score": "gives no score", "write_captions": "writes no captions"}


@pytest.mark.parametrize("model", MODELS)
def test_models_refuse_what_they_cannot_do(model):
    """Any other model must offer something, and refuse the rest by the same errors."""
    prior, found = build(model=model), set()
    inputs = batch(prior)
    uses = {
        "generate": lambda: generate(prior, inputs, n=1),
        "score": lambda: prior.score(inputs),
        "write_captions": lambda: prior.write_captions(inputs["codes"], sampling(prior, 3), 1, 2),
    }
    for name, use in uses.items():
        try:
            result = use()
        except ValueError as e:
            assert f"--model {model} {REFUSALS[name]}" in str(e)
            continue
        found.add(name)
        assert result.shape == {"generate": (3, 6), "score": (3,), "write_captions": (3, 5)}[name]
        assert result.isfinite().all() and (name == "score" or (result >= 0).all())
    assert found == OFFERS.get(model, found)


@pytest.mark.slow
@pytest.mark.parametrize("pads", ["learned", "hidden"])
@pytest.mark.parametrize("mask", ["causal", "row"])
@torch.no_grad()
def test_the_compiled_loop_samples_the_same_from_few_graphs(mask, pads, monkeypatch):
    """One graph for all lengths of the cache, one for its whole length."""
    model = big(build(mask=mask, pads=pads, grid_h=12, grid_w=12))
    inputs = batch(model, 2)
    expected, compiled, graphs, lengths = generate(model, inputs), torch.compile, [], set()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("torch.compile", lambda f, mode, **how: compiled(f, backend=backend, fullgraph=True, **how))
    torch._dynamo.reset()
    model.compile_step()
    step = model.compiled_step
    model.compiled_step = lambda code, at, cache, *more: (
        lengths.add(cache.kv[0][0].shape[2]) or step(code, at, cache, *more)
    )
    for _ in range(2):  # the second time with another cache
        assert generate(model, inputs).equal(expected)
    assert len(graphs) == 2 and lengths == {32, 64, 96, 128, 5 + 143}


# --- hidden pads ---


PADDED = [{"mask": name, "n_layer": 2} for name in MASKS] + [{"mask": "dalle", "n_layer": 4}, {"pos": "rotary"}]
PADDED += [{"pos": "index"}]
PADDED += [{"condition": "text,coarse"}, {"pb_relax": True}, {"model": "masked"}]


def without_pads(model, one):
    """Code logits of one sample by an explicit mask over a sequence from which pads are left out."""
    cfg, (prefix, _) = model.cfg, model.condition(one)
    x = model.arrange(prefix, model.embed_codes(one.get("visible_codes", one["codes"])))
    keep = torch.ones(x.shape[1], dtype=torch.bool)
    keep[: cfg.text_len] = one["text"][0] < cfg.n_vocab
    x = (x + model.positions() if cfg.pos == "learned" else x)[:, keep]
    x = x + model.index[: x.shape[1]] if cfg.pos == "index" else x
    for block, name in zip(model.blocks, model.masks):
        attn, h = block.attn.f, block.attn.norm(x)
        q, k, v = attn.qkv(h).unflatten(2, (3 * cfg.n_head, -1)).transpose(1, 2).chunk(3, 1)
        if cfg.pos == "rotary":
            q, k = (rotate(part, model.cos[keep], model.sin[keep]) for part in (q, k))
        y = dense_attention(q, k, v, model.attention_masks[name].dense[keep][:, keep])
        x = block.mlp(x + attn.out(y.transpose(1, 2).flatten(2)))
    n = cfg.n_image
    states = model.norm(x)[:, -n:] if cfg.model == "masked" else model.norm(x)[:, -n - 1 : -1]
    return model.image_head(states)


def lengths(model, b=4):
    """A batch whose captions have one token, two, all ...; the codes are the same."""
    inputs = model.corrupt(batch(model, b), range(b))
    for row, n in zip(inputs["text"], (1, 2, model.cfg.text_len, 3)):
        row[n:] = 11 + torch.arange(n, model.cfg.text_len)
    return inputs


@pytest.mark.parametrize("variant", PADDED, ids=label)
def test_hidden_pads_are_as_if_absent(variant, monkeypatch):
    """Logits of each sample equal those of a sequence without its pads, whose vectors get no gradient at all."""
    monkeypatch.setattr("minit2i.attention.WINDOW", 2)
    settings = PICTURE | GPT2 | variant | {"pads": "hidden"}
    model = big(build(**settings)).double()
    model.check_causal = lambda: None  # bidirectional
    inputs = lengths(model)
    logits = model.logits(inputs)[1]
    for b in range(4):
        one = {k: x[b : b + 1] for k, x in inputs.items()}
        assert torch.allclose(logits[b], without_pads(model, one)[0], atol=1e-4 if "pos" in variant else 1e-9)
        assert torch.allclose(logits[b], model.logits(one)[1][0], atol=1e-9)
    sum(model(inputs).values()).backward()
    grad = model.embedding.weight.grad
    assert (grad[11:16] == 0).all() and grad[:11].any() and grad[16:].any()
    learned = build(**settings | {"pads": "learned"}).double()
    learned.check_causal = lambda: None
    learned.load_state_dict(model.state_dict())
    assert not torch.allclose(learned.logits(inputs)[1], logits, atol=1e-3)


@pytest.mark.parametrize("condition", ["text", "encoder", "text,coarse"])
def test_hidden_pads_equal_a_shorter_caption(condition):
    """A prior of 3 text positions with the same weights reads a caption of 3 tokens alike: encoder and memory, too."""
    long, short = (build(condition=condition, text_len=n, pads="hidden", **PICTURE | GPT2).double() for n in (5, 3))
    tensors = dict(big(long).state_dict())
    for name, tensor in tensors.items():
        if name == "embedding.weight":
            tensors[name] = torch.cat([tensor[:14], tensor[16:]])
        elif tensor.shape != short.state_dict()[name].shape:
            tensors[name] = tensor[:3]
    short.load_state_dict(tensors)
    inputs = batch(long, 3)
    inputs["text"][:, 3:] = torch.tensor([14, 15])
    logits = long.logits(inputs)[1]
    assert torch.allclose(short.logits(inputs | {"text": inputs["text"][:, :3]})[1], logits, atol=1e-9)
    logits.square().sum().backward()
    grads = [p.grad for p in long.parameters() if p.grad is not None]  # text is not learned here
    assert (long.embedding.weight.grad[11:16] == 0).all() and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("pos", ["learned", "index", "rotary"])
@pytest.mark.parametrize("change", [{}, {"mask": "row"}, {"condition": "encoder"}, {"model": "masked"}], ids=label)
@torch.no_grad()
def test_prompts_of_any_length_are_sampled_alone_as_together(change, pos):
    """With hidden pads, which the empty caption of guidance has most of; and as the naive loop samples them."""
    model = big(build(pads="hidden", pos=pos, **PICTURE | GPT2 | change)).double()
    inputs = lengths(model)
    inputs.pop("visible_codes", None)
    together = generate(model, inputs)
    for b in range(4):
        alone = generate(model, {k: x[b : b + 1] for k, x in inputs.items()}, seed=2 * b)
        assert together[2 * b : 2 * b + 2].equal(alone)
    assert "model" in change or together.equal(naive(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["causal", "row", "bidirectional"])
def test_hidden_pads_leave_half_precision_finite(mask, dtype):
    model = build(pads="hidden", mask=mask, **PICTURE)
    model.check_causal = lambda: None
    with torch.autocast("cpu", dtype):
        loss = model(lengths(model))
    sum(loss.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters()) and (model.embedding.weight.grad[11:16] == 0).all()


# --- settings and checkpoints ---


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask": "diagonal"}, "mask 'diagonal' is not known; use causal, "),
        ({"n_head": 3}, "n_embd 16 is not a multiple of n_head 3"),
        ({"n_head": 0}, "n_head 0 is not a number of at least 1"),
        ({"text_len": 2}, "text_len 2 is not a number of at least 3"),
        ({"dropout": 1.5}, "dropout 1.5 is not in"),
        ({"embed_grad": 0.0}, "embed_grad 0.0 is not in"),
        ({"norm": "batchnorm"}, "norm 'batchnorm' is not known; use one of layernorm, "),
        ({"pos": "rotary", "n_embd": 12}, "head size that is a multiple of 4, not 6"),
        ({"pos": "sequence", "n_embd": 6}, "even head size, not 3"),
        ({"n_embd": 4}, "too narrow for swiglu; use 7 or more, or --mlp gelu"),
        ({"condition": "encoder", "n_encoder": 0}, "n_encoder 0 is not a number of at least 1"),
        ({"condition": "text,coarse", "shrink": 1}, "shrink 1 is not a number of at least 2"),
        (
            {"condition": "text,coarse", "shrink": 3},
            "shrink 3 does not divide 2x3 codes; use a number that divides both",
        ),
    ],
    ids=label,
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


@pytest.mark.parametrize("condition", CASES)
def test_settings_of_parts_join_the_config(condition):
    """A prior is built again from its own config, as from config.json."""
    model = build(condition=condition, grid_h=4, grid_w=2)
    kind, cfg = prior_config(vars(model.cfg))
    assert kind is type(model) and cfg == model.cfg
    kind(cfg).load_state_dict(model.state_dict())
    for name in condition.split(","):
        assert CONDITIONS[name].Config is None or isinstance(cfg, CONDITIONS[name].Config)


def test_initialisation():
    """GPT-2's: std 0.02, over sqrt(2 n_layer) = 4 where branches join the residual stream."""
    model = build(n_embd=128, n_layer=8)
    for name, p in model.named_parameters():
        if p.dim() >= 2 and p.numel() > 4000:
            std = 0.02 / 4 if name.endswith(("f.out.weight", "f.down.weight")) else 0.02
            assert abs(float(p.detach().std()) - std) < 0.05 * std, name


@pytest.mark.parametrize("condition", CASES)
def test_positions_are_interpolated_for_another_grid(condition):
    """--init with a larger grid; a condition that the other prior did not have keeps its initialisation."""
    small, large = build(**PICTURE), build(condition=condition, grid_h=8, grid_w=4)
    fitted = resize_grid(small.state_dict(), large)
    assert fitted["grid.column"].equal(small.grid.column) and fitted["grid.row"].shape == (8, 1, 16)
    rows = small.grid.row.detach()
    expected = F.interpolate(rows[:, 0].t()[None], 8, mode="linear")[0].t()
    assert torch.allclose(fitted["grid.row"][:, 0], expected, atol=EPS) and expected[0].equal(rows[0, 0])
    if not large.memory_length and not large.token_ids:
        large.load_state_dict(fitted)
    own = {k: v for k, v in large.state_dict().items() if k.startswith("conditions.") and ".text." not in k}
    assert all(fitted[k].equal(v) for k, v in own.items())


def test_a_deeper_condition_is_no_start_from_a_shallower_one():
    shallow, deep = (build(condition="encoder", n_encoder=n) for n in (1, 2))
    with pytest.raises(RuntimeError, match="Missing key.*blocks.1"):
        deep.load_state_dict(resize_grid(shallow.state_dict(), deep))
    deep.load_state_dict(
        resize_grid(build(condition="text").state_dict(), deep), strict=False
    )  # a new condition may be
