"""train_prior.py: losses over micro-batches, what is hidden, evaluation, and two steps of each kind of prior."""

import json
import math
import pickle
import re
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import COMMON_FLAGS
from priors import batch, big, build
from processes import call
from safetensors.torch import load_file
from test_muse import folder as t5_folder  # noqa: F401 (fixture)
from untrained import make_vq

import train_prior
from minit2i.checkpoint import read_config
from minit2i.config import pick
from minit2i.data import DataConfig
from minit2i.gpt import CONDITIONS, MODELS, GPTConfig
from minit2i.papers.muse import PriorText
from minit2i.sample import Pipeline
from minit2i.train import Processes, n_params, read_log
from train_prior import PriorTrainConfig, corrupt, evaluate, gradients, loss_weights, settle, to_device

PROCS = Processes("cpu", "fp32")
SCALER = torch.amp.GradScaler("cpu", enabled=False)


def config(**settings):
    return PriorTrainConfig("", batch_size=8, **settings)


def split(inputs, n):
    """A batch in n micro-batches."""
    return [dict(zip(inputs, parts)) for parts in zip(*(x.chunk(n) for x in inputs.values()))]


@pytest.mark.parametrize("loss_mean", ["kinds", "tokens"])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "towers"])  # they compare a whole batch
def test_accumulated_gradients_equal_one_batchs(model, loss_mean):
    """Micro-batches have unequal numbers of targets: means are over the whole batch."""
    model = big(build(model=model, pos="learned")).double()
    inputs = model.corrupt(batch(model, 8), range(8))
    inputs["text"][:4, 2:] = model.cfg.n_vocab + torch.arange(2, 5)  # many pads in the first micro-batch
    found = []
    for accum in (1, 2, 4):
        model.zero_grad()
        cfg = config(accum=accum, loss_mean=loss_mean)
        means = gradients(model, model, split(inputs, accum), cfg, PROCS, SCALER)
        found.append((means, {k: w.grad.clone() for k, w in model.named_parameters()}))
    (means, grads), *others = found
    for other_means, other_grads in others:  # losses are summed in float32
        for k, v in means.items():
            assert math.isclose(float(v), float(other_means[k]), rel_tol=1e-5)
        for k, g in grads.items():
            assert torch.allclose(g, other_grads[k], rtol=1e-4, atol=1e-5 * float(g.abs().max())), k
    loss, n = model(inputs, train=True), model.n_targets(inputs)
    if len(loss) == 1:
        expected = next(iter(loss.values())) / next(iter(n.values()))
    elif loss_mean == "tokens":
        expected = sum(loss.values()) / sum(n.values())
    else:
        expected = loss["text"] / n["text"] / 8 + loss["image"] / n["image"] * 7 / 8
    assert math.isclose(float(means["loss"]), expected.item(), rel_tol=1e-5)
    assert {k: round(float(v), 4) for k, v in means.items() if k != "loss"} == {
        f"{k}_loss": round(v.item() / int(n[k]), 4) for k, v in loss.items()
    }


def test_loss_weights():
    totals = {"text": torch.tensor(10.0), "image": torch.tensor(30.0)}
    assert loss_weights(totals, config(text_weight=0.25)) == {"text": 0.25, "image": 0.75}
    assert loss_weights(totals, config(loss_mean="tokens")) == {"text": 0.25, "image": 0.75}
    for mean in ("kinds", "tokens"):
        assert loss_weights({"image": torch.tensor(7.0)}, config(loss_mean=mean, text_weight=0.9)) == {"image": 1}


@pytest.mark.parametrize("model", ["masked", "towers"])
def test_hidden_parts_depend_on_the_samples_place_in_the_run(model):
    """Neither on the number of processes nor on that of micro-batches."""
    model = build(model=model, text_len=8)
    inputs = batch(model, 8)

    def hidden(world, accum, step=3):
        parts = []
        for rank, part in enumerate(split(inputs, world)):
            procs = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
            parts += corrupt(model, split(part, accum), step, config(accum=accum), procs)
        return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}

    once = hidden(1, 1)
    (key,) = set(once) - set(inputs)
    for world, accum in ((2, 1), (1, 4), (2, 2), (4, 2)):
        assert hidden(world, accum)[key].equal(once[key]), (world, accum)
    assert not hidden(1, 1, step=4)[key].equal(once[key])


@pytest.mark.parametrize("model", MODELS)
def test_evaluation_is_a_mean_over_samples(model):
    """However they are batched; towers compare batches of a fixed size."""
    model = big(build(model=model, text_len=8)).double()
    inputs = batch(model, 44)
    rows = [{k: v[i] for k, v in inputs.items()} | {"n_cut": 0} for i in range(44)]
    found = [evaluate(model, rows, config(accum=accum), PROCS) for accum in (1, 2)]
    assert found[0].keys() == found[1].keys() and all(name.startswith("val_") for name in found[0])
    n = 32 if model.eval_batch else 44
    with torch.no_grad():
        whole = model.evaluate(model.corrupt({k: v[:n] for k, v in inputs.items()}, range(n)))
    for name, (total, count) in whole.items():
        for values in found:
            assert math.isclose(values[f"val_{name}"], float(total) / int(count), rel_tol=1e-4)


