"""Language models: text logits against a loop over positions, folders read and written, a small one of our own.

The loop is the independent reference; transformers' LlamaForCausalLM and MistralForCausalLM with random weights differ
from load_llama by at most 1.5e-6, and LlamaForCausalLM reads what save_llama writes (measured once).
"""

import io
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from priors import EMPTY, batch, big, build
from safetensors.torch import load_file, save_file

from minit2i.gpt import GPTConfig, prior_config
from minit2i.papers.lm import LanguageModel, Windows, llama_shape, llama_vocabulary, load_llama, load_text_file
from minit2i.papers.lm import read_paragraphs, save_llama, text_windows
from minit2i.sample import SampleConfig, Sampler
from minit2i.tokens import Text
from minit2i.train import Processes

CONFIG = dict(model_type="llama", hidden_act="silu", vocab_size=40, hidden_size=24, intermediate_size=20)
CONFIG |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
CONFIG |= dict(rms_norm_eps=1e-3, rope_theta=50.0, rope_scaling=None)


def weights(tied=False):
    """Random weights under the names of the Hugging Face layout."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g) * 0.4

    w = {"model.embed_tokens.weight": normal(40, 24), "model.norm.weight": normal(24)}
    if not tied:
        w["lm_head.weight"] = normal(40, 24)
    for i in range(2):
        at = f"model.layers.{i}"
        w |= {f"{at}.self_attn.{n}_proj.weight": normal(r, 24) for n, r in (("q", 24), ("k", 12), ("v", 12), ("o", 24))}
        w |= {f"{at}.mlp.gate_proj.weight": normal(20, 24), f"{at}.mlp.up_proj.weight": normal(20, 24)}
        w |= {f"{at}.mlp.down_proj.weight": normal(24, 20)}
        w |= {f"{at}.{n}.weight": normal(24) for n in ("input_layernorm", "post_attention_layernorm")}
    return w


@pytest.fixture(scope="module")
def words():
    """A text model's bytes, with begin and end tokens."""
    return Text.train(["a red circle above a blue square"] * 9, 280)


def write(folder, words, tied=False, **changes):
    """A language model's folder, its weights in three shards -> weights."""
    w = weights(tied)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied} | changes))
    index = {name: f"model-{k % 3}.safetensors" for k, name in enumerate(w)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for shard in set(index.values()):
        save_file({k: w[k] for k in w if index[k] == shard}, folder / shard, metadata={"format": "pt"})
    (folder / "tokenizer.model").write_bytes(words)
    return w


def config(folder, **changes):
    """A prior's config in the shape of a folder, as train_prior.py makes it; flags that are not given have their defaults."""
    settings = dict(model="llama", llama=str(folder), text_len=9, n_codes=7, grid_h=2, grid_w=2) | changes
    return prior_config(settings)


def prior(folder):
    kind, cfg = config(folder)
    model = kind(replace(cfg, n_vocab=40)).eval().requires_grad_(False)
    model.load_start()
    return model


def by_hand(w, ids):
    """One text (T,), position by position, in float64 -> logits (T, 40)."""
    w = {k: v.double() for k, v in w.items()}

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


# --- a folder as the start of a prior ---


@pytest.mark.parametrize("tied", [False, True])
def test_text_logits_equal_a_loop(tied, words, tmp_path):
    w, text = write(tmp_path, words, tied), torch.randint(0, 40, (2, 9))
    logits = prior(tmp_path).logits({"text": text, "codes": torch.zeros(2, 4, dtype=torch.long)})[0]
    expected = torch.stack([by_hand(w, row.tolist())[:-1] for row in text])
    # float32, two layers of products over at most 24 terms
    assert torch.allclose(logits.double(), expected, atol=2e-5 * float(expected.abs().max()))


def test_sampling_with_grouped_queries_equals_full_logits(words, tmp_path):
    write(tmp_path, words)
    model, text = prior(tmp_path).double(), torch.randint(0, 40, (2, 9))
    codes = model.generate({"text": text}, text[0], Sampler(SampleConfig(cfg_scale=1.0, temperature=0.0), range(2)))
    assert codes.equal(model.logits({"text": text, "codes": codes})[1].argmax(-1))


def test_a_folder_is_written_as_it_was_read(words, tmp_path):
    w, text = write(tmp_path, words), Text(words, 9)
    save_llama(tmp_path / "again", prior(tmp_path), text)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == w.keys() and all(again[k].equal(v) for k, v in w.items())
    assert llama_shape(tmp_path / "again") == llama_shape(tmp_path)
    assert llama_vocabulary(tmp_path / "again") == text.proto == words


def test_a_padded_vocabulary_is_cut(words, tmp_path):
    write(tmp_path, words)
    kind, cfg = config(tmp_path)
    model = kind(replace(cfg, n_vocab=37))
    load_llama(tmp_path, model)
    assert model.embedding.weight[:37].equal(weights()["model.embed_tokens.weight"][:37])


def test_weights_are_optional_and_pads_and_codes_are_new(words, tmp_path):
    write(tmp_path, words)
    models = []
    for load in (True, False):
        torch.manual_seed(0)
        kind, cfg = config(tmp_path, llama_weights=load)
        models.append(kind(replace(cfg, n_vocab=40)))
        models[-1].load_start()
    started, plain = (m.state_dict() for m in models)
    assert started.keys() == plain.keys() and plain["embedding.weight"].std() < 0.03
    assert started["embedding.weight"][40:].equal(plain["embedding.weight"][40:])
    assert started["image_head.weight"].equal(plain["image_head.weight"])
    assert not started["blocks.1.mlp.f.down.weight"].equal(plain["blocks.1.mlp.f.down.weight"])


def test_without_a_folder_the_shape_alone():
    model = build(model="llama")
    cfg = model.cfg
    assert (cfg.pos, cfg.norm, cfg.mlp, cfg.qk_norm) == ("sequence", "rmsnorm", "swiglu", False)
    assert type(model).vocabulary(cfg) is None and prior_config(vars(cfg))[1] == cfg
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_start()
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


# --- folders and flags that do not fit ---


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', not 'silu'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        (
            {"rope_parameters": {"rope_type": "llama3"}},
            "scales its rotary positions .llama3., which is not implemented",
        ),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"head_dim": 8}, "heads of 8"),
        ({"intermediate_size": 21}, "mlp.\\w+_proj.weight in .* is"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "holds model.layers.1"),
    ],
    ids=str,
)
def test_what_is_not_a_plain_llama_is_refused(change, message, words, tmp_path):
    write(tmp_path, words, **change)
    with pytest.raises(ValueError, match=message):
        prior(tmp_path)


