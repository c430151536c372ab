"""Models and losses of one's own: found, checked, trained, and identified by their text."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers import small_config, small_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sweepfiles import load, refused

from autoenc import custom, load_model
from autoenc.checkpoint import build_model, checkpoint_content, data_shapes, read_checkpoint, save_checkpoint
from autoenc.config import Config, make_config
from autoenc.errors import InputError
from autoenc.losses import losses_of
from autoenc.model import count_parameters
from autoenc.sweep.inherit import Winner, arm_candidates, stale_reasons, starting_point, winner_hash
from autoenc.train import Diverged, main, train

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

Write = Callable[..., str]


@pytest.fixture
def module(tmp_path, monkeypatch) -> Write:
    """Writes a module under a name of its own, on Python's path; gives the name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(text: str, name: str | None = None) -> str:
        name = name or next(names)
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write


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


# Where a target is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "name", "said"), [
    ("class Nett: pass", "Net", r"there is no Net in \S+\.py \(did you mean 'Nett'\?\)"),
    ("def Net(): pass", "Net", "is a function, and should be a class"),
    ("class Other:\n    class Net: pass", "Net", "there is no Net in"),
    ("def make():\n    class Net: pass", "Net", "there is no Net in"),
    ("class Net(:\n    pass", "Net", r"\.py, line 1: invalid syntax"),
    ("a = '\0'", "Net", r"\.py"),
])
def test_what_a_source_lacks_is_told_without_running_it(module, text, name, said):
    target = f"{module('raise RuntimeError' + chr(10) + text if 'line 1' not in said else text)}:{name}"
    with pytest.raises(InputError, match=f"^{target!r}: .*{said}"):
        custom.check_target(target, "class")


@pytest.mark.parametrize("text", [
    "class Net: pass", "from somewhere import Net", "import Net.inner", "from somewhere import Other as Net",
    "from somewhere import *", "Net = make()", "Net: type = int",
    "if True:\n    class Net: pass\nelse:\n    Net = None",
    "try:\n    from a import Net\nexcept ImportError:\n    Net = None", "def __getattr__(name): pass",
    "with x as Net:\n    pass", "a, Net = 1, 2"])
def test_what_a_source_may_hold_is_taken_for_it(module, text):
    custom.check_target(f"{module('raise RuntimeError' + chr(10) + text)}:Net", "class")


def test_modules_in_packages_are_found_and_others_are_not(module, tmp_path, monkeypatch):
    module("raise RuntimeError", "cst_pack.__init__")
    inner, spaced = module("class Net: pass", "cst_pack.inner"), module("class Net: pass", "cst_space.deep.inner")
    for name in (inner, spaced):
        assert custom.find_source(f"{name}:Net") == tmp_path / (name.replace(".", "/") + ".py")
        assert custom.source_digest(f"{name}:Net") == hashlib.sha256(b"class Net: pass").hexdigest()
    assert custom.find_source("cst_pack:Net") == tmp_path / "cst_pack/__init__.py"
    plain = module("class Net: pass")
    for target, said in {
            f"{plain}.json:Net": f"{plain} is no package", "cst_pack.absent:Net": "no module absent in cst_pack",
            "cst_absent:Net": r"no module cst_absent on Python's path \(.*PYTHONPATH",
            "cst_space:Net": "no source text", "sys:Net": "no source text",
            "cst_pack.inner": "should be package.module:Name", ":Net": "should be package.module:Name",
            "a/b:Net": "should be package.module:Name"}.items():
        with pytest.raises(InputError, match=f"^{re.escape(repr(target))}: .*{said}"):
            custom.check_target(target, "class")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    lonely = module("class Net: pass")
    custom.check_target(f"{lonely}:Net", "class")                 # in the working directory


@settings(max_examples=80, deadline=None)
@given(st.one_of(st.text(max_size=30), st.from_regex(r"\A[a-z_.]{0,8}:?[A-Za-z_.:]{0,8}\Z")))
def test_no_name_of_a_target_does_anything_but_be_refused(target):
    with pytest.raises(InputError):
        custom.check_target(target, "class")


