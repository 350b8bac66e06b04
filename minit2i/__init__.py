"""minit2i: text-to-image by next-token prediction.

image --vq--> codes;  caption + codes --gpt--> next code;  sample joins the two.
"""

import warnings

# `python -m minit2i.papers.muse` runs a module that this package has imported already, which is meant
warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package", category=RuntimeWarning)

from minit2i import papers  # noqa: E402, F401  fills the registries