def test_an_incomplete_config_is_refused(words, tmp_path):
    write(tmp_path, words)
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in CONFIG.items() if k not in ("hidden_size", "rms_norm_eps")})
    )
    with pytest.raises(ValueError, match="lacks hidden_size, rms_norm_eps"):
        llama_shape(tmp_path)


def test_null_in_a_config_is_the_usual_value(words, tmp_path):
    write(tmp_path, words)
    shape = llama_shape(tmp_path)
    write(tmp_path, words, head_dim=None)
    assert llama_shape(tmp_path) == shape
    write(tmp_path, words, num_key_value_heads=None)
    assert llama_shape(tmp_path) == shape | {"n_kv_head": 4}
    write(tmp_path, words, rope_theta=None, rope_parameters={"rope_theta": 50.0})  # where newer versions keep it
    assert llama_shape(tmp_path) == shape


def test_conflicting_flags_are_refused(words, tmp_path):
    write(tmp_path, words)
    with pytest.raises(ValueError, match="--n_layer 3 conflicts with .*, which has 2; leave it out"):
        config(tmp_path, n_layer=3)
    assert config(tmp_path, n_layer=2)[1] == config(tmp_path)[1]
    with pytest.raises(ValueError, match="leave out --condition"):
        config(tmp_path, condition="encoder")
    assert GPTConfig.n_layer not in (2, 3)  # the default is not mistaken for a given flag


