"""The PyTorch reference: the network in training form and in deploy form, and reparameterization. Needs torch.

`checkpoint` reads a file, `network` and `block` are the model, `arithmetic` folds branches into one kernel in float64,
`fold.reparameterize` makes the deploy form (of blocks of other projects, too: `foreign` reads them, `beside` runs both
forms), and `parity.compare_forms` compares the two forms of a whole network block by block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import find_lazily

if TYPE_CHECKING:
    from .checkpoint.load import Checkpoint as Checkpoint
    from .checkpoint.load import build_model as build_model
    from .checkpoint.load import load_checkpoint as load_checkpoint
    from .fold import reparameterize as reparameterize

__getattr__ = find_lazily(
    __name__, {"checkpoint.load": "Checkpoint build_model load_checkpoint", "fold": "reparameterize"}
)
