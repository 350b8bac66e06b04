"""Language models of the Llama family as the start of a prior: against a loop over positions, and back.

The loop below is the independent reference; beside it, transformers' LlamaForCausalLM and MistralForCausalLM with
random weights differed by 1.5e-6 at most, and LlamaForCausalLM read what save_lm wrote, when this was written.
"""

import io
import json
import math
from dataclasses import replace

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from test_train import PRIOR_FLAGS, call, losses, pictures, vq  # noqa: F401 (fixtures)

import sample
import train_prior
from minit2i.checkpoint import read_hf
from minit2i.export import export
from minit2i.gpt import GPT, GPTConfig
from minit2i.lm import Windows, in_shape, lm_config, lm_text, load_lm, save_lm
from minit2i.sample import SampleConfig, generate
from minit2i.tokens import Text
from minit2i.train import read_log

CONFIG = dict(
    model_type="llama", hidden_act="silu", vocab_size=40, hidden_size=24, intermediate_size=20, rms_norm_eps=1e-3
)
CONFIG |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_theta=50.0, rope_scaling=None)


def weights(tied):
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=g) * 0.4

    w = {"model.embed_tokens.weight": draw(40, 24), "model.norm.weight": draw(24)}
    if not tied:
        w["lm_head.weight"] = draw(40, 24)
    for i in range(2):
        at = f"model.layers.{i}"
        w |= {f"{at}.self_attn.{n}_proj.weight": draw(r, 24) for n, r in (("q", 24), ("k", 12), ("v", 12), ("o", 24))}
        w |= {f"{at}.mlp.gate_proj.weight": draw(20, 24), f"{at}.mlp.up_proj.weight": draw(20, 24)}
        w |= {f"{at}.mlp.down_proj.weight": draw(24, 20)}
        w |= {f"{at}.{n}.weight": draw(24) for n in ("input_layernorm", "post_attention_layernorm")}
    return w


