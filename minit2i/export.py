"""Make a small folder of a trained prior (or tokenizer, or pair of towers), for use only: float16 weights, no state, no paths.

python -m minit2i.export --model out/scenes --out minit2i/pretrained
"""

from pathlib import Path

import torch

from minit2i.checkpoint import load_tensors, read_config, save_model, write_file
from minit2i.flags import new_parser
from minit2i.train import run

# settings that say where a run was, not what it was
PRIVATE = "out vq cache resume init finetune_decoder super_resolution vgg text_encoder init_lm device val_data".split()


def export(folder, out):
    """Copy a checkpoint folder, a prior's or two towers' with the tokenizer inside, or a tokenizer's, with float16 weights."""
    config = read_config(folder)
    if config["kind"] == "lm":
        raise ValueError(f"{folder} is a language model; {Path(folder, 'lm')} is the part of it that others can use")
    if Path(out).resolve() == Path(folder).resolve():
        raise ValueError(f"--out {out} is --model, whose float32 weights would be lost; use another")
    for part in ("train", "data"):
        config[part] = {k: v for k, v in config[part].items() if k not in PRIVATE}
    config["data"]["data"] = Path(config["data"]["data"]).name
    if "text_encoder" in config:  # too large to copy; it is known by its hash, wherever it is
        config["text_encoder"]["folder"] = Path(config["text_encoder"]["folder"]).name
    tensors, _ = load_tensors(Path(folder, "model.safetensors"))
    save_model(out, tensors, config, torch.float16)
    if config["kind"] != "vq":
        if "text_encoder" not in config:
            write_file(Path(out, "text.model"), Path(folder, "text.model").read_bytes())
        export(Path(folder, "vq"), Path(out, "vq"))


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args()
    export(args.model, args.out)
    size = sum(f.stat().st_size for f in Path(args.out).rglob("*") if f.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
