"""What GPUs and Apple's device need, as far as a CPU can tell."""

import tracemalloc
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from conftest import VQ_FLAGS
from priors import CASES, batch, build
from processes import call
from safetensors.torch import load_file
from test_gpt import generate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_vq
from minit2i import collectives, parallel, train
from minit2i.checkpoint import save_tensors
from minit2i.data import spare_cores
from minit2i.gpt import MODELS
from minit2i.plot import read_log
from minit2i.train import Processes
from minit2i.vq import VQ, build_vq, exact_products

GPU = torch.device("cuda", 0)
SMALL_VQ = dict(stride=4, ch=8, n_res=1, n_codes=64, code_dim=4)


class NoFloat64(TorchDispatchMode):
    """Context in which no operation may give float64, which Apple's device does not have."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        if any(torch.is_tensor(x) and x.dtype == torch.float64 for x in tree_leaves(out)):
            raise TypeError(f"{f} gives float64")
        return out


def test_no_float64_is_noticed():
    with NoFloat64(), pytest.raises(TypeError, match="gives float64"):
        torch.ones(2).double()


@pytest.mark.parametrize("how", [{"condition": c} for c in CASES] + [{"model": m} for m in MODELS], ids=str)
def test_priors_train_and_sample_without_float64(how):
    model = build(**how, grid_h=4, grid_w=4)
    inputs = batch(model)
    with NoFloat64():
        inputs = model.corrupt(inputs, range(3))
        sum(model(inputs, train=True).values()).backward()
        if getattr(model.cfg, "n_codes", 0) and how.get("model", "gpt") in ("gpt", "masked"):
            generate(model, {k: v for k, v in batch(model).items() if k != "codes"})


@pytest.mark.parametrize(
    "how",
    [{"backbone": b} for b in ("vqvae", "dvae", "vqgan", "movq")] + [{"quantizer": q} for q in ("st", "gumbel")],
    ids=str,
)
def test_tokenizers_train_without_float64(how):
    vq, images = build_vq(SMALL_VQ | how), torch.rand(2, 3, 16, 16) * 2 - 1
    with NoFloat64():
        maps, z, codes, loss = vq(images, train=True)
        (maps.float().square().mean() + loss).backward()
        vq.quantizer.start(z.detach())
        vq.quantizer.update(z.detach(), codes, 0)
        vq.decode(vq.encode(images))


@pytest.mark.parametrize("backbone", ["vqgan", "movq"])
def test_attention_of_tokenizers_has_contiguous_heads(backbone, monkeypatch):
    """Otherwise no fused kernel takes them."""
    strides, attention = set(), F.scaled_dot_product_attention

    def look(q, k, v, **how):
        strides.update(x.stride(-1) for x in (q, k, v))
        return attention(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    build_vq(SMALL_VQ | {"backbone": backbone})(torch.zeros(1, 3, 16, 16))
    assert strides == {1}


def test_a_gpu_trains_with_tf32_but_chooses_codes_exactly(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    try:
        train.set_up(GPU)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark
        with exact_products(GPU):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("backbone", ["vqvae", "dvae", "vqgan", "movq", "vit"])
def test_tokenizers_work_with_channels_last(backbone):
    vq, images = build_vq(SMALL_VQ | {"backbone": backbone, "ch": 16}), torch.rand(2, 3, 16, 16) * 2 - 1
    expected = vq(images)
    expected[0].float().square().mean().backward()
    gradients = [w.grad.clone() for w in vq.parameters() if w.grad is not None]
    vq.zero_grad(set_to_none=True)
    vq.to(memory_format=torch.channels_last)
    vq.image_format = lambda device: torch.channels_last
    found = vq(images)
    found[0].float().square().mean().backward()
    assert found[2].equal(expected[2]) and torch.allclose(found[0], expected[0], atol=1e-5)
    for a, b in zip([w.grad for w in vq.parameters() if w.grad is not None], gradients):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)


def test_a_gpu_trains_tokenizers_with_channels_last(images, tmp_path, monkeypatch):
    """Here a CPU does, with a discriminator, and resumes: moments lie in memory as their weights do."""
    vqvae, vqgan, dvae = (build_vq(SMALL_VQ | {"backbone": name, "ch": 16}) for name in ("vqvae", "vqgan", "dvae"))
    cpu, last = torch.device("cpu"), torch.channels_last
    assert vqvae.image_format(GPU) == dvae.image_format(cpu) == last
    assert last not in (
        vqvae.image_format(cpu),
        vqgan.image_format(GPU),
        vqgan.image_format(cpu),
        dvae.image_format(GPU),
    )
    flags = f"{VQ_FLAGS} --data {images} --discriminator patch --gan_layers 1 --gan_ch 8 --gan_start 1 --eval_every 2"
    call(train_vq, f"{flags} --steps 4 --out {tmp_path / 'plain'}")
    monkeypatch.setattr(VQ, "image_format", lambda self, device: torch.channels_last)
    states, step = [], train_vq.optimizer_step

    def look(module, optimizer, *more):
        states.extend((w, s) for w, s in optimizer.state.items() if w.dim() == 4)
        return step(module, optimizer, *more)

    call(train_vq, f"{flags} --steps 4 --out {tmp_path / 'x'}")
    monkeypatch.setattr(train_vq, "optimizer_step", look)
    call(train_vq, f"{flags} --steps 6 --out {tmp_path / 'x'} --resume")
    assert states and all(s["exp_avg"].stride() == w.stride() == s["exp_avg_sq"].stride() for w, s in states)
    one, two = ([r["loss"] for r in read_log(tmp_path / name / "log.jsonl") if "loss" in r] for name in ("plain", "x"))
    assert len(two) == 6 and torch.allclose(torch.tensor(one), torch.tensor(two[:4]), rtol=1e-3)


@pytest.mark.slow
def test_a_tokenizer_compiles_to_one_graph():
    """Choosing codes is a node of it: Dynamo cannot trace the precision of its product."""
    vq, images, nodes = build_vq(SMALL_VQ | dict(quantizer="ema")), torch.rand(2, 3, 16, 16), []
    torch._dynamo.reset()
    compiled = torch.compile(
        vq, fullgraph=True, backend=lambda graph, inputs: nodes.extend(n.target for n in graph.graph.nodes) or graph
    )
    assert compiled(images)[2].equal(vq(images)[2]) and any("minit2i.nearest_code" in str(node) for node in nodes)


def test_a_job_that_hangs_gives_its_gpus_back_but_may_wait_for_one_process(monkeypatch):
    joined, groups = [], []
    monkeypatch.setattr(collectives.dist, "init_process_group", lambda backend, **how: joined.append((backend, how)))
    monkeypatch.setattr(collectives.dist, "get_backend", lambda world: "nccl")
    monkeypatch.setattr(collectives.dist, "new_group", lambda **how: groups.append(how) or "group")
    collectives.connect(GPU), collectives.connect(torch.device("cpu"))
    (nccl, how), (gloo, patient) = joined
    assert (nccl, how["device_id"], gloo) == ("nccl", GPU, "gloo")
    assert timedelta(minutes=1) <= how["timeout"] <= timedelta(minutes=30) < patient["timeout"]
    assert collectives.patient("a world") == collectives.patient("a world") == "group"
    assert groups == [{"backend": "gloo", "timeout": patient["timeout"]}]


def test_a_sharded_model_without_room_is_not_sampled(monkeypatch, capsys):
    model = build()
    monkeypatch.setattr(parallel, "is_sharded", lambda tensors: True)
    procs = Processes("cpu", "fp32")
    assert parallel.unsharded(model, procs).state_dict().keys() == model.state_dict().keys()
    monkeypatch.setattr(parallel, "free_memory", lambda device: 1000)
    assert parallel.unsharded(model, procs) is None
    assert "no samples: the GPU has no room" in capsys.readouterr().out


def test_saving_holds_no_second_copy(tmp_path):
    """Any type, shape and layout; tensor by tensor."""
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    tensors = {str(kind): torch.arange(5).to(kind) for kind in kinds}
    tensors |= {"bool": torch.tensor([True, False, True]), "step": torch.tensor(3.0), "none": torch.zeros(0, 4)}
    tensors |= {"turned": torch.arange(6.0).view(2, 3).t(), "large": torch.rand(2**20)}
    tracemalloc.start()
    save_tensors(tmp_path / "x.safetensors", tensors, step=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and all(
        found[k].equal(v) and found[k].dtype == v.dtype for k, v in tensors.items()
    )
    assert peak < 2**20 * 4 / 4


def test_workers_take_the_cores_that_training_leaves(monkeypatch):
    for cores, processes, workers in ((1, 1, 0), (2, 1, 1), (16, 1, 8), (16, 8, 1), (4, 8, 0)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert spare_cores() == workers