def write(folder, tied=False):
    w = weights(tied)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    index = {name: f"model-{k % 3}.safetensors" for k, name in enumerate(w)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for shard in set(index.values()):
        save_file({k: w[k] for k in w if index[k] == shard}, folder / shard, metadata={"format": "pt"})
    (folder / "tokenizer.model").write_bytes(Text.train(["a red circle above a blue square"] * 9, 280))
    return w


def by_hand(w, ids):
    """One text (T,) position by position -> logits (T, 40)."""

    def norm(x, gain):
        return x / (x.square().mean() + 1e-3).sqrt() * gain

    def turn(x, n):  # a head (6,) at position n
        y = x.clone()
        for i in range(3):
            angle = n * 50.0 ** (-2 * i / 6)
            y[i] = x[i] * math.cos(angle) - x[i + 3] * math.sin(angle)
            y[i + 3] = x[i] * math.sin(angle) + x[i + 3] * math.cos(angle)
        return y

    x = [w["model.embed_tokens.weight"][i] for i in ids]
    for i in range(2):
        at = f"model.layers.{i}"
        h = [norm(v, w[f"{at}.input_layernorm.weight"]) for v in x]
        q, k, v = ([(w[f"{at}.self_attn.{n}_proj.weight"] @ y).split(6) for y in h] for n in "qkv")
        for a in range(len(x)):
            heads = []
            for j in range(4):
                score = [turn(q[a][j], a) @ turn(k[b][j // 2], b) / 6**0.5 for b in range(a + 1)]
                share = torch.stack(score).softmax(0)
                heads.append(sum(share[b] * v[b][j // 2] for b in range(a + 1)))
            x[a] = x[a] + w[f"{at}.self_attn.o_proj.weight"] @ torch.cat(heads)
        for a in range(len(x)):
            y = norm(x[a], w[f"{at}.post_attention_layernorm.weight"])
            gate = w[f"{at}.mlp.gate_proj.weight"] @ y
            inner = gate * gate.sigmoid() * (w[f"{at}.mlp.up_proj.weight"] @ y)
            x[a] = x[a] + w[f"{at}.mlp.down_proj.weight"] @ inner
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return torch.stack([head @ norm(v, w["model.norm.weight"]) for v in x])


def prior(folder, **changes):
    cfg = GPTConfig(text_len=9, n_vocab=40, n_codes=7, grid_h=2, grid_w=2)
    model = GPT(replace(cfg, **lm_config(folder) | changes)).eval()
    load_lm(folder, model)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_text_logits_equal_a_loop(tied, tmp_path):
    w, ids = write(tmp_path, tied), torch.randint(0, 40, (2, 9))
    logits = prior(tmp_path).logits(ids, torch.zeros(2, 4, dtype=torch.long))[0]
    for b in range(2):
        assert torch.allclose(logits[b], by_hand(w, ids[b].tolist())[:-1], atol=1e-5)


def test_drawing_with_grouped_queries_equals_the_full_logits(tmp_path):
    write(tmp_path)
    model = prior(tmp_path).requires_grad_(False)
    text = torch.randint(0, 40, (2, 9))
    codes = generate(model, text, text[0], SampleConfig(n=1, cfg_scale=1.0, temperature=0.0))
    assert codes.equal(model.logits(text, codes)[1].argmax(-1))


def test_what_is_written_is_what_was_read(tmp_path):
    w, text = write(tmp_path), Text((tmp_path / "tokenizer.model").read_bytes(), 9)
    save_lm(tmp_path / "again", prior(tmp_path), text)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == w.keys() and all(again[k].equal(v) for k, v in w.items())
    assert lm_config(tmp_path / "again") == lm_config(tmp_path)
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == text.proto


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "stretches its rotary positions"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"head_dim": 8}, "heads of 8"),
        ({"intermediate_size": 21}, "mlp.\\w+_proj.weight in .* is"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "holds model.layers.1"),
    ],
    ids=str,
)
def test_what_is_no_plain_llama_is_refused(change, message, tmp_path):
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=message):
        prior(tmp_path)


def test_flags_and_words_that_do_not_fit_a_language_model_are_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="--n_layer 3 cannot be: .* has 2; leave it out"):
        in_shape(GPTConfig(n_layer=3), tmp_path)
    assert in_shape(GPTConfig(n_layer=2), tmp_path).n_embd == lm_config(tmp_path)["n_embd"]
    config = {k: v for k, v in CONFIG.items() if k not in ("hidden_size", "rms_norm_eps")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks hidden_size, rms_norm_eps"):
        lm_config(tmp_path)
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"] * 9), model_writer=proto, vocab_size=9, bos_id=-1, hard_vocab_limit=False
    )
    (tmp_path / "tokenizer.model").write_bytes(proto.getvalue())
    with pytest.raises(ValueError, match="no marks for beginning and end"):
        lm_text(tmp_path)


def test_null_in_a_config_is_the_usual(tmp_path):
    write(tmp_path)
    shape = lm_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"head_dim": None}))
    assert lm_config(tmp_path) == shape
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_key_value_heads": None}))
    assert lm_config(tmp_path)["n_kv_head"] == 4


def test_windows_of_text():
    windows, val = Windows(torch.arange(50), 8, seed=3), Windows(torch.arange(50), 8)
    assert all(w[0].equal(torch.arange(8) + w[0][0]) for w in map(windows.__getitem__, range(40)))
    assert len({int(windows[p][0][0]) for p in range(300)}) == 43  # every start
    assert windows[7][0].equal(Windows(torch.arange(50), 8, seed=3)[7][0])
    assert [int(val[p][0][0]) for p in range(len(val))] == [0, 8, 16, 24, 32, 40]