def test_a_window_shorter_than_the_sequence_is_refused(words, tmp_path):
    """Mistral's sliding_window, which hides nothing in a sequence of its length or less."""
    write(tmp_path, words)
    path, n = tmp_path / "config.json", 9 + 4
    for window, refused in ((n - 1, True), (n, False), (None, False)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mistral", "sliding_window": window}))
        model = prior(tmp_path)
        if refused:
            with pytest.raises(
                ValueError, match=rf"last {n - 1} positions \(sliding_window\), .* this sequence has {n};"
            ):
                model.check(1 / 8)
        else:
            model.check(1 / 8)


def test_a_vocabulary_needs_begin_and_end_tokens(words, tmp_path):
    write(tmp_path, words)
    assert config(tmp_path)[0].vocabulary(config(tmp_path)[1]) == words
    proto, ids = io.BytesIO(), dict(bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"] * 9), model_writer=proto, vocab_size=9, **ids
    )
    (tmp_path / "tokenizer.model").write_bytes(proto.getvalue())
    with pytest.raises(ValueError, match="has no begin and end tokens, which captions need"):
        llama_vocabulary(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.model: --llama needs a SentencePiece vocabulary"):
        llama_vocabulary(tmp_path)


# --- a language model of our own ---


def test_the_language_models_loss_by_hand():
    """Each token but the first is a target; there are no codes."""
    model = build(model="language_model")
    inputs = batch(model)
    inputs["text"] = torch.randint(0, 11, (3, 5))
    log_p = model.logits(inputs)[0].detach().double().log_softmax(2)
    expected = -sum(float(log_p[b, t, inputs["text"][b, t + 1]]) for b in range(3) for t in range(4))
    assert math.isclose(model(inputs)["text"].item(), expected, rel_tol=1e-5) and set(model(inputs)) == {"text"}
    assert model.n_targets(inputs) == {"text": 12} and inputs["codes"].shape == (3, 0)
    assert model.layout.length == 5 and not hasattr(model, "image_head") and model.data is load_text_file


def test_the_language_model_is_causal():
    model, inputs = big(build(model="language_model")).double(), {"text": torch.randint(0, 11, (1, 5))}
    logits = model.logits(inputs)[0]
    for t in range(5):
        other = inputs["text"].clone()
        other[0, t] = (other[0, t] + 1) % 11
        changed = (model.logits({"text": other})[0] - logits).abs().sum(2)[0] > 1e-6
        assert changed.tolist() == [i >= t for i in range(4)]


@pytest.mark.parametrize("name, value", [("condition", "encoder"), ("mask", "row")])
def test_a_language_model_reads_text_alone(name, value):
    with pytest.raises(ValueError, match=f"leave out --{name}"):
        build(model="language_model", **{name: value})


def test_a_language_model_starts_a_prior_by_its_folder(words, tmp_path):
    """What it saves beside its checkpoint gives a prior of the same text logits."""
    text = Text(words, 9)
    kind, cfg = prior_config(dict(model="language_model", n_layer=2, n_head=2, n_embd=16, text_len=9))
    model = big(kind(replace(cfg, n_vocab=text.n_vocab))).eval().requires_grad_(False)
    save_llama(tmp_path, model, text)
    kind, cfg = config(tmp_path)
    started = kind(replace(cfg, n_vocab=text.n_vocab)).eval().requires_grad_(False)
    started.load_start()
    ids = torch.randint(0, text.n_vocab, (2, 9))
    logits = started.logits({"text": ids, "codes": torch.zeros(2, 4, dtype=torch.long)})[0]
    expected = model.logits({"text": ids})[0]
    assert torch.allclose(logits, expected, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(ValueError, match="starts a prior with --model llama --llama OUT/lm, not with --init"):
        LanguageModel.tensors_for(model.state_dict(), started)
    model.load_state_dict(LanguageModel.tensors_for(model.state_dict(), model))  # --init of another language model


def test_paragraphs_of_a_text(tmp_path):
    (tmp_path / "book.txt").write_text("\ufeffone  two\nthree\n \n\n\nfour\n", encoding="utf-8")
    assert read_paragraphs(tmp_path / "book.txt") == ["one two three", "four"]
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    for name, message in (
        ("empty.txt", "holds no text"),
        ("latin.txt", "is not UTF-8 .line 1.; save it as UTF-8"),
        ("none.txt", "none.txt cannot be read: No such file.*a plain text file is needed"),
        (".", "a plain text file is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            read_paragraphs(tmp_path / name)


def test_windows_of_a_text():
    train, val = Windows(torch.arange(50), 8, seed=3), Windows(torch.arange(50), 8)
    starts = [int(train[p]["text"][0]) for p in range(300)]
    assert all(train[p]["text"].equal(torch.arange(8) + starts[p]) for p in range(40))
    assert set(starts) == set(range(43)) and starts == [int(train[p]["text"][0]) for p in range(300)]
    assert [int(val[p]["text"][0]) for p in range(len(val))] == [0, 8, 16, 24, 32, 40]
    assert val[0]["codes"].shape == (0,) and val[0]["n_cut"] == 0


def test_a_text_is_parted_for_validation(words):
    text = Text(words, 9)
    train, val = text_windows(["a red circle"] * 40, text, 0.25, 0)
    assert abs(len(val.tokens) / (len(train.tokens) + len(val.tokens)) - 0.25) < 0.01
    begin, end = text.sp.bos_id(), text.sp.eos_id()
    assert train.tokens[0] == begin and val.tokens[-1] == end
    both = torch.cat([train.tokens, val.tokens])
    assert both.tolist() == [begin, *text.sp.encode("a red circle"), end] * 40
    with pytest.raises(ValueError, match="do not make a training and a validation window of 9; use a longer text"):
        text_windows(["a red circle"], text, 0.25, 0)


def test_a_text_file_is_loaded(tmp_path):
    """The text model is trained on the file and kept with the run; a resumed run reads its own."""
    (tmp_path / "book.txt").write_text("\n\n".join("the cat sat on the mat and the dog sat on the log".split() * 30))
    model_cfg, procs = SimpleNamespace(text_len=9, llama=""), Processes("cpu", "fp32")
    data_cfg = SimpleNamespace(data=str(tmp_path / "book.txt"), val_data="0.1")
    cfg = SimpleNamespace(out=str(tmp_path), resume=False, init="", vocab_size=280, seed=0)
    data = load_text_file(LanguageModel, model_cfg, data_cfg, cfg, procs)
    assert data.text.n_vocab <= 280 and data.vq is None and len(data.train_set) > 8 * len(data.val_set) > 0
    before = (tmp_path / "text.model").read_bytes()
    again = load_text_file(LanguageModel, model_cfg, data_cfg, SimpleNamespace(**vars(cfg) | {"resume": True}), procs)
    assert again.text.proto == before == (tmp_path / "text.model").read_bytes()
    data_cfg.val_data = "folder"
    with pytest.raises(ValueError, match="val_data folder is not a fraction of the text file; use 0.02"):
        load_text_file(LanguageModel, model_cfg, data_cfg, cfg, procs)


def test_a_language_model_shows_nothing():
    model = build(model="language_model")
    assert model.sample({}, EMPTY, None, None) is None
