"""Data: sources held in memory or on disk, densities in the plane, and batches through Grain.

The readers and the pipeline need the `train` extra (grain, scikit-learn, pyarrow, pillow), which
each imports when it is called.
"""

from jaxdiff.data._cifar10 import cifar10 as cifar10
from jaxdiff.data._digits import digits as digits
from jaxdiff.data._folder import FolderSource as FolderSource
from jaxdiff.data._folder import image_folder as image_folder
from jaxdiff.data._idx import idx as idx
from jaxdiff.data._idx import mnist as mnist
from jaxdiff.data._images import save_images as save_images
from jaxdiff.data._npz import npz as npz
from jaxdiff.data._pipeline import make_loader as make_loader
from jaxdiff.data._prompts import PROMPT_WORDS as PROMPT_WORDS
from jaxdiff.data._prompts import PromptAttributes as PromptAttributes
from jaxdiff.data._prompts import prompt_attributes as prompt_attributes
from jaxdiff.data._prompts import prompts as prompts
from jaxdiff.data._records import RecordSource as RecordSource
from jaxdiff.data._records import records as records
from jaxdiff.data._reduced import reduced as reduced
from jaxdiff.data._sources import ArraySource as ArraySource
from jaxdiff.data._sources import Source as Source
from jaxdiff.data._sources import array_source as array_source
from jaxdiff.data._split import split as split
from jaxdiff.data._split import without_classes as without_classes
from jaxdiff.data._toy2d import checkerboard as checkerboard
from jaxdiff.data._toy2d import eight_gaussians as eight_gaussians
from jaxdiff.data._toy2d import rings as rings
from jaxdiff.data._toy2d import swiss_roll as swiss_roll
from jaxdiff.data._toy2d import two_moons as two_moons
from jaxdiff.data._write_records import to_records as to_records
from jaxdiff.data._write_records import write_records as write_records