def test_to_device_moves_tensors_alone():
    assert to_device({"text": torch.zeros(2), "n_cut": 3}, torch.device("meta"))["n_cut"] == 3
    assert to_device({"text": torch.zeros(2)}, torch.device("meta"))["text"].is_meta


def test_dependent_settings_are_filled_in():
    data = DataConfig(data="images", image_size="32")
    kind, cfg, data_cfg, _ = settle(GPTConfig(model="masked"), data, config())
    assert kind is MODELS["masked"] and cfg.mask == "bidirectional" and data_cfg == data
    kind, cfg, *_ = settle(GPTConfig(model="language_model"), DataConfig(data="book.txt", image_size=""), config())
    assert kind is MODELS["language_model"] and cfg.pos == "sequence" and cfg.n_image == 0
    with pytest.raises(ValueError, match="nowhere is not a checkpoint folder"):  # whose image size is the default
        settle(GPTConfig(), DataConfig(data="images", image_size=""), config(vq="nowhere"))
    assert settle(pick(GPTConfig, asdict(cfg) | {"model": "gpt"}), data, config())[0] is MODELS["gpt"]


def test_a_finetuned_prior_keeps_its_image_size(tmp_path):
    for name, size in (("vq", "32"), ("prior", "64x32")):
        (tmp_path / name).mkdir()
        config_json = {"kind": name, "model": {}, "train": {}, "data": {"image_size": size}}
        (tmp_path / name / "config.json").write_text(json.dumps(config_json))
    data, folders = DataConfig(data="images", image_size=""), {name: str(tmp_path / name) for name in ("vq", "prior")}
    assert settle(GPTConfig(), data, config(vq=folders["vq"]))[2].image_size == "32"
    assert settle(GPTConfig(), data, config(vq=folders["vq"], init=folders["prior"]))[2].image_size == "64x32"


# --- two steps of each kind of prior ---

FLAGS = f"{COMMON_FLAGS} --n_layer 1 --n_head 2 --n_embd 16 --text_len 16 --vocab_size 320"


@pytest.fixture(scope="module")
def trained(images, vq_run, tmp_path_factory):
    """A function: name, flags -> the folder of a prior trained for two steps; all share a cache."""
    base = tmp_path_factory.mktemp("priors")

    def train(name, flags, steps=2):
        out = base / name
        if not out.exists() or "--resume" in flags:
            data = f"--data {images} --vq {vq_run} --cache {base / 'cache'}" if "--data" not in flags else ""
            shape = FLAGS.replace(" --vocab_size 320", "") if "--t5" in flags else FLAGS
            call(train_prior, f"{data} --out {out} --steps {steps} --eval_every 1 {shape} {flags}")
        return out

    return train


KINDS = {
    "gpt": "",
    "masked": "--model masked",
    "captioner": "--model captioner",
    "towers": "--model towers --n_encoder 1",
    "encoder": "--condition encoder --n_encoder 1",
    "coarse": "--condition text,coarse",
    "spatial": "--condition text,spatial",
    "cogview": "--model cogview",
    "cogview-coarse": "--model cogview --condition separated,separated_coarse",
    "cogview-captioner": "--model cogview_captioner",
    "llama": "--model llama",
    "t5": "--condition t5 --t5 T5",
    "masked-t5": "--model masked --condition t5,coarse --t5 T5",
    "masked-read": "--model masked --condition t5 --t5 PARTI",
    "cascade": "--model masked --condition encoder,coarse_codes --n_encoder 1 --coarse_vq COARSE",
}


