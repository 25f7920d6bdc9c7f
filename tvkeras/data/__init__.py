"""Image-classification data: cached arrays, batches by index, augmentation, streams.

Images are kept as uint8 and become float32 in [0, 1] once, inside the compiled
step. Everything random is a function of (seed, epoch or step), so that a run can
be repeated or continued exactly.
"""

from tvkeras.data.arrays import DataNotFoundError, Examples, held_out, load
from tvkeras.data.augmentation import Augmentation
from tvkeras.data.batches import Batches, Splits, in_memory
from tvkeras.data.files import is_path
from tvkeras.data.stream import Stream, streamed

__all__ = [
    "Augmentation",
    "Batches",
    "DataNotFoundError",
    "Examples",
    "Splits",
    "Stream",
    "held_out",
    "in_memory",
    "is_path",
    "load",
    "streamed",
]
