"""What learning images does to language: to a language model that a prior started from, and to a text encoder.

    python -m minit2i.experiments.probes text --text book.txt --model out/book out/lm-1000 --out forgetting.json
    python -m minit2i.experiments.probes tokens --model out/lm-0 out/lm-1000
    python -m minit2i.experiments.probes encoder --text book.txt --towers out/towers --model out/parti

text: nats per token on the last 2 % of a plain text, which --model language_model does not learn: what priors that
start from a language model forget (arXiv:2311.16201).  Windows have the shortest --text_len of the models.  --out
also plots.

tokens: how image tokens lie relative to text tokens, in the embedding and, where text is predicted, in the output
layer: mean norms, and the mean of each token's largest cosine with a text token, beside the same for text tokens
among themselves and for random directions.  2311.16201 shows by training (on image tokens alone, and for a
contrastive alignment) that the two kinds mean different things; nothing is trained here.

encoder: hidden words found, in captions and in plain text, and captions that find their image among 32, on the
towers' data. Parti, arXiv:2206.10789 sec. 2.2, says that its text encoder degrades in the full training (there by
GLUE).  A prior has neither a head for words nor a mask token, so all encoders are treated alike: they stay frozen,
mask token and image tower are the towers', and a new linear head is trained for each figure.  "untrained": a randomly
initialised encoder.

Shapes: B batch, T text length, N codes of an image, D width, V vocabulary, n examples.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from minit2i.checkpoint import check_writable, file_hash, load_model, read_config, write_file
from minit2i.config import pick
from minit2i.data import DataConfig, split
from minit2i.experiments.evaluate import captioned
from minit2i.flags import count, new_parser
from minit2i.gpt import GPT, Head, Linear, build_prior
from minit2i.papers.cogview import Captioner
from minit2i.papers.lm import LanguageModel, read_paragraphs, text_windows
from minit2i.papers.parti import Towers, info_nce
from minit2i.plot import plot, save_image
from minit2i.sample import Pipeline
from minit2i.tokens import Text
from minit2i.train import pick_device, run

VAL_FRACTION = 0.02  # of a text file, as train_prior.py's --val_data


def load(folder, device):
    """Folder of a prior or a language model -> (model, config.json, its text.model); ValueError for others."""
    config, words = read_config(folder), Path(folder, "text.model")
    if config.get("kind") != "prior" or not words.exists():
        raise ValueError(
            f"{folder} is not a prior or language model of train_prior.py with words of its own; "
            "--model llama --llama FOLDER --steps 0 makes a prior of a language model from elsewhere"
        )
    model = load_model(folder, build_prior(config["model"])).to(device).requires_grad_(False)
    return model, config, words.read_bytes()


def windows(path, words, length, n=sys.maxsize):
    """A plain text -> windows to learn from, and those of its last part, up to n of each: two (n, T)."""
    parts = text_windows(read_paragraphs(path), Text(words, length), VAL_FRACTION, 0)
    return [torch.stack([part[i]["text"] for i in range(min(n, len(part)))]) for part in parts]


# --- forgetting ------------------------------------------------------------------------------------------


@torch.inference_mode()
def text_loss(model, ids, batch=32):
    """Mean loss of a text's tokens, each window's first left out: ids (n, T) -> nats per token.

    Text stands before the codes, so their values and the pads that fill its positions do not matter.
    """
    pads = (model.cfg.n_vocab + torch.arange(ids.shape[1], model.cfg.text_len, device=ids.device)).expand(len(ids), -1)
    total, n = 0.0, 0
    for text in torch.cat([ids, pads], 1).split(batch):
        sample = {"text": text, "codes": text.new_zeros(len(text), model.cfg.n_image)}
        total += float(model.loss(sample)["text"])
        n += int(model.n_targets(sample)["text"])
    return total / n


def forgetting(args, device):
    """-> {folder: model, step, nats}.  ValueError for models that predict no text, or tokens of another vocabulary."""
    models = {folder: load(folder, device) for folder in args.model}
    words, length = models[args.model[0]][2], min(model.cfg.text_len for model, *_ in models.values())
    ids, figures, curves = windows(args.text, words, length)[1].to(device), {}, {}
    last = max([config["step"] for model, config, _ in models.values() if not isinstance(model, LanguageModel)] or [1])
    for folder, (model, config, own) in models.items():
        if own != words:
            raise ValueError(
                f"{folder} has other tokens than {args.model[0]}; measure it apart, nats would not compare"
            )
        if not isinstance(model, GPT) or isinstance(model, Captioner) or not model.predicts_text or model.prefix_ahead:
            raise ValueError(f"{folder} predicts no text from the text before it; use a causal prior, caption first")
        row = figures[folder] = {"model": model.cfg.model, "step": config["step"], "nats": text_loss(model, ids)}
        lm, started = isinstance(model, LanguageModel), getattr(model.cfg, "llama", "") and model.cfg.llama_weights
        curve = curves.setdefault("language model" if lm else "started from one" if started else "from scratch", [])
        curve += [(x, row["nats"]) for x in ((0, last) if lm else (row["step"],))]
    if args.out:
        save_image(
            Path(args.out).with_suffix(".png"), plot({k: sorted(v) for k, v in curves.items()}, "nats per token")
        )
    return figures


# --- image tokens and text tokens ------------------------------------------------------------------------


def nearest(rows, text, skip=0):
    """Mean over rows (n, D) of the largest cosine with one of text (V, D); skip 1 leaves out a token's own."""
    a, b = F.normalize(rows.float(), dim=1), F.normalize(text.float(), dim=1)
    return float(torch.cat([(part @ b.T).topk(1 + skip).values[:, skip] for part in a.split(1024)]).mean())