def test_a_new_kind_of_prior_needs_a_run():
    flags = " ".join(KINDS.values()).replace(",", " ").split()
    assert {*MODELS} <= {"gpt", "language_model", *flags} and {*CONDITIONS} <= {*flags}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_prior_trains_and_resumes(name, trained, t5_folder, tmp_path):  # noqa: F811
    """A run that stopped after a step ends like one that did not: losses, weights, samples."""
    flags = KINDS[name].replace("T5", str(t5_folder)).replace("COARSE", str(make_vq(tmp_path / "vq", stride=16)))
    flags = flags.replace("PARTI", str(trained("encoder", KINDS["encoder"])))
    whole, part = trained(name, flags), trained(f"{name}-part", flags, steps=1)
    trained(f"{name}-part", "--resume")
    losses = [
        [{k: v for k, v in r.items() if k.endswith("loss")} for r in read_log(f / "log.jsonl")] for f in (whole, part)
    ]
    assert losses[0] == losses[1] and sum("image_loss" in r for r in losses[0]) == 2
    assert same(load_file(whole / "model.safetensors"), load_file(part / "model.safetensors"))
    assert (whole / "samples-000002.png").exists() == (name != "towers")
    pipe = Pipeline(whole)  # everything that sampling needs is there
    assert type(pipe.model) is MODELS[pipe.model.cfg.model] and pipe.grid == (4, 4)
    assert pipe.encode_prompts(["a red circle", ""]).shape[:2] == (2, 16)


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_towers_start_a_prior_and_a_small_prior_a_large_one(trained):
    """--init; --lr 0 keeps what was loaded."""
    towers, prior = trained("towers", KINDS["towers"]), trained("gpt", "")
    still = "--lr 0 --weight_decay 0 --ema 0"
    parti = trained("parti", f"--condition encoder --n_encoder 1 --model gpt --init {towers} {still}", steps=1)
    before, after = (load_file(folder / "model.safetensors") for folder in (towers, parti))
    encoder = [k for k in before if k.startswith("encoder.")]
    assert encoder and all(after[f"conditions.encoder.{k}"].equal(before[k]) for k in encoder)
    n = read_config(parti)["model"]["n_vocab"]
    assert after["embedding.weight"][:n].equal(before["embedding.weight"][:n])
    assert (parti / "text.model").read_bytes() == (towers / "text.model").read_bytes()
    large = trained("large", f"--init {prior} --condition text,coarse --image_size 64 {still}", steps=1)
    assert Pipeline(large).grid == (8, 8)
    before, after = (load_file(folder / "model.safetensors") for folder in (prior, large))
    assert after["blocks.0.attn.f.qkv.weight"].equal(before["blocks.0.attn.f.qkv.weight"])
    assert after["grid.row"].shape == (8, 1, 16) and not after["grid.row"][0].equal(before["grid.row"][0] * 0)
    with pytest.raises(ValueError, match="use --condition encoder, --n_encoder as they have it"):
        trained("no-encoder", f"--init {towers} --model gpt")


def test_init_with_another_tokenizer_is_refused(trained, images, vq_run, tmp_path):
    prior, other = trained("gpt", ""), make_vq(tmp_path / "other", seed=9)
    with pytest.raises(ValueError, match=f"learned the codes of another tokenizer than {other}; use --vq {prior}/vq"):
        call(train_prior, f"--data {images} --vq {other} --out {tmp_path / 'x'} --init {prior} {FLAGS}")
    with pytest.raises(ValueError, match="holds a run of the other stage"):
        call(train_prior, f"--data {images} --vq {vq_run} --out {tmp_path / 'x'} --init {vq_run} {FLAGS}")


def test_a_language_model_starts_a_prior(trained, tmp_path):
    """It learns from a text file, resumes, and leaves a folder for --llama, whose words the prior has."""
    words = "the cat sat on the mat and the dog sat on the log".split()
    text = "\n\n".join(" ".join(words[i * k % 13] for k in range(1, 12)) for i in range(1, 60))
    (tmp_path / "book.txt").write_text(text)
    flags = f"--model language_model --data {tmp_path / 'book.txt'} --lr 0.01 --eval_every 10"
    language = trained("language", flags, steps=20)
    log = read_log(language / "log.jsonl")
    losses = [r["val_text_loss"] for r in log if "val_text_loss" in r]
    assert losses[-1] < losses[0] < math.log(320) and not any("image_loss" in r for r in log)
    trained("language", f"--data {tmp_path / 'book.txt'} --resume", steps=21)
    own, folder = load_file(language / "model.safetensors"), language / "lm"
    assert load_file(folder / "model.safetensors")["lm_head.weight"].equal(own["text_head.weight"])
    shape = "--n_layer 1 --n_head 2 --n_embd 16"
    assert shape in FLAGS  # equal to the folder's
    prior = trained("from-language", f"--model llama --llama {folder} --lr 0 --weight_decay 0", steps=1)
    after, n = load_file(prior / "model.safetensors"), read_config(prior)["model"]["n_vocab"]
    assert after["blocks.0.attn.f.qkv.weight"].equal(own["blocks.0.attn.f.qkv.weight"])
    assert after["embedding.weight"][:n].equal(own["embedding.weight"][:n])
    assert (prior / "text.model").read_bytes() == (language / "text.model").read_bytes()
    random = trained("shape", f"--model llama --llama {folder} --no-llama_weights", steps=0)
    assert read_config(random)["model"]["n_vocab"] == n
    assert not load_file(random / "model.safetensors")["text_head.weight"].equal(own["text_head.weight"])
    with pytest.raises(ValueError, match="starts a prior with --model llama --llama OUT/lm, not with --init"):
        trained("not-a-prior", f"--init {language} --model gpt")
    (tmp_path / "short.txt").write_text("the cat " * 9)
    for name, message in (("short.txt", "use a longer text"), ("none.txt", "a plain text file is needed")):
        with pytest.raises(ValueError, match=message):
            trained(name, f"--model language_model --data {tmp_path / name} --vocab_size 275")


