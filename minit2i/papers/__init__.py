"""One file per paper: what it adds to the core, in code, and its recipe.  Importing this package fills the registries.

All six files have the same sections: STAGE 1: tokenizer, STAGE 2: prior, RECIPE.  They are in order of publication; a
later one may import from an earlier one.
"""

from minit2i import gpt
from minit2i.papers import cogview, dalle, lm, muse, parti, taming

PAPERS = {"taming": taming, "dalle": dalle, "cogview": cogview, "parti": parti, "muse": muse, "lm": lm}

# --recipe NAME: {"vq": settings of train_vq.py, "prior": settings of train_prior.py}, which given flags override
RECIPES = {name: paper.RECIPE for name, paper in PAPERS.items()}

# --model_size NAME: sizes of the prior
SIZES = gpt.SIZES | {size: values for paper in PAPERS.values() for size, values in getattr(paper, "SIZES", {}).items()}
