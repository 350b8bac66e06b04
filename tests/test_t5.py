"""The frozen text encoder: against a loop over positions, in half precision, cached, and in a prior from end to end.

The loop below is the independent reference; beside it, transformers' T5EncoderModel with random weights differed by
5e-7 at most when this was written.
"""

import io
import json
import math
import shutil

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from test_train import PRIOR_FLAGS, call, losses, pictures, vq  # noqa: F401 (fixtures)

import sample
import train_prior
from minit2i.export import export
from minit2i.gpt import GPT, GPTConfig
from minit2i.sample import Painter, SampleConfig
from minit2i.t5 import T5Text, load_t5
from minit2i.train import Processes

CONFIG = dict(
    model_type="t5",
    vocab_size=96,
    d_model=12,
    d_kv=5,
    d_ff=14,
    num_layers=2,
    num_heads=3,
    feed_forward_proj="gated-gelu",
)
CONFIG |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=10, layer_norm_epsilon=1e-6)
CAPTIONS = ["a red circle", "two blue squares", "", "a red circle above a small blue square on a white background"]


def weights():
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=g) * 0.4

    w = {"shared.weight": draw(96, 12), "encoder.final_layer_norm.weight": draw(12)}
    w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = draw(8, 3)
    for i in range(2):
        at = f"encoder.block.{i}.layer"
        w |= {f"{at}.0.SelfAttention.{k}.weight": draw(15, 12) for k in "qkv"}
        w |= {f"{at}.0.SelfAttention.o.weight": draw(12, 15), f"{at}.1.DenseReluDense.wo.weight": draw(12, 14)}
        w |= {f"{at}.1.DenseReluDense.wi_{k}.weight": draw(14, 12) for k in "01"}
        w |= {f"{at}.{k}.layer_norm.weight": draw(12) for k in "01"}
    return w


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random encoder in two shards with its index, as the Hugging Face layout has them; the decoder is to be ignored."""
    out, w, model = tmp_path_factory.mktemp("t5"), weights(), io.BytesIO()
    (out / "config.json").write_text(json.dumps(CONFIG))
    names = sorted(w)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = {name: shard for shard, part in shards.items() for name in part}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for shard, part in shards.items():
        more = {"decoder.final_layer_norm.weight": torch.ones(12)}
        save_file({k: w[k] for k in part} | more, out / shard, metadata={"format": "pt"})
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS[:2] * 9 + CAPTIONS[3:] * 9),
        model_writer=model,
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (out / "spiece.model").write_bytes(model.getvalue())
    return out


def by_hand(w, ids):
    """One caption (T,), without pads, position by position."""

    def norm(x, gain):
        return x / (x.square().mean() + 1e-6).sqrt() * gain

    def bucket(distance):  # 8 buckets, far 10: 0 1 2 3 for what is before, 4 ... 7 for what comes
        d = abs(distance)
        b = d if d < 2 else min(3, 2 + int(math.log(d / 2) / math.log(10 / 2) * 2))
        return b + (4 if distance > 0 else 0)

    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    x = [w["shared.weight"][i] for i in ids]
    for i in range(2):
        at = f"encoder.block.{i}.layer"
        h = [norm(v, w[f"{at}.0.layer_norm.weight"]) for v in x]
        q, k, v = ([w[f"{at}.0.SelfAttention.{n}.weight"] @ y for y in h] for n in "qkv")
        for a in range(len(x)):
            heads = []
            for j in range(3):
                part = slice(5 * j, 5 * j + 5)
                score = [q[a][part] @ k[b][part] + table[bucket(b - a), j] for b in range(len(x))]
                share = torch.stack(score).softmax(0)
                heads.append(sum(share[b] * v[b][part] for b in range(len(x))))
            x[a] = x[a] + w[f"{at}.0.SelfAttention.o.weight"] @ torch.cat(heads)
        for a in range(len(x)):
            y = norm(x[a], w[f"{at}.1.layer_norm.weight"])
            wi, gate = (w[f"{at}.1.DenseReluDense.wi_{n}.weight"] @ y for n in "10")
            gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
            x[a] = x[a] + w[f"{at}.1.DenseReluDense.wo.weight"] @ (gate * wi)
    return torch.stack([norm(v, w["encoder.final_layer_norm.weight"]) for v in x])


def test_states_equal_a_loop_and_pads_change_nothing(folder):
    model, g = load_t5(folder), torch.Generator().manual_seed(1)
    ids, seen = torch.randint(2, 96, (2, 17), generator=g), torch.ones(2, 17, dtype=torch.bool)
    seen[1, 9:] = False
    states = model(ids, seen)
    assert torch.allclose(states[0], by_hand(weights(), ids[0].tolist()), atol=1e-5)
    assert torch.allclose(states[1, :9], by_hand(weights(), ids[1, :9].tolist()), atol=1e-5)


def test_half_precision_survives_what_overflows_in_float16(folder):
    """T5's feed-forward layers reach past 65504; only weights and the inputs of products are halved."""
    model, half = load_t5(folder), load_t5(folder, torch.float16)
    ids, seen = torch.arange(2, 12)[None], torch.ones(1, 10, dtype=torch.bool)
    assert (half(ids, seen) - model(ids, seen)).abs().max() < 0.02
    for m in (model, half):
        for block in m.blocks:
            block.wo.weight.mul_(3000), block.wi_0.weight.mul_(30), block.wi_1.weight.mul_(30)
    x = model.embedding(ids).float()
    assert model.blocks[0](x, torch.zeros(1, 3, 10, 10)).abs().max() > 65504
    assert half(ids, seen).isfinite().all() and (half(ids, seen) - model(ids, seen)).abs().max() < 0.05