@pytest.mark.parametrize("pads", ["learned", "hidden"])
def test_the_frozen_encoder_of_a_prior_reads_like_that_prior(pads, trained, tmp_path):
    """States of words as that prior's decoder gets them, zeros at pads and for the empty caption."""
    parti = trained(f"encoder-{pads}", f"{KINDS['encoder']} --pads {pads}", steps=1)
    pipe, captions = Pipeline(parti), ["a red circle", "", "two large blue squares " * 9]
    text = PriorText(parti, 16)
    states, ids = text.states(captions), pipe.encode_prompts(captions)
    own = pipe.model.conditions["encoder"].memory({"text": ids}, pipe.model.embed)
    word = ids < pipe.model.cfg.n_vocab
    assert text.width == 16 and states[[0, 2]].allclose((own * word[..., None])[[0, 2]], atol=1e-6)
    assert not states[1].any() and text.n_cut == 1
    text.remember(captions, tmp_path, PROCS)
    sent = pickle.loads(pickle.dumps(text))  # to a spawned worker
    assert sent.encode(captions[0]).allclose(states[0], atol=2e-3), "the cache is float16"
    with pytest.raises(ValueError, match="--text_len 17: the encoder in .* reads 16 tokens; use as many"):
        build(condition="t5", t5=str(parti), t5_hash="", text_len=17)
    for other in (trained("gpt", ""), trained("towers", KINDS["towers"]), pipe.config["train"]["vq"]):
        with pytest.raises(ValueError, match="is neither a T5 v1.1 nor a prior of --condition encoder"):
            build(condition="t5", t5=str(other), t5_hash="", text_len=16)


def test_a_dry_run_counts_no_words_for_a_frozen_encoder(trained, t5_folder, tmp_path, capsys):  # noqa: F811
    run, shape = trained("t5", f"--condition t5 --t5 {t5_folder}"), FLAGS.replace(" --vocab_size 320", "")
    call(train_prior, f"--vq {run}/vq --condition t5 --t5 {t5_folder} {shape} --out {tmp_path / 'x'} --dry_run")
    said = float(re.search(r"([\d.]+) M parameters", capsys.readouterr().out.splitlines()[-1])[1])
    assert abs(said - n_params(Pipeline(run).model) / 1e6) < 0.0051


def test_a_frozen_t5_that_is_gone_is_named(trained, t5_folder, tmp_path):  # noqa: F811
    """It can be put back, or named in config.json; --resume takes it from another place, but no other encoder."""
    run = shutil.copytree(trained("t5", f"--condition t5 --t5 {t5_folder}"), tmp_path / "run")
    assert not (run / "text.model").exists()
    config = read_config(run)
    config["model"]["t5_hash"] = "0" * 16
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="with the text encoder 0000000000000000, which is not in"):
        Pipeline(run)
    with pytest.raises(ValueError, match="which is not in"):
        call(train_prior, f"--out {run} --resume --steps 3")
    with pytest.raises(
        ValueError, match="--vocab_size 320: --condition t5 reads captions with a vocabulary of its own"
    ):
        call(train_prior, f"--data x --vq {run}/vq --out {tmp_path / 'x'} --condition t5 --t5 {t5_folder} {FLAGS}")
    with pytest.raises(ValueError, match="which is not in .*elsewhere"):
        call(train_prior, f"--out {run} --resume --t5 elsewhere --steps 3")


def test_a_frozen_t5_is_resumed_by_a_relative_path_or_a_new_one(trained, t5_folder, tmp_path, monkeypatch):  # noqa: F811
    """The same command line with --resume goes on, though the checkpoint names the folder absolutely."""
    run = shutil.copytree(trained("t5", f"--condition t5 --t5 {t5_folder}"), tmp_path / "run")
    shutil.copytree(t5_folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    call(train_prior, f"--out {run} --resume --t5 moved --steps 3")
    assert (read_config(run)["step"], read_config(run)["model"]["t5"]) == (3, str(tmp_path / "moved"))


def test_resuming_keeps_the_sampling_defaults_of_a_checkpoint(trained, tmp_path):
    run = shutil.copytree(trained("gpt", ""), tmp_path / "run")
    (run / "config.json").write_text(json.dumps(read_config(run) | {"sampling": {"temperature": 0.4}}))
    call(train_prior, f"--out {run} --resume --steps 3")
    assert read_config(run)["step"] == 3 and Pipeline(run).sampling.temperature == 0.4