@settings(max_examples=50, deadline=None)
@given(text=st.binary(max_size=60))
def test_no_source_does_anything_but_be_refused(tmp_path_factory, text):
    name = next(names)
    folder = tmp_path_factory.getbasetemp()
    (folder / f"{name}.py").write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        with pytest.raises(InputError):
            custom.check_target(f"{name}:No_such_name", "class")


# The contract of a model ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("text", "said"), [
    ("import no_such_thing\nclass Net: pass", r"cannot be imported: ModuleNotFoundError: No module named 'no_such_thi.*"
                                              r"\(own_module_\d+\.py, line 1\)"),
    ("raise SystemExit(3)\nclass Net: pass", "cannot be imported: SystemExit: 3"),
    ("class Net: pass", "is no class of torch.nn.Module"),
    ("from torch.nn import functional as Net", "is no class of torch.nn.Module"),
    ("if False:\n    class Net: pass", "there is no Net in"),
    (HEAD + "class Net(nn.Module):\n    encode = None", r"has no encode\(\)"),
    (HEAD + "class Net(nn.Module):\n    def encode(self, images): pass", r"has no decode\(\)"),
    (net(init="raise ValueError('odd')"), r"cannot be built from model.settings {}: ValueError: odd \(\S+, line 9\)"),
    (net(init="self.requires_grad_(False)"), "has no parameters to train"),
    (net("return self.down(images)"), r"encode\(\) gives a Tensor, and should give a mapping with 'latent'"),
    (net('return {"z": 1}'), r"encode\(\) gives no 'latent' but 'z'"),
    (net('return {"latent": 3}'), r"encode\(\) gives 'latent' as a int"),
    (net('return {"latent": self.down(images).long()}'), r"'latent' of shape \(2, 2, 4, 4\) and torch.int64; it "),
    (net('return {"latent": self.down(images)[:1]}'), r"'latent' of shape \(1, 2, 4, 4\)"),
    (net('return {"latent": self.down(images).flatten(2)}'), r"'latent' of shape \(2, 2, 16\)"),
    (net('return {"latent": self.down(images) / 0}'), r"encode\(\) gives 'latent' that is not finite"),
    (net("return self.down(images[:, :2])"), r"encode\(\) of \(2, 3, 16, 16\): RuntimeError: Given groups.*line 12\)"),
    (net(decode="pass"), r"decode\(\) gives a NoneType, and should give a mapping with 'rgb'"),
    (net(decode='return {"rgb": self.up(latent)[..., 1:]}'), r"decode\(\) gives 'rgb' of shape \(2, 3, 16, 15\)"),
    (net(decode='return {"rgb": self.up(latent) / 0}'), r"decode\(\) gives 'rgb' that is not finite"),
    (net(decode="raise KeyError('x')"), r"decode\(\) of \(2, 2, 4, 4\): KeyError: 'x'"),
])
def test_what_does_not_keep_the_contract_is_refused_with_the_reason(module, text, said):
    config = own(module(text))
    with pytest.raises(InputError, match=f"^model.target: {config.model.target!r}: .*{said}") as error:
        built(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changed", "given", "said"), [
    ({}, {"model__variational": False}, "encode() gives 'mu', and model.variational is false: set model.variational"),
    ({'"mu": mu, ': ""}, {}, "encode() gives no 'mu' but 'logvar', 'latent', and model.variational is true"),
    ({'"logvar": logvar, ': ""}, {}, "encode() gives no 'logvar'"),
    ({'"mu": mu': '"mu": mu[:, :3]'}, {}, "encode() gives 'mu' of shape (2, 3) and torch.float32; it should be (2, 5), "
                                          "as 'latent'"),
    ({'"logvar": logvar': '"logvar": logvar[:1]'}, {}, "encode() gives 'logvar' of shape (1, 5)"),
    ({}, {"loss__segmentation": 0.1}, "decode() gives no 'segmentation' but 'rgb', 'size', and loss.segmentation or"),
    ({}, {"model__settings": {"size": 3, "sise": 2}}, "cannot be built from model.settings {'size': 3, 'sise': 2}: "
                                                      "TypeError: "),
])
def test_what_does_not_fit_the_configuration_is_refused(module, changed, given, said):
    text = VAE
    for old, new in changed.items():
        assert old in text
        text = text.replace(old, new, 1)
    config = own(module(text), **{"model__variational": True, **given})
    with pytest.raises(InputError) as error:
        built(config)
    assert str(error.value).startswith(f"model.target: {config.model.target!r}: {said}")