def test_captions_are_read_once_and_cut_and_padded(folder, tmp_path, monkeypatch):
    text = T5Text(folder, 7)
    states = text.states(CAPTIONS)
    assert states.shape == (4, 7, 12) and text.n_cut == sum(len(p) > 6 for p in text.sp.encode(CAPTIONS)) > 0
    ids = text.sp.encode(CAPTIONS[0])[:6] + [1]
    assert torch.allclose(
        states[0, : len(ids)], text.model(torch.tensor([ids]), torch.ones(1, len(ids)) > 0)[0], atol=1e-5
    )
    assert states[2].any(1).tolist() == [True] + [False] * 6  # the empty caption: its end mark, then pads
    text.remember(CAPTIONS, tmp_path, Processes("cpu"))
    again = T5Text(folder, 7)
    monkeypatch.setattr(again, "states", None)  # not asked for what is known
    again.remember(CAPTIONS, tmp_path, Processes("cpu"))
    for caption, expected in zip(CAPTIONS, states):
        assert torch.allclose(again.encode(caption), expected, atol=2e-3)
    assert again.n_cut == text.n_cut - again.n_cut > 0  # counted at each look: twice by `text`


def test_what_is_no_t5_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"feed_forward_proj": "relu"}))
    with pytest.raises(ValueError, match="gated-gelu"):
        load_t5(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "d_ff"}))
    with pytest.raises(ValueError, match="lacks d_ff"):
        load_t5(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match="whole or in shards"):
        load_t5(tmp_path)
    save_file({"shared.weight": torch.zeros(96, 12)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit its config.json"):
        load_t5(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "spiece.model").write_bytes((folder / "spiece.model").read_bytes()[:99])
    with pytest.raises(ValueError, match="no SentencePiece model"):
        T5Text(copy, 7)
    (copy / "spiece.model").unlink()
    with pytest.raises(OSError, match="spiece.model"):
        T5Text(copy, 7)


def test_a_prior_sees_projected_states_and_a_pad_of_its_own_for_each_position():
    cfg = GPTConfig(n_layer=1, n_head=2, n_embd=16, text_len=5, n_codes=7, grid_h=2, grid_w=2, n_states=12)
    model, states = GPT(cfg), torch.randn(2, 5, 12)
    states[1, 2:] = 0
    x = model.embed(states)
    assert torch.allclose(x[0], states[0] @ model.text_in.weight.t(), atol=1e-6)
    assert x[1, 2:].equal(model.embedding.weight[2:5])
    text_loss, image_loss = model(states, torch.zeros(2, 4, dtype=torch.long))
    assert text_loss == 0 and image_loss > 0 and model.n_text_targets(states) == 0
    (text_loss + image_loss).backward()
    assert all(p.grad is not None for p in model.parameters())  # DistributedDataParallel waits for each


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_prior_on_t5_from_end_to_end(objective, folder, pictures, vq, tmp_path):  # noqa: F811
    start = ["--objective", objective, "--mask", "auto"]
    flags = [
        "--data",
        pictures,
        "--vq",
        vq,
        "--cache",
        tmp_path / "cache",
        "--text_encoder",
        folder,
        *PRIOR_FLAGS,
        *start,
    ]
    call(train_prior, *flags, "--out", tmp_path / "a", "--steps", 4)
    call(train_prior, *flags, "--out", tmp_path / "b", "--steps", 2, "--eval_every", 9)
    assert not (tmp_path / "a" / "text.model").exists() and len(losses(tmp_path / "a")) == 4
    call(sample, "--model", tmp_path / "a", "--prompt", "a red circle", "--n", 2, "--out", tmp_path / "a.png")
    painter = Painter(tmp_path / "a")
    red, blue = (painter.prior.logits(painter.ids([p]), torch.zeros(1, 16, dtype=torch.long))[1] for p in CAPTIONS[:2])
    assert not red.equal(blue)
    assert painter.codes(CAPTIONS[:2], SampleConfig(n=2)).shape == (4, 4, 4)
    export(tmp_path / "a", tmp_path / "small")
    with pytest.raises(ValueError, match="is not in t5"):  # the folder's name is left, to be mended in config.json
        Painter(tmp_path / "small")
    with pytest.raises(ValueError, match="cannot change what reads the captions"):
        config = json.loads((tmp_path / "b" / "config.json").read_text())
        config["text_encoder"]["hash"] = "0"
        (tmp_path / "b" / "config.json").write_text(json.dumps(config))
        call(train_prior, "--out", tmp_path / "b", "--resume")
    with pytest.raises(ValueError, match="text encoder 0, which is not in"):
        Painter(tmp_path / "b")
    with pytest.raises(ValueError, match="name its folder with --text_encoder"):
        call(train_prior, "--out", tmp_path / "b", "--resume", "--text_encoder", "")
    with pytest.raises(ValueError, match="cannot change what reads the captions of .*b "):
        call(train_prior, *flags, "--out", tmp_path / "c", "--init", tmp_path / "b")
