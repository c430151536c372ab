"""Models of one's own for tests, and what is asked of them."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from helpers import small_config, small_dataset

from autoenc import custom
from autoenc.checkpoint import build_model
from autoenc.config import Config
from autoenc.train import train

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
HEAD = "import torch\nfrom torch import nn\n\n\n"
PLAIN = HEAD + """class Net(nn.Module):
    def __init__(self, channels=2, rate=0.0):
        super().__init__()
        self.down = nn.Conv2d(3, channels, 4, stride=4)
        self.drop = nn.Dropout(rate)
        self.up = nn.ConvTranspose2d(channels, 3, 4, stride=4)

    def encode(self, images):
        return {"latent": self.drop(self.down(images))}

    def decode(self, latent):
        return {"rgb": self.up(latent).tanh()}
"""
VAE = HEAD + """class Net(nn.Module):
    def __init__(self, size=5):
        super().__init__()
        self.size, self.down, self.up = size, nn.Linear(768, 2 * size), nn.Linear(size, 768)

    def encode(self, images):
        mu, logvar = self.down(images.view(len(images), -1)).chunk(2, 1)
        return {"mu": mu, "logvar": logvar, "latent": mu + torch.randn_like(mu) * (logvar / 2).exp()}

    def decode(self, latent):
        return {"rgb": self.up(latent).view(-1, 3, 16, 16), "size": latent.norm(dim=1)}
"""
names = (f"own_module_{number}" for number in itertools.count())
LOSSES = """import torch


def bright(outputs, batch):
    return (outputs["rgb"] - batch["images"]).mean().square()


def small(outputs, batch):
    assert batch["segmentation"].shape[1:] == (16, 16) and batch["labels"].shape == (len(batch["images"]),)
    return outputs["latent"].square().mean()


def number(outputs, batch): return 0.5
def nothing(outputs, batch): pass
def each(outputs, batch): return outputs["rgb"].mean((1, 2, 3))
def whole(outputs, batch): return torch.tensor(3)
def lacking(outputs, batch): return outputs["depth"].mean()
def nan(outputs, batch): return outputs["rgb"].mean() * float("nan")
class Term: pass
"""


def own(name: str, **more) -> Config:
    return small_config(model__kind="custom", model__target=f"{name}:Net", **more)


def built(config: Config):
    return build_model(config, small_dataset())


def run(config: Config, dataset=None, **more):
    """All results with their states, taken as they come."""
    return [(result, result.state()) for result in train(config, dataset or small_dataset(), **more)]


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right or (left != left and right != right)


def another_process(monkeypatch, *modules: str) -> None:
    """As if this one had read nothing yet, nor imported these modules."""
    monkeypatch.setattr(custom, "_sources", {})
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)


def net(encode: str = 'return {"latent": self.down(images)}', decode: str = 'return {"rgb": self.up(latent)}',
        init: str = "pass", base: str = "nn.Module") -> str:
    return HEAD + f"""class Net({base}):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 2, 4, stride=4), nn.ConvTranspose2d(2, 3, 4, stride=4)
        {init}

    def encode(self, images):
        {encode}

    def decode(self, latent):
        {decode}
"""