def test_a_language_model_of_our_own_starts_a_prior(pictures, vq, tmp_path):  # noqa: F811
    words = "the cat sat on the mat and the dog sat on the log".split()
    text = "\n\n".join(" ".join(words[(i * k) % 13] for k in range(1, 12)) for i in range(1, 60))
    (tmp_path / "book.txt").write_text(text)
    flags = [f for pair in zip(PRIOR_FLAGS[::2], PRIOR_FLAGS[1::2]) for f in pair if pair[0] != "--size"]
    common = [*flags, "--objective", "text", "--data", tmp_path / "book.txt", "--lr", 0.01, "--dropout", 0]
    call(train_prior, *common, "--out", tmp_path / "a", "--steps", 40, "--eval_every", 20)
    first, last = (r["val_text_loss"] for r in read_log(tmp_path / "a" / "log.jsonl") if "val_text_loss" in r)
    assert last < first < math.log(320) and all(
        r.get("image_loss", 0) == 0 for r in read_log(tmp_path / "a" / "log.jsonl")
    )
    lm, own = tmp_path / "a" / "lm", load_file(tmp_path / "a" / "model.safetensors")
    assert load_file(lm / "model.safetensors")["lm_head.weight"].equal(own["text_head.weight"])
    call(train_prior, "--out", tmp_path / "a", "--resume", "--steps", 41)
    with pytest.raises(ValueError, match="is a language model; .*lm is the part"):
        export(tmp_path / "a", tmp_path / "x")
    more = ["--data", pictures, "--vq", vq, "--cache", tmp_path / "cache", "--init_lm", lm, "--steps", 0]
    call(train_prior, *more, *PRIOR_FLAGS, "--out", tmp_path / "b")
    with pytest.raises(ValueError, match="start from it with --init_lm .*lm"):
        call(train_prior, *more[:-4], "--init", tmp_path / "a", "--objective", "causal", "--out", tmp_path / "x")
    prior, own = (load_file(tmp_path / k / "model.safetensors") for k in "ba")
    assert prior["blocks.1.attn.qkv.weight"].equal(own["blocks.1.attn.qkv.weight"])
    with pytest.raises(ValueError, match="holds no text"):
        (tmp_path / "empty.txt").write_text(" \n")
        call(train_prior, *flags, "--objective", "text", "--data", tmp_path / "empty.txt", "--out", tmp_path / "c")
    with pytest.raises(ValueError, match="use a longer text"):
        (tmp_path / "short.txt").write_text("the cat " * 9)
        call(
            train_prior,
            *flags,
            "--objective",
            "text",
            "--data",
            tmp_path / "short.txt",
            "--out",
            tmp_path / "d",
            "--vocab_size",
            275,
        )


def test_a_prior_from_a_language_model_and_one_of_its_shape(pictures, vq, tmp_path):  # noqa: F811
    """Its words start as the language model has them, and only with --no-init_lm_weights at random."""
    lm = tmp_path / "lm"
    lm.mkdir()
    write(lm)
    text = Text((lm / "tokenizer.model").read_bytes(), 16)
    (lm / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": text.n_vocab + 3}))  # filled up
    w = dict(read_hf(lm))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        w[name] = torch.randn(text.n_vocab + 3, 24)
    (lm / "model.safetensors.index.json").unlink()
    save_file(w, lm / "model.safetensors")
    shape = zip(PRIOR_FLAGS[::2], PRIOR_FLAGS[1::2])
    flags = [f for pair in shape for f in pair if pair[0] not in ("--n_layer", "--n_head", "--n_embd")]
    flags += ["--data", pictures, "--vq", vq, "--cache", tmp_path / "cache", "--init_lm", lm]
    call(train_prior, *flags, "--out", tmp_path / "a", "--steps", 0)
    call(train_prior, *flags, "--out", tmp_path / "b", "--steps", 2, "--no-init_lm_weights")
    a, b = (load_file(tmp_path / k / "model.safetensors") for k in "ab")
    assert a["embedding.weight"][: text.n_vocab].equal(w["model.embed_tokens.weight"][: text.n_vocab])
    assert a["blocks.1.mlp.down.weight"].equal(w["model.layers.1.mlp.down_proj.weight"])
    assert a.keys() == b.keys() and not a["blocks.1.mlp.down.weight"].equal(b["blocks.1.mlp.down.weight"])
    call(train_prior, "--out", tmp_path / "b", "--resume", "--steps", 3)
    assert len(losses(tmp_path / "b")) == 3
    call(sample, "--model", tmp_path / "b", "--prompt", "a red circle", "--n", 1, "--out", tmp_path / "b.png")