def test_images_only(module):
    with pytest.raises(InputError, match=r"t: model\.kind: 'custom' takes images, and data\.source is 'spl"):
        make_config({"model.kind": "custom", "model.target": "a:Net", "data.source": "splats"}, "t")
    with pytest.raises(InputError, match="segmentation head needs segmentation classes"):
        build_model(own(module(PLAIN), loss__segmentation=0.1), small_dataset(segmentation=False))


# What it does ---------------------------------------------------------------------------------------------------------


def test_a_model_of_vectors_and_one_of_maps(module):
    plain = built(own(module(PLAIN), model__settings={"channels": 3}))
    assert plain.latent_shape == (3, 4, 4) and plain.latent_size == 48
    assert count_parameters(plain) == sum(p.numel() for p in plain.module.parameters()) == 3 * 48 + 3 + 3 * 48 + 3
    vae = built(own(module(VAE), model__variational=True))
    assert vae.latent_shape == (5,) and vae.takes == "images" and vae.gives == "rgb"
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    for model in (plain, vae):
        model.eval()
        encoded = model.encode(images)
        assert encoded["latent"].shape == (4, *model.latent_shape)
        assert set(encoded) == ({"latent", "mu", "logvar"} if model is vae else {"latent"})
        decoded = model.decode(encoded["latent"])
        assert torch.equal(decoded["rgb"], model.module.decode(encoded["latent"])["rgb"])
        assert list(model.decode(encoded["latent"], ("rgb",))) == ["rgb"]
    assert torch.equal(vae.encode(images)["latent"], vae.encode(images)["mu"])
    assert set(vae.train()(images, torch.Generator())) == {"rgb", "size", "latent", "raw_latent", "mu", "logvar"}
    assert not isinstance(vae.encoder, type(vae.module)) and len(vae.state_dict()) == 4           # registered once


def test_heads_that_nobody_asks_for_are_left_out(module):
    name = module(net(decode='return {"rgb": self.up(latent), "segmentation": self.up(latent), "more": latent}'))
    latent = torch.zeros(1, 2, 4, 4)
    assert set(built(own(name)).decode(latent)) == {"rgb", "more"}
    assert set(built(own(name, loss__segmentation=0.1)).decode(latent)) == {"rgb", "segmentation", "more"}


def test_weights_come_from_the_seed_and_nothing_else_does(module):
    config = own(module(PLAIN))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = built(config)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(one.state_dict(), built(config).state_dict())
    assert not same(one.state_dict(), built(own(config.model.target[:-4], train__seed=43)).state_dict())


