"""What learning to draw does to language: to a language model that a prior started from, and to a text encoder.

    python -m minit2i.probes text --text book.txt --model out/book out/lm-0 out/lm-1000 --out forgetting.json
    python -m minit2i.probes tokens --model out/lm-0 out/lm-1000
    python -m minit2i.probes encoder --text book.txt --towers out/towers --model out/parti

text: nats a token on the last 2 % of a plain text, which --objective text does not learn: what priors that start from a
language model forget (arXiv:2311.16201).  Windows of the models' shortest --text_len.  With --out also a plot over steps.

tokens: how image tokens lie against text tokens, in the embedding and, where text is predicted, in the output layer: mean
norms, and the mean of each token's largest cosine with a text token, beside the same of text tokens among themselves and
of random directions.  2311.16201 finds by training (on image tokens alone, and for a contrastive alignment) that the two
kinds mean different things; nothing is trained here.

encoder: hidden words found, in captions and in plain text, and captions that find their picture among 32, on the towers'
data.  Parti, arXiv:2206.10789 sec. 2.2, says that its text encoder degrades in the full training (there by GLUE).  A prior
has no head for words and no mask token any more, so all are treated alike: the encoder stays as it is, mask token and
picture's tower are the towers', and a new linear head is trained for each figure.  "untrained": an encoder at random.

Shapes: B batch, T text length, N codes of a picture, D width, V vocabulary.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from minit2i.blocks import Head, Linear
from minit2i.checkpoint import load_model, read_config, write_file
from minit2i.contrast import Contrast, evaluate_towers, info_nce
from minit2i.data import DataConfig, split
from minit2i.flags import new_parser, pick
from minit2i.gpt import GPT, GPTConfig
from minit2i.lm import read_text, text_windows
from minit2i.metrics import captioned
from minit2i.plot import plot
from minit2i.sample import Painter, file_hash
from minit2i.tokens import Text
from minit2i.train import pick_device, run, save_image


def load(folder, device):
    """Folder of a prior or a language model -> (GPT, config, its text.model).  ValueError for another, or without words."""
    config = read_config(folder)
    if config.get("kind") not in ("prior", "lm") or config.get("text_encoder"):
        why = "is neither a language model nor a prior with words of its own, of train_prior.py"
        raise ValueError(f"{folder} {why}; --init_lm and --steps 0 make a prior of a language model from elsewhere")
    model = load_model(folder, GPT(pick(GPTConfig, config["model"]))).to(device).requires_grad_(False)
    return model, config, Path(folder, "text.model").read_bytes()


def texts(path, words, length, n=sys.maxsize):
    """A plain text -> windows to learn from, and those of its last part, up to n of each: two (n, T)."""
    parts = text_windows(read_text(path), Text(words, length), DataConfig.val_fraction, 0)
    return [torch.stack([part[i][0] for i in range(min(n, len(part)))]) for part in parts]


# --- forgetting ------------------------------------------------------------------------------------------


@torch.inference_mode()
def nats(model, ids, batch=32):
    """Mean loss of the tokens of a text, each window's first left out: ids (n, T) -> nats a token."""
    total = 0.0
    for part in ids.split(batch):
        logits = model.text_head(model.trunk(part[:, :-1])).float()  # (B, T-1, V); text sees no codes
        total += float(F.cross_entropy(logits.mT, part[:, 1:], reduction="sum"))
    return total / ids[:, 1:].numel()


