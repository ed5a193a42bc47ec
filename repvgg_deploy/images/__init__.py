"""Image files → batches as a model takes them; the only place that normalises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import find_lazily

if TYPE_CHECKING:
    from .calibration import Images as Images
    from .calibration import load_calibration as load_calibration
    from .decode import decode_image as decode_image
    from .decode import default_preprocessing as default_preprocessing
    from .decode import fit_image as fit_image
    from .decode import image_size as image_size
    from .decode import letterbox_preprocessing as letterbox_preprocessing
    from .decode import load_batch as load_batch
    from .decode import load_image as load_image
    from .decode import normalize as normalize
    from .listing import list_images as list_images
    from .pixels import Placement as Placement
    from .pixels import place as place
    from .sets import ImageBatch as ImageBatch
    from .sets import ImageSet as ImageSet
    from .sets import SetOptions as SetOptions
    from .sets import open_images as open_images

__getattr__ = find_lazily(
    __name__,
    {
        "calibration": "Images load_calibration",
        "decode": "decode_image default_preprocessing fit_image image_size letterbox_preprocessing "
        "load_batch load_image normalize",
        "listing": "list_images",
        "pixels": "Placement place",
        "sets": "ImageBatch ImageSet SetOptions open_images",
    },
)
