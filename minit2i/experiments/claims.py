"""What the papers claim, tried at a small size: every variant from several seeds, and a verdict.

    python -m minit2i.experiments.claims                                 the list of claims
    python -m minit2i.experiments.claims hidden-pads --out out/claims    runs those named, or goes on with them
    python -m minit2i.experiments.claims all --out out/claims

A claim compares two settings of train_vq.py or train_prior.py that differ in one technique.  Both train on generated
scenes of 32x32 pixels, priors on 64 codes of one tokenizer that the command trains first.  A run is an ordinary
folder with row.json, its figures; finished runs are not repeated.  claims.json holds the table of all that is
finished, in the form of results/*.json.

The verdict is Welch's t-test on the figure that the claim is about: "holds" or "does not hold here: the reverse" if p <
0.05, else "undecided"; p is not corrected for the number of claims.
"""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from scipy.stats import ttest_ind_from_stats

from minit2i.checkpoint import read_config, write_file
from minit2i.config import Settings, at_least, known, pick
from minit2i.experiments.evaluate import scene_accuracy
from minit2i.experiments.tokenizers import run_script
from minit2i.flags import add_flags, new_parser
from minit2i.plot import read_log
from minit2i.sample import Pipeline
from minit2i.train import run

VQ = "train_vq.py --data scenes --image_size 32 --stride 4 --ch 32 --n_res 1 --n_codes 512 --lr 2e-3 --warmup 50 --workers 0 "
TOKENIZER = VQ + "--patchwise --ch 64 --batch_size 32 --steps 3000 --ema 0.995"
VQ += "--steps 800"
PRIOR = (
    "train_prior.py --data scenes:100000 --image_size 32 --n_layer 4 --n_embd 128 --n_head 4 --vocab_size 512 "
    "--text_len 28 --optimizer muon --lr 3e-3 --warmup 50 --batch_size 16 --bpe_dropout 0 --steps 1500 --workers 0"
)
SMALL_SET = PRIOR.replace("scenes:100000", "scenes:2000")  # learned by heart: where a regulariser can help


class Claim(NamedTuple):
    """The variant `first` is better than `second` by `figure`: larger if sign is 1, smaller if -1."""

    says: str
    command: str  # of both variants: script and flags
    first: tuple[str, str]  # its name, its own flags; {name} is the folder of a run of `before` with the same seed
    second: tuple[str, str]
    figure: str  # val_psnr, code_use; val_image_loss, seen, held_out: the oracle's accuracy on such scenes
    sign: int
    before: dict[str, str] = {}  # name -> command of a prior, trained first


