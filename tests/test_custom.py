"""Models of one's own: found, checked and trained."""

from __future__ import annotations

import hashlib
import re
import sys

import pytest
import torch
from helpers import small_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from owncode import HEAD, PLAIN, VAE, another_process, built, names, net, own, run, same

from autoenc import custom, load_model
from autoenc.checkpoint import build_model, checkpoint_content, data_shapes, read_checkpoint, save_checkpoint
from autoenc.config import make_config
from autoenc.errors import InputError
from autoenc.model import count_parameters

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