@pytest.mark.parametrize("more", [{}, {"model__normalize_latents": True}, {"model__variational": True}])
def test_a_checkpoint_gives_the_model_back(module, tmp_path, more):
    """Also of a constructor that reads its numbers, and with buffers that no checkpoint has."""
    init = 'self.rates = [x.item() for x in torch.linspace(0, 1, 3)]; ' \
           'self.register_buffer("scale", torch.tensor(2.0), persistent=False)'
    encode = "z = self.scale * self.down(images); return " + (
        '{"latent": z, "mu": z, "logvar": z}' if "model__variational" in more else '{"latent": z}')
    config = own(module(net(encode, init=init)), **more)
    model = built(config).eval()
    if model.encoder.latent_normalizer is not None:
        model.encoder.latent_normalizer.set_statistics(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    path = tmp_path / "model.pt"
    save_checkpoint(path, checkpoint_content(config, data_shapes(small_dataset()), model, epoch=1, metrics={}))
    images = torch.rand(2, 3, 16, 16)
    loaded = load_model(path)
    assert not loaded.training and loaded.latent_shape == (2, 4, 4)
    assert torch.equal(loaded.encode(images)["latent"], model.encode(images)["latent"])
    assert {parameter.device.type for parameter in [*loaded.parameters(), *loaded.buffers()]} == {"cpu"}


def test_a_checkpoint_without_its_module_says_so(module, tmp_path, monkeypatch):
    name, path = module(PLAIN), tmp_path / "model.pt"
    config = own(name)
    save_checkpoint(path, checkpoint_content(config, data_shapes(small_dataset()), built(config), epoch=1, metrics={}))
    module(net(decode='return {"rgb": latent}'), name)
    another_process(monkeypatch, name)
    with pytest.raises(InputError, match=rf"^{path}: model.target: '{name}:Net': decode\(\) gives 'rgb' of shape"):
        load_model(path)
    (tmp_path / f"{name}.py").unlink()
    another_process(monkeypatch, name)
    with pytest.raises(InputError, match=rf"^{path}: model.target: '{name}:Net': there is no module {name} on Python"):
        load_model(path)


NOISY = PLAIN.replace('"rgb": self.up(latent).tanh()', '"rgb": (self.up(latent) + torch.rand(())).tanh()')


@pytest.mark.parametrize(("text", "more"), [
    (PLAIN, {"model__settings": {"rate": 0.5}}), (PLAIN, {"model__settings": {"rate": 0.5}, "train__ema": 0.9}),
    (NOISY, {}), (VAE, {"model__variational": True, "loss__kl": 1e-3, "model__latent": "sample"})],
    ids=["dropout", "average", "noise", "vae"])
def test_resuming_equals_going_on_bit_for_bit(module, tmp_path, text, more):
    config = own(module(text), train__epochs=3, **more)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    whole = run(config)
    assert torch.equal(torch.get_rng_state(), before)
    save_checkpoint(tmp_path / "latest.pt", whole[0][1])
    torch.manual_seed(77)
    rest = run(config, resume=read_checkpoint(tmp_path / "latest.pt"), history=[whole[0][0].metrics])
    assert [result.epoch for result, _ in rest] == [2, 3]
    for (left, left_state), (right, right_state) in zip(whole[1:], rest, strict=True):
        assert same(left.metrics, right.metrics) and same(left_state["model"], right_state["model"])
    other = run(own(config.model.target[:-4], train__epochs=1, train__seed=43, **more))
    assert other[0][0].metrics["val/mse"] != whole[0][0].metrics["val/mse"]


def test_randomness_of_ones_own_differs_from_step_to_step_and_is_still_in_evaluation(module):
    model = built(own(module(PLAIN), model__settings={"rate": 0.5}))
    images, generator = torch.rand(2, 3, 16, 16), torch.Generator().manual_seed(1)
    first, second = (model(images, generator)["raw_latent"] == 0 for _ in range(2))
    again = model(images, torch.Generator().manual_seed(1))["raw_latent"] == 0
    assert torch.equal(first, again) and not torch.equal(first, second)
    noisy = built(own(module(NOISY))).eval()
    latent = torch.zeros(1, 2, 4, 4)
    assert torch.equal(noisy.decode(latent)["rgb"], noisy.decode(latent)["rgb"])


def test_a_module_that_views_trains_where_others_are_laid_out_channels_last(module):
    """As at 64 px, where .view() of what a convolution gives would fail."""
    text = net('return {"latent": self.down(images).view(len(images), -1)}',
               'return {"rgb": self.up(latent.view(-1, 2, 16, 16))}')
    config = own(module(text), **{"data__image_size": 64, "train__epochs": 1})
    (result, _), = run(config, small_dataset(12, 64))
    assert result.metrics["latent_size"] == 512 and result.metrics["val/mse"] > 0


# Losses ---------------------------------------------------------------------------------------------------------------


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


def terms(name: str, **weights: float) -> dict[str, list]:
    return {"loss__custom": [{"target": f"{name}:{term}", "weight": weight} for term, weight in weights.items()]}


def test_terms_are_logged_raw_and_weighed_in_the_loss(module):
    name = module(LOSSES)
    (plain, _), = run(small_config(train__epochs=1))
    (found, _), = run(small_config(train__epochs=1, **terms(name, bright=0.5, small=0.25, number=0)))
    assert found.metrics.keys() - plain.metrics.keys() == {
        f"{split}/{term}" for split in ("train", "val") for term in ("bright", "small")}
    for split in ("train", "val"):
        total = sum(weight * found.metrics[f"{split}/{term}"]
                    for term, weight in {"mse": 1, "bright": 0.5, "small": 0.25}.items())
        assert found.metrics[f"{split}/loss"] == pytest.approx(total, rel=1e-5)
    assert found.metrics["val/mse"] != plain.metrics["val/mse"]
    (idle, _), = run(small_config(train__epochs=1, **terms(name, bright=0)))
    assert same({**idle.metrics}, {**plain.metrics})


def test_terms_see_what_a_model_of_ones_own_gives(module):
    name = module(VAE + "\n\ndef norm(outputs, batch):\n    return (outputs['size'] - outputs['mu'].norm()).square()"
                        ".mean()\n")
    config = own(name, model__variational=True, loss__kl=1e-3, train__epochs=1, **terms(name, norm=1e-3))
    (result, _), = run(config)
    assert result.metrics["train/norm"] > 0 and result.metrics["val/norm"] > 0


def test_terms_go_with_models_of_splats(module):
    config = small_config(data__source="splats", data__splats=32, model__kind="conv1d", model__latent_dim=4,
                          loss__mse=0.0, loss__splats=1.0, train__epochs=1, **terms(module(LOSSES), bright=0.5))
    (result, _), = run(config, small_dataset(splats=32))
    assert result.metrics["train/bright"] > 0 and result.metrics["val/bright"] > 0


@pytest.mark.parametrize(("term", "said"), [
    ("number", "returns a float, and should return a scalar tensor"),
    ("nothing", "returns None, and should return a scalar tensor"),
    ("each", r"returns a tensor of shape \(8,\) and torch.float32, and should return a scalar"),
    ("whole", r"returns a tensor of shape \(\) and torch.int64"),
    ("lacking", r"KeyError: 'depth' \(own_module_\d+.py, line 17\); outputs has rgb, latent, raw_latent, batch has "),
    ("Term", "is no function but a type"),
    ("absent", "there is no absent in"),
])
def test_a_term_that_is_none_is_told_at_the_first_step(module, term, said):
    name = module(LOSSES)
    with pytest.raises(InputError, match=f"^loss.custom: '{name}:{term}': {said}"):
        run(small_config(**terms(name, **{term: 1.0})))


def test_a_term_that_is_not_finite_is_a_divergence(module):
    with pytest.raises(Diverged, match=r"loss is not finite \(epoch 1, step 1\)"):
        run(small_config(**terms(module(LOSSES), nan=1.0)))


def test_names_that_are_taken_are_refused():
    for name in ("psnr", "grad_norm", "kl_free", "palette_classes", "mse"):
        with pytest.raises(InputError, match=f"loss.custom: .*{name}"):
            small_config(**terms("somewhere", **{name: 1.0}))
    assert set(losses_of(small_config())) == set(losses_of(small_config(**terms("somewhere", bright=0))))


# Identity -------------------------------------------------------------------------------------------------------------


SWEEP = {"config": {"data.image_size": 16, "model.downsampling_steps": 2}, "asha": False}


def sweep_of(name: str) -> dict:
    return {**SWEEP, "arms": {"conv2d": {}, "own": {"model.kind": "custom", "model.target": f"{name}:Net"},
                              "loss": {"loss.custom": [{"target": f"{name}:bright"}]}}}


def candidates(folder: Path, content: dict) -> list:
    spec = load(folder, content)
    return arm_candidates(spec, starting_point(spec, None))


def test_the_text_is_part_of_the_identity_of_what_uses_it(module, tmp_path, monkeypatch):
    name = module(PLAIN + "def bright(outputs, batch): pass\n")
    content = sweep_of(name)
    before = {candidate.name: candidate.config.identity() for candidate in candidates(tmp_path, content)}
    spec = load(tmp_path, content)
    winner = Winner("toy", {}, {"format": 1, "content_hash": spec.content_hash, "data": "d",
                                "content": json.loads(json.dumps(spec.content))})
    assert stale_reasons(spec, winner, None, "d") == []

    module(PLAIN + "def bright(outputs, batch): pass\n# a comment\n", name)
    assert load(tmp_path, content).content_hash == spec.content_hash         # as this process has read it
    another_process(monkeypatch)
    after = {candidate.name: candidate.config.identity() for candidate in candidates(tmp_path, content)}
    assert [before[arm] == after[arm] for arm in ("conv2d", "own", "loss")] == [True, False, False]
    digest = hashlib.sha256((tmp_path / f"{name}.py").read_bytes()).hexdigest()
    assert after["own"]["sources"] == {f"{name}:Net": digest}
    assert after["loss"]["sources"] == {f"{name}:bright": digest}
    assert stale_reasons(load(tmp_path, content), winner, None, "d") == [f"the source text of {name} changed"]
    flat = candidates(tmp_path, content)[1].config.flat()
    assert len({winner_hash(flat), winner_hash(flat, {"a": "1"}), winner_hash(flat, {"a": "2"})}) == 3


def test_a_sweep_tells_file_key_and_value_of_what_is_not_there(module, tmp_path):
    name = module("class Nut: pass\ndef bright(outputs, batch): pass\n")
    with pytest.raises(InputError) as error:
        candidates(tmp_path, sweep_of(name))
    assert str(error.value) == (f"{tmp_path}/toy.yaml: arms.own: model.target: '{name}:Net': there is no Net in "
                                f"{tmp_path}/{name}.py (did you mean 'Nut'?)")
    with pytest.raises(InputError, match=r"/toy.yaml: loss.custom: 'absent:bright': there is no module absent"):
        candidates(tmp_path, {**SWEEP, "config": {**SWEEP["config"], "loss.custom": [{"target": "absent:bright"}]}})
    assert "loss.custom.0.target is missing" in refused(
        tmp_path, {**SWEEP, "config": {"loss.custom": [{"weight": 1}]}})


def test_a_plan_imports_neither_torch_nor_the_module(module, tmp_path):
    name = module("raise RuntimeError('imported')\nclass Net: pass\ndef bright(outputs, batch): pass\n")
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({"name": "toy", **sweep_of(name)}), encoding="utf-8")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import tune_runner
assert tune_runner.main(["toy.yaml", "--dry-run", "--set", "data.limit=20"]) == 0
print(*({{"torch", "ray", {name!r}}} & set(sys.modules)), "nothing more")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "AUTOENC_CACHE": str(tmp_path / "cache")}, check=False)
    assert done.stdout.splitlines()[-1] == "nothing more", done.stdout + done.stderr
    assert f"model.target {name}:Net" in done.stdout