def forgetting(args, device):
    """-> {folder: kind, step, nats}.  ValueError for models that predict no text, or tokens of another vocabulary."""
    models = {folder: load(folder, device) for folder in args.model}
    words, length = models[args.model[0]][2], min(model.cfg.text_len for model, *_ in models.values())
    ids, figures, curves = texts(args.text, words, length)[1].to(device), {}, {}
    last = max([config["step"] for _, config, _ in models.values() if config["kind"] == "prior"] or [1])
    for folder, (model, config, own) in models.items():
        if own != words:
            raise ValueError(
                f"{folder} has other tokens than {args.model[0]}: measure it apart, nats would not compare"
            )
        if model.text_ahead or model.cfg.order != "text" or not model.cfg.text_loss:
            raise ValueError(f"{folder} predicts no text from the text before it; use a causal prior, caption first")
        row = figures[folder] = {"kind": config["kind"], "step": config["step"], "nats": nats(model, ids)}
        lm, started = row["kind"] == "lm", config["train"].get("init_lm") and config["train"]["init_lm_weights"]
        curve = curves.setdefault("language model" if lm else "started from one" if started else "other priors", [])
        curve += [(x, row["nats"]) for x in ((0, last) if lm else (row["step"],))]
    if args.out:
        save_image(Path(args.out).with_suffix(".png"), plot({k: sorted(v) for k, v in curves.items()}, "nats a token"))
    return figures


# --- image tokens against text tokens --------------------------------------------------------------------


def nearest(rows, text, skip=0):
    """Mean over rows (n, D) of the largest cosine with one of text (V, D), the `skip` largest (a token's own) left out."""
    a, b = F.normalize(rows.float(), dim=1), F.normalize(text.float(), dim=1)
    return float(torch.cat([(part @ b.T).topk(1 + skip).values[:, skip] for part in a.split(1024)]).mean())


def token_figures(args, device):
    """-> {folder, layer: norms, mean largest cosines with a text token}."""
    figures = {}
    for folder in args.model:
        model, config, _ = load(folder, device)
        if config["kind"] == "lm":
            raise ValueError(f"{folder} has no image tokens; a prior of --init_lm {folder}/lm --steps 0 has new ones")
        c, ids = model.cfg, model.embedding.weight
        layers = {"embedding": (ids[: c.n_vocab], ids[c.n_vocab + c.text_len :][: c.n_codes])}
        if c.text_loss:
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


def with_encoder(towers, other):
    """The towers with the text embedding and encoder of another (GPT or Contrast), all frozen, and new heads for text."""
    torch.manual_seed(0)
    model, n, c = copy.deepcopy(towers), towers.cfg.n_vocab + towers.cfg.text_len, towers.cfg
    rows = torch.cat([other.embedding.weight[:n], towers.embedding.weight[n:]])
    model.embedding, model.encoder = torch.nn.Embedding.from_pretrained(rows), other.encoder
    model.requires_grad_(False)
    model.text_head, model.text_out = Head(c, c.n_vocab).to(rows.device), Linear(c.n_embd, c.n_embd).to(rows.device)
    return model


