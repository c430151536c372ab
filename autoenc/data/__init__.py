"""Data sets of images: generated layouts, manifests and folders, in one memory-mapped form."""

from autoenc.data.dataset import SPLITS, Dataset, cached, check, prepare
from autoenc.data.palette import IGNORED

__all__ = ["IGNORED", "SPLITS", "Dataset", "cached", "check", "prepare"]
