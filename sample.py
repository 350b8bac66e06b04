"""Sample images for prompts, or captions for an image: see minit2i/sample_cli.py, or --help."""

from minit2i.sample_cli import main
from minit2i.train import run

if __name__ == "__main__":
    run(main)
