"""Make a small copy of a trained prior or tokenizer for use only, or exchange tokenizers with diffusers (vqmodel.py).

python -m minit2i.export --model out/scenes --out minit2i/pretrained/scenes      float16, no state, no paths of a machine
python -m minit2i.export --model out/vqgan --layout diffusers --out FOLDER       a vqgan or movq as diffusers' VQModel
python -m minit2i.export --model FOLDER --vq_range 0,1 --out out/published       and back
"""

from pathlib import Path

import torch

from minit2i.checkpoint import check_free, load_tensors, read_config, save_model, write_file
from minit2i.flags import new_parser
from minit2i.train import run
from minit2i.vqmodel import copy_tokenizer, is_vqmodel, write_vqmodel

PRIVATE = "out vq cache resume init vgg device val_data dry_run workers".split()  # how and where a run was started


def without_paths(config):
    """A checkpoint's config without the settings that say where a run was; folders keep their names."""
    config = dict(config)
    for part in ("train", "data"):
        config[part] = {k: v for k, v in config[part].items() if k not in PRIVATE}
    config["data"]["data"] = Path(config["data"].get("data", "")).name
    folders = {k: Path(v).name for k, v in config["model"].items() if k in ("t5", "llama", "coarse_vq")}
    config["model"] = config["model"] | folders
    return config


def export(folder, out):
    """Copy a checkpoint folder, a prior's with its tokenizers, with float16 weights."""
    config = read_config(folder, ("kind", "model", "data", "train"))
    if Path(folder, "lm").exists():
        raise ValueError(f"{folder} is a language model; {Path(folder, 'lm')} is the part of it that others can use")
    tokenizers = [*Path(folder).glob("*vq")] if config["kind"] != "vq" else []
    for place in (out, *(Path(out, tokenizer.name) for tokenizer in tokenizers)):
        check_free(place)  # before anything is written
    tensors, meta = load_tensors(Path(folder, "model.safetensors"))
    save_model(out, tensors, without_paths(config), torch.float16, **meta)
    if Path(folder, "text.model").exists():
        write_file(Path(out, "text.model"), Path(folder, "text.model").read_bytes())
    for tokenizer in tokenizers:
        export(tokenizer, Path(out, tokenizer.name))


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder, or one that diffusers wrote")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--layout", choices=("minit2i", "diffusers"), default="minit2i", help="of the folder to write")
    parser.add_argument("--vq_range", default="", help="range of its pixels, 0,1 or -1,1, if diffusers wrote --model")
    args = parser.parse_args()
    if args.layout == "diffusers":
        pixels = write_vqmodel(args.model, args.out)
        print(f"its pixels are in {pixels}, which diffusers' config does not say")
    elif is_vqmodel(args.model):
        check_free(args.out)
        copy_tokenizer(args.model, args.out, args.vq_range)
    else:
        export(args.model, args.out)
    size = sum(f.stat().st_size for f in Path(args.out).rglob("*") if f.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
