"""Make a small copy of a trained prior or tokenizer for use only: float16 weights, no state, no paths of this machine.

python -m minit2i.export --model out/scenes --out minit2i/pretrained/scenes
"""

from pathlib import Path

import torch

from minit2i.checkpoint import check_free, load_tensors, read_config, save_model, write_file
from minit2i.flags import new_parser
from minit2i.train import run

PRIVATE = "out vq cache resume init vgg device val_data dry_run workers".split()  # how and where a run was started


def without_paths(config):
    """A checkpoint's config without the settings that say where a run was; folders keep their names."""
    config = dict(config)
    for part in ("train", "data"):
        config[part] = {k: v for k, v in config[part].items() if k not in PRIVATE}
    config["data"]["data"] = Path(config["data"]["data"]).name
    folders = {k: Path(v).name for k, v in config["model"].items() if k in ("t5", "llama")}  # t5 is known by its hash
    config["model"] = config["model"] | folders
    return config


def export(folder, out):
    """Copy a checkpoint folder, a prior's with its tokenizer, with float16 weights."""
    config = read_config(folder)
    if Path(folder, "lm").exists():
        raise ValueError(f"{folder} is a language model; {Path(folder, 'lm')} is the part of it that others can use")
    check_free(out)
    tensors, _ = load_tensors(Path(folder, "model.safetensors"))
    save_model(out, tensors, without_paths(config), torch.float16)
    if Path(folder, "text.model").exists():
        write_file(Path(out, "text.model"), Path(folder, "text.model").read_bytes())
    if config["kind"] != "vq":
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