ENCODER = "--condition encoder --n_encoder 3 --mask conv --text_weight 0"
GAN = "--stride 8 --recon l1 --discriminator patch --gan_start 300 --gan_ramp 100 --gan_ch 16 --gan_layers 2"
CLAIMS = {
    "kl-fills-codebook": Claim(
        "A larger KL weight gives more used codes in the end (DALL-E, fn 4)",
        VQ + " --quantizer gumbel --kl_steps 100 --tau_steps 600",
        ("kl_weight 1", "--kl_weight 1"), ("kl_weight 0", "--kl_weight 0"), "code_use", 1,
    ),
    "l2-norm": Claim(
        "Codes die without l2 normalisation (ViT-VQGAN, sec. 3.2)",
        VQ + " --quantizer st --restart 0",
        ("l2_norm", "--l2_norm"), ("no l2_norm", ""), "code_use", 1,
    ),
    "few-channels": Claim(
        "Codes of few channels are used more (ViT-VQGAN, sec. 3.2)",
        VQ + " --quantizer st --restart 0 --l2_norm",
        ("16 channels", "--code_dim 16"), ("256 channels", "--code_dim 256"), "code_use", 1,
    ),
    "adaptive-weight": Claim(
        "The adaptive weight keeps reconstructions while a discriminator learns (VQGAN, eq. 7)",
        VQ + f" {GAN}",
        ("adaptive", ""), ("weight 0.8", "--no-gan_adaptive"), "val_psnr", 1,
    ),
    "sparse-masks": Claim(
        "Row, column and conv masks lose nothing against causal ones (DALL-E; here: they are better)",
        PRIOR, ("dalle", "--mask dalle"), ("causal", ""), "val_image_loss", -1,
    ),
    "conv-last": Claim(
        "A conv mask in the last layer is better than a row mask there (DALL-E, app. B.1)",
        PRIOR, ("conv last", "--mask dalle"), ("row last", "--mask row,column,row,row"), "val_image_loss", -1,
    ),
    "hidden-pads": Claim(
        "Hidden pads give a lower validation loss than learned ones (DALL-E, sec. 2.2)",
        SMALL_SET, ("hidden", "--pads hidden"), ("learned", "--pads learned"), "val_image_loss", -1,
    ),
    "hidden-pads-new-captions": Claim(
        "Learned pads do better on captions unlike those of training (DALL-E, sec. 2.2)",
        PRIOR, ("learned", "--pads learned"), ("hidden", "--pads hidden"), "held_out", 1,
    ),
    "text-loss": Claim(
        "Without a loss on text images do not follow their captions (CogView, sec. 2.3)",
        PRIOR, ("text_weight 1/8", ""), ("text_weight 0", "--text_weight 0"), "seen", 1,
    ),
    "pre-trained-encoder": Claim(
        "Pre-training the text encoder on words and contrast helps to draw (Parti, sec. 2.2)",
        f"{PRIOR} {ENCODER} --steps 700",
        ("pre-trained", "--init {towers} --model gpt"), ("from scratch", ""), "val_image_loss", -1,
        {"towers": f"{PRIOR} --model towers --n_encoder 3 --batch_size 32 --steps 500"},
    ),
    "encoder-decoder": Claim(
        "An encoder and a decoder are better than a decoder alone (Parti, sec. 2.1; parameters within 1 %)",
        PRIOR + " --text_weight 0",
        ("encoder 1, decoder 4", "--condition encoder --n_encoder 1 --n_layer 4"), ("decoder 6", "--n_layer 6"),
        "val_image_loss", -1,
    ),
    "code-samples": Claim(
        "Codes sampled from the tokenizer's distribution regularise a prior (DALL-E, sec. 2.2 footnote)",
        SMALL_SET, ("sampled", "--code_samples 16 --code_temperature 0.05"), ("likeliest", ""), "seen", 1,
    ),
    "bpe-dropout": Claim(
        "BPE dropout helps (DALL-E, sec. 2.2)",
        SMALL_SET, ("0.1", "--bpe_dropout 0.1"), ("0", "--bpe_dropout 0"), "held_out", 1,
    ),
    "averaged-weights": Claim(
        "Averaged weights are better than the last (DALL-E, app. B)",
        PRIOR, ("ema 0.999", "--ema 0.999"), ("no average", "--ema 0"), "val_image_loss", -1,
    ),
    "embedding-gradient": Claim(
        "A tenth of the embedding's gradient costs nothing under AdamW (CogView, sec. 2.4; here: it is better)",
        PRIOR + " --optimizer adamw", ("0.1", "--embed_grad 0.1"), ("1", ""), "val_image_loss", -1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ClaimsConfig(Settings):
    """Which claims, and where."""

    out: Annotated[str, "folder of all runs and of claims.json"] = "out/claims"
    seeds: Annotated[int, "runs of each variant", at_least(2)] = 3
    prompts_per_category: Annotated[int, "scenes per category, to measure accuracy", at_least(1)] = 50


# --- runs ------------------------------------------------------------------------------------------------


def train(command, folder, seed, vq):
    """Run a command, a prior's on the tokenizer in `vq`, unless the folder is finished."""
    script, *flags = shlex.split(command)
    more = ["--vq", str(vq)] if script == "train_prior.py" else []
    run_script(script, [*flags, "--seed", str(seed), *more], folder)


def measure(folder, n):
    """A finished run's last figures in its log; of a prior also the oracle's accuracy in %, n prompts a category."""
    figures = {k: v for r in read_log(folder / "log.jsonl") for k, v in r.items() if k.startswith(("val_", "code_use"))}
    if read_config(folder)["kind"] == "prior":
        pipe = Pipeline(folder)
        table = scene_accuracy(pipe, pipe.sampling, n, say=lambda line: None)
        figures |= {split: 100 * table[split]["overall"] for split in ("seen", "held_out")}
    return figures


def figures_of(claim, variant, seed, folder, cfg):
    """The figures of one run, trained and measured unless row.json has them.  ValueError if those are of another
    command."""
    path, vq, n = folder / "row.json", Path(cfg.out, "tokenizer"), cfg.prompts_per_category
    asked = {"command": f"{claim.command} {variant[1]}", "prompts_per_category": n}
    if not path.exists():
        folders = {name: folder.parent / f"{name}-{seed}" for name in claim.before if f"{{{name}}}" in variant[1]}
        for name, before in folders.items():
            train(claim.before[name], before, seed, vq)
        own = variant[1].format(**{k: shlex.quote(str(v)) for k, v in folders.items()})
        train(f"{claim.command} {own}", folder, seed, vq)
        write_file(path, json.dumps({"asked": asked, "figures": measure(folder, n)}, indent=1) + "\n")
    row = json.loads(path.read_text())
    if row.get("asked") != asked:
        raise ValueError(f"{path} has the figures of another command; use another --out")
    return row["figures"]


# --- verdict and table -----------------------------------------------------------------------------------


def mean_sd(values):
    """-> mean and standard deviation of a sample."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def verdict(first, second, sign):
    """Figures of two variants -> (what the test says, p)."""
    (a, s), (b, t) = mean_sd(first), mean_sd(second)
    if s == t == 0:
        p = 1.0 if a == b else 0.0
    else:
        p = float(ttest_ind_from_stats(a, s, len(first), b, t, len(second), equal_var=False).pvalue)
    if p >= 0.05:
        return "undecided", p
    return ("holds" if (a - b) * sign > 0 else "does not hold here: the reverse"), p


def row_of(claim, figures):
    """{variant's name: [figures of each seed]} -> the claim's row in the table."""
    cells = {name: [f[claim.figure] for f in runs] for name, runs in figures.items()}
    said, p = verdict(*cells.values(), claim.sign)
    texts = [f"{name}: {mean:.4g} ± {sd:.2g}" for name, (mean, sd) in zip(cells, map(mean_sd, cells.values()))]
    return [claim.says, claim.figure, *texts, f"{said} (p {p:.2g})"]


def try_claim(name, cfg):
    """Run what is missing of a claim -> its row, and writes it."""
    claim, folder = CLAIMS[name], Path(cfg.out, name)
    figures = {
        variant[0]: [
            figures_of(claim, variant, seed, folder / f"{variant[0].replace(' ', '-').replace('/', '-')}-{seed}", cfg)
            for seed in range(cfg.seeds)
        ]
        for variant in (claim.first, claim.second)
    }
    row = row_of(claim, figures)
    write_file(folder / "claim.json", json.dumps({"row": row, "figures": figures}, indent=1) + "\n")
    return row


def table(cfg):
    """The rows of all finished claims as a result, see results.py; its answer counts the verdicts."""
    paths = [path for name in CLAIMS if (path := Path(cfg.out, name, "claim.json")).exists()]
    rows = [json.loads(path.read_text())["row"] for path in paths]
    said = [row[-1].split(" (")[0] for row in rows]
    columns = ["claim", "figure", "variant", "against", "verdict"]
    answer = "; ".join(f"{said.count(s)} {s}" for s in dict.fromkeys(said))
    return {"columns": columns, "rows": rows, "seeds": cfg.seeds, "answer": answer}


def main():
    parser = new_parser(__doc__)
    parser.add_argument("claims", nargs="*", help=f"all, or some of {', '.join(CLAIMS)}; none: the list")
    add_flags(parser, ClaimsConfig)
    args = parser.parse_args()
    cfg, names = pick(ClaimsConfig, args), [*CLAIMS] if args.claims == ["all"] else args.claims
    for name in names:
        known(CLAIMS, "claim", name)
    if not names:
        return print("\n".join(f"{name:26}{claim.says}" for name, claim in CLAIMS.items()))
    train(TOKENIZER, Path(cfg.out, "tokenizer"), 0, None)
    for name in names:
        print("| " + " | ".join(try_claim(name, cfg)) + " |", flush=True)
    write_file(Path(cfg.out, "claims.json"), json.dumps(table(cfg), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(main)