def token_figures(args, device):
    """-> {folder, layer: norms, mean largest cosines with a text token}."""
    figures = {}
    for folder in args.model:
        model, *_ = load(folder, device)
        c, ids = model.cfg, model.embedding.weight
        if not c.n_codes:
            raise ValueError(
                f"{folder} has no image tokens; a prior of --model llama --llama {folder}/lm --steps 0 has new ones"
            )
        layers = {"embedding": (ids[: c.n_vocab], ids[c.n_vocab + c.text_len :][: c.n_codes])}
        if getattr(model, "predicts_text", False):
            layers["output"] = model.text_head.weight, model.image_head.weight
        directions = torch.randn(c.n_codes, c.n_embd, generator=torch.Generator().manual_seed(0)).to(device)
        for layer, (text, image) in layers.items():
            figures[f"{folder}, {layer}"] = {
                "text_norm": float(text.float().norm(dim=1).mean()),
                "image_norm": float(image.float().norm(dim=1).mean()),
                "image_to_text": nearest(image, text),
                "text_to_text": nearest(text, text, 1),
                "random_to_text": nearest(directions, text),
            }
    return figures


# --- text encoders ---------------------------------------------------------------------------------------


def encoder_of(model):
    """The text encoder of towers or of a prior with --condition encoder; None if there is none."""
    if isinstance(model, Towers):
        return model.encoder
    return model.conditions["encoder"].encoder if "encoder" in model.conditions else None


def with_encoder(towers, other):
    """The towers with the word embeddings and text encoder of another model, all frozen, and new heads for text."""
    torch.manual_seed(0)
    model, n, c = copy.deepcopy(towers), towers.cfg.n_vocab + towers.cfg.text_len, towers.cfg
    rows = torch.cat([other.embedding.weight[:n], towers.embedding.weight[n:]])
    model.embedding, model.encoder = torch.nn.Embedding.from_pretrained(rows), encoder_of(other)
    model.requires_grad_(False)
    model.text_head, model.text_out = Head(c, c.n_vocab).to(rows.device), Linear(c.n_embd, c.n_embd).to(rows.device)
    return model


def train_head(head, loss, n, steps, batch=64, lr=1e-2):
    """Train a head alone with Adam at a rate that falls to 0.  loss(rows, seeds): of some of n examples -> ()."""
    optimizer = torch.optim.Adam(head.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(step))[:batch]
        loss(rows, [step * batch + i for i in range(len(rows))]).backward()
        optimizer.step()


def words_found(model, train, val, steps):
    """A new text_head learns from texts (m, T) -> share of hidden words found in others (n, T), hidden 8 times each."""

    def hidden(text, seeds):  # -> logits (words, V), words
        read, words = model.corrupt({"text": text}, seeds)["hidden_words"].unbind(1)
        states = model.encode(read, text)
        return model.text_head(states[words >= 0]).float(), words[words >= 0]

    def loss(rows, seeds):
        logits, words = hidden(train[rows], seeds)
        return F.cross_entropy(logits, words, reduction="sum") / max(1, len(words))

    train_head(model.text_head, loss, len(train), steps)
    parts = zip(val.repeat(8, 1).split(64), torch.arange(8 * len(val)).split(64))
    found = (hidden(text, seeds.tolist()) for text, seeds in parts)
    return float(torch.cat([logits.argmax(1) == words for logits, words in found]).float().mean())