def fit(head, loss, n, steps, batch=64, lr=1e-2):
    """Train a head alone, by Adam at a rate that falls to 0; loss(rows, generator): of some of n examples, ()."""
    optimizer = torch.optim.Adam(head.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"], generator = lr * (1 - step / steps), torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        loss(torch.randperm(n, generator=generator)[:batch], generator).backward()
        optimizer.step()


def words_found(model, train, val, steps):
    """A new text_head learns from texts (m, T) -> share of hidden words of others (n, T) found, each text hidden 8 times."""

    def hidden(text, generator):  # -> logits (n, V), words (n,)
        read, words = model.hide(text, generator).unbind(1)
        states = model.encoder(model.embedding(read), None)
        return model.text_head(states[words >= 0]).float(), words[words >= 0]

    def loss(rows, generator):
        logits, words = hidden(train[rows], generator)
        return F.cross_entropy(logits, words, reduction="sum") / max(1, len(words))

    fit(model.text_head, loss, len(train), steps)
    parts = (hidden(part, torch.Generator().manual_seed(k)) for k, part in enumerate(val.repeat(8, 1).split(64)))
    return float(torch.cat([logits.argmax(1) == words for logits, words in parts]).float().mean())


def pictures_found(model, train, val, steps):
    """A new text_out learns from (ids, codes) -> share of other captions that find their picture among 32."""
    ids, images = train[0], torch.cat([model.image_feature(part) for part in train[1].split(64)])

    def loss(rows, _):
        feature = model.text_feature(ids[rows], model.encoder(model.embedding(ids[rows]), None))
        return info_nce(feature, images[rows], model.scale()) / len(rows)

    fit(model.text_out, loss, len(ids), steps)
    return evaluate_towers(model, list(zip(*val)))[2]


def encoder_figures(args, device):
    """-> {folder: words found in captions and in text, retrieval}; ValueError for priors of other words or sizes."""
    if min(args.n, args.steps) < 1:
        raise ValueError(f"--n {args.n} and --steps {args.steps} must be 1 or more")
    towers = Painter(args.towers, device, kind="contrast")
    c, few = towers.prior.cfg, -(-args.n // 4)
    torch.manual_seed(1)
    encoders = {"untrained": Contrast(c).to(device).eval(), args.towers: towers.prior}
    for folder in args.model:
        encoders[folder], _, words = load(folder, device)
        own = encoders[folder].cfg
        if (own.n_encoder > 0, own.text_len, own.n_embd, words) != (True, c.text_len, c.n_embd, towers.text.proto):
            raise ValueError(f"{folder} has no text encoder that started from {args.towers} (--init {args.towers})")

    def coded(source, indices):  # -> ids (n, T), codes (n, N)
        images, captions = captioned(source, indices, towers)
        codes = [towers.vq.encode(torch.stack(images[k : k + 64]).to(device)) for k in range(0, len(images), 64)]
        return towers.ids(captions), torch.cat(codes).flatten(1)

    (source, train), (val_source, val) = split(pick(DataConfig, towers.config["data"]))
    pictures = coded(source, train[:: -(-len(train) // args.n)]), coded(val_source, val[:few])
    learn, ask = (x.to(device) for x in texts(args.text, towers.text.proto, c.text_len, args.n))
    figures = {}
    for name, other in encoders.items():
        model = with_encoder(towers.prior, other)
        figures[name] = {"caption_words": words_found(model, *(ids for ids, _ in pictures), args.steps)}
        figures[name]["retrieval"] = pictures_found(model, *pictures, args.steps)
        figures[name]["text_words"] = words_found(with_encoder(towers.prior, other), learn, ask[:few], args.steps)
        figures[name] |= {"captions": len(pictures[1][0]), "windows": len(ask[:few])}  # that were asked
    return figures


# --- the commands ----------------------------------------------------------------------------------------


def main():
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="loss of plain text: what a prior forgets")
    tokens = commands.add_parser("tokens", help="how image tokens lie against text tokens")
    encoder = commands.add_parser("encoder", help="what a text encoder knows before and after the full training")
    encoder.add_argument("--towers", required=True, help="folder of --objective contrast")
    encoder.add_argument("--n", type=int, default=2048, help="captions, and windows, to learn from; a quarter to ask")
    encoder.add_argument("--steps", type=int, default=300, help="steps of each head's training [300]")
    for command, measure in ((text, forgetting), (tokens, token_figures), (encoder, encoder_figures)):
        command.set_defaults(measure=measure)
        command.add_argument("--model", nargs="+", required=True, help="folders of train_prior.py")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
        command.add_argument("--out", help="write the figures, settings and model hashes to this JSON file")
        if command is not tokens:
            command.add_argument("--text", required=True, help="a plain text file")
    args = parser.parse_args()
    figures = args.measure(args, pick_device(args.device))
    for name, row in figures.items():
        print(f"{name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if args.out:
        folders = args.model + ([args.towers] if "towers" in args else [])
        hashes = {folder: file_hash(Path(folder, "model.safetensors")) for folder in folders}
        settings = {k: v for k, v in vars(args).items() if k not in ("measure", "device", "out")}
        record = {"figures": figures, "settings": settings, "model": hashes, "command": " ".join(sys.argv)}
        write_file(args.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
