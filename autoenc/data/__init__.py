"""Data sets of images or splats: generated ones, manifests and folders, in one memory-mapped form."""

from autoenc.data.dataset import SPLITS, Dataset, cached, check, originals, prepare
from autoenc.data.palette import IGNORED

__all__ = ["IGNORED", "SPLITS", "Dataset", "cached", "check", "originals", "prepare"]