def images_found(model, train, val, steps, batch=32):
    """A new text_out learns from (ids, codes) -> share of other captions that find their image among `batch`."""
    ids, images = train[0], torch.cat([model.image_feature(part) for part in train[1].split(64)])

    def loss(rows, _):
        feature = model.text_feature(ids[rows], model.encode(ids[rows], ids[rows]))
        return info_nce(feature, images[rows], model.scale()) / len(rows)

    train_head(model.text_out, loss, len(ids), steps)
    n, found = len(val[0]), 0
    starts = range(0, n - n % batch or n, batch)
    with torch.no_grad():
        for first in starts:
            text, image = model.features(*(x[first : first + batch] for x in val))
            found += int(((text @ image.T).argmax(1).cpu() == torch.arange(len(text))).sum())
    return found / min(n, len(starts) * batch)


def encoder_figures(args, device):
    """-> {folder: words found in captions and in text, retrieval}; ValueError for priors of other words or sizes."""
    towers = Pipeline(args.towers, device)
    if not isinstance(towers.model, Towers):
        raise ValueError(f"{args.towers} is no pair of towers; train_prior.py --model towers makes one")
    c, few = towers.model.cfg, -(-args.n // 4)
    torch.manual_seed(1)
    encoders = {"untrained": Towers(c).to(device).eval(), args.towers: towers.model}
    for folder in args.model:
        model, _, words = load(folder, device)
        same = (model.cfg.text_len, model.cfg.n_embd, words) == (c.text_len, c.n_embd, towers.text.proto)
        if encoder_of(model) is None or not same:
            raise ValueError(f"{folder} has no text encoder that started from {args.towers} (--init {args.towers})")
        encoders[folder] = model

    def coded(source, indices):  # -> ids (n, T), codes (n, N)
        images, captions = captioned(source, indices, towers)
        codes = [towers.vq.encode(part.to(device)) for part in torch.stack(images).split(64)]
        return towers.encode_prompts(captions), torch.cat(codes).flatten(1)

    (source, train), (val_source, val) = split(pick(DataConfig, towers.config["data"]))
    learn_pairs, ask_pairs = coded(source, train[:: -(-len(train) // args.n)]), coded(val_source, val[:few])
    learn, ask = (x.to(device) for x in windows(args.text, towers.text.proto, c.text_len, args.n))
    figures = {}
    for name, other in encoders.items():
        model = with_encoder(towers.model, other)
        figures[name] = {"caption_words": words_found(model, learn_pairs[0], ask_pairs[0], args.steps)}
        figures[name]["retrieval"] = images_found(model, learn_pairs, ask_pairs, args.steps)
        figures[name]["text_words"] = words_found(with_encoder(towers.model, other), learn, ask[:few], args.steps)
        figures[name] |= {"captions": len(ask_pairs[0]), "windows": len(ask[:few])}  # asked
    return figures


# --- the commands ----------------------------------------------------------------------------------------


def main():
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="loss of plain text: what a prior forgets")
    tokens = commands.add_parser("tokens", help="how image tokens lie relative to text tokens")
    encoder = commands.add_parser("encoder", help="what a text encoder knows before and after the full training")
    encoder.add_argument("--towers", required=True, help="folder of --model towers")
    encoder.add_argument("--n", type=count, default=2048, help="captions, and windows, to learn from; a quarter to ask")
    encoder.add_argument("--steps", type=count, default=300, help="steps of each head's training [300]")
    for command, measure in ((text, forgetting), (tokens, token_figures), (encoder, encoder_figures)):
        command.set_defaults(measure=measure)
        command.add_argument("--model", nargs="+", required=True, help="folders of train_prior.py")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
        command.add_argument("--out", help="write figures, settings and hashes to this JSON file")
        if command is not tokens:
            command.add_argument("--text", required=True, help="a plain text file")
    args = parser.parse_args()
    if args.out:
        check_writable(args.out)
    figures = args.measure(args, pick_device(args.device))
    for name, row in figures.items():
        print(f"{name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if args.out:
        folders = args.model + ([args.towers] if "towers" in args else [])
        hashes = {folder: file_hash(Path(folder, "model.safetensors")) for folder in folders}
        settings = {k: v for k, v in vars(args).items() if k != "measure"}
        record = {"figures": figures, "settings": settings, "model": hashes, "command": " ".join(sys.argv)}
        write_file(args.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