def test_workers_import_the_text_that_the_command_read(module, tmp_path, monkeypatch):
    """Whatever is in the file by then; also of a package, and with what it imports beside it."""
    module("", "cst_sent.__init__")
    module("word = 'beside'\n", "cst_sent.other")
    name = module("from cst_sent.other import word\nclass Net: text = 'first'\n", "cst_sent.models")
    another_process(monkeypatch)
    custom.source_digest(f"{name}:Net")
    sent = custom.for_workers()
    assert list(sent) == [name] and sent[name][1] == str(tmp_path)
    module("raise RuntimeError\n", name)
    code = f"""
from autoenc import custom
custom.arrive({sent!r})
custom.check_target("{name}:Net", "class")
found = custom.load_target("{name}:Net")
import inspect, sys
print(found.text, sys.modules["{name}"].word, custom.source_digest("{name}:Net"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60,
                          check=False)
    text = "from cst_sent.other import word\nclass Net: text = 'first'\n"
    assert done.stdout.split() == ["first", "beside", hashlib.sha256(text.encode()).hexdigest()], done.stderr
    with pytest.raises(InputError, match="has changed since this process read it"):
        custom.load_target(f"{name}:Net")


# From the commands ----------------------------------------------------------------------------------------------------


def command(folder: Path, *words: str, code: int = 0) -> str:
    """Runs a command in the folder; its output, both streams."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(folder), "AUTOENC_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    ray = tempfile.mkdtemp(prefix="ray", dir="/tmp")                      # paths of sockets may not be long
    try:
        done = subprocess.run([sys.executable, *words], cwd=folder, env={**env, "RAY_TMPDIR": ray},
                              capture_output=True, text=True, timeout=300, check=False)
    finally:
        shutil.rmtree(ray, ignore_errors=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def trained(output: Path) -> dict[str, int]:
    with (output / "trials.csv").open(encoding="utf-8") as file:
        return {row["arm"]: int(row["epochs_trained"]) for row in csv.DictReader(file)}


def test_a_training_that_cannot_be_leaves_nothing(module, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    name = module(net(decode='return {"rgb": latent}') + LOSSES)
    path, settings = tmp_path / "one.yaml", {"kind": "custom", "target": f"{name}:Net"}
    for content, said in (
            ({"model": settings}, rf"model.target: '{name}:Net': decode\(\) gives 'rgb' of shape \(2, 2, 4, 4\)"),
            ({"model": {**settings, "target": f"{name}:Nut"}}, rf"model.target: '{name}:Nut': there is no Nut in"),
            ({"loss": {"custom": [{"target": f"{name}:Term"}]}}, rf"loss.custom: '{name}:Term': .* is a class")):
        path.write_text(yaml.safe_dump({"data": {"image_size": 16, "limit": 20}, **content}))
        with pytest.raises(InputError, match=f"^{path}: {said}"):
            main([str(path), "--output", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


@pytest.fixture
def page(tmp_path) -> Path:
    """A folder with the files that docs/own-model.md shows."""
    text = (ROOT / "docs" / "own-model.md").read_text(encoding="utf-8")
    for name, content in re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        (tmp_path / Path(name).name).write_text(content, encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"mymodel.py", "own_model.yaml", "patches.yaml"}
    return tmp_path


@pytest.mark.slow
def test_the_example_of_the_page_alone(page):
    config = yaml.safe_load((page / "patches.yaml").read_text())
    config["config"]["data"]["limit"], config["config"]["train"] = 40, {"epochs": 2}
    (page / "patches.yaml").write_text(yaml.safe_dump(config))
    said = command(page, "-m", "autoenc.train", "patches.yaml", "--output", "runs/patches")
    assert "epoch   2/2" in said
    with (page / "runs/patches/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["train/edges"]) > 0 and float(rows[1]["val/edges"]) > 0
    command(page, "-m", "autoenc.evaluate", "runs/patches/best.pt", "--json", "found.json")
    best = min(rows, key=lambda row: float(row["val/mse"]))
    assert json.loads((page / "found.json").read_text())["val"]["edges"] == pytest.approx(float(best["val/edges"]))
    code = ("from autoenc import load_model; import torch\nm = load_model('runs/patches/best.pt')\n"
            "z = m.encode(torch.zeros(2, 3, 32, 32))['latent']\n"
            "print(type(m.module).__name__, *z.shape, *m.decode(z)['rgb'].shape)")
    assert command(page, "-c", code).split() == ["Patches", "2", "4", "4", "4", "2", "3", "32", "32"]
    (page / "mymodel.py").rename(page / "elsewhere.py")
    assert command(page, "-m", "autoenc.evaluate", "runs/patches/best.pt", code=2).startswith(
        "error: runs/patches/best.pt: model.target: 'mymodel:Patches': there is no module mymodel on Python's path")


@pytest.mark.slow
def test_the_example_of_the_page_as_a_sweep(page):
    runner = (str(ROOT / "tune_runner.py"), "own_model.yaml", "--output", "out", "--set", "data.limit=40", "--set",
              "train.epochs=2")
    command(page, *runner)
    assert trained(page / "out/own_model") == {"conv2d": 2, "patches": 2, "edges": 2}
    assert "nothing to train" in command(page, *runner)

    module = page / "mymodel.py"
    text = module.read_text()
    module.write_text(f"{text}\n# a comment\n")
    said = command(page, *runner)
    assert "runs because the source text of mymodel changed" in " ".join(said.split())
    assert trained(page / "out/own_model") == {"conv2d": 0, "patches": 2, "edges": 2}

    decided = (page / "out/own_model/decision.json").read_bytes()
    module.write_text(text.replace('"rgb": self.decoder(latent)', '"rgb": self.decoder(latent)[..., :16, :16]'))
    said = command(page, *runner, code=2)
    assert [line for line in said.splitlines() if "error" in line or "arms" in line] == [
        f"{start}own_model.yaml: arms.{arm}: model.target: 'mymodel:Patches': decode() gives 'rgb' of shape "
        "(2, 3, 16, 16) and torch.float32; it should be (2, 3, 32, 32), as the images, of floating point"
        for start, arm in (("error: ", "patches"), ("", "edges"))]
    assert (page / "out/own_model/decision.json").read_bytes() == decided

    module.write_text(text)                                        # taken back: the store has it
    command(page, *runner)
    assert trained(page / "out/own_model") == {"conv2d": 0, "patches": 0, "edges": 0}
