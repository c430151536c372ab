"""Autoencoders of splats: conv1d and resnet1d."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import random_splats, small_config, small_dataset
from torch import Tensor, nn

from autoenc.checkpoint import build_model, checkpoint_content, data_shapes, load_model, save_checkpoint
from autoenc.config import Config, make_config
from autoenc.data import Dataset
from autoenc.data.splat_targets import LEAST_STD, TARGETS, longer_first
from autoenc.errors import InputError
from autoenc.model import count_parameters, draw, make_model
from autoenc.model.base import BatchNorm
from autoenc.model.splats import SplatAutoencoder, dropout
from autoenc.render import render
from autoenc.train import train

torch.set_num_threads(1)

COUNT = 32
KINDS = ("conv1d", "resnet1d")
NO_DROPOUT = {"model__dropout_rates": [0.0, 0.0]}


def config(kind: str = "conv1d", **settings) -> Config:
    small = {"data__source": "splats", "data__splats": COUNT, "model__kind": kind, "model__latent_dim": 6,
             "model__encoder_filters": [8, 16], "model__decoder_filters": [16, 8], "model__dropout_rates": [0.1, 0.3],
             "model__base_channels": 4, "loss__mse": 0.0, "loss__splats": 1.0}
    return small_config(**{**small, **settings})


def build(kind: str = "conv1d", seed: int = 1, **settings) -> SplatAutoencoder:
    return make_model(config(kind, **settings), {"classes": [], "labels": []}, seed=seed).eval()


def batch(items: int = 4, count: int = COUNT) -> Tensor:
    return torch.from_numpy(random_splats(items, count, np.random.default_rng(5)))


def dataset(items: int = 30) -> Dataset:
    return small_dataset(items, splats=COUNT)


def noise(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(outputs: dict[str, Tensor]) -> Tensor:
    return (outputs["columns"] - outputs["target"]).square().mean()


# Shapes and layers ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, pool, target, variational, normalize", [
    *itertools.product(KINDS, ("mean", "none"), ("raw", "canonical", "logcov"), (False, True), (False,)),
    *itertools.product(KINDS, ("none",), ("canonical",), (False, True), (True,))])
def test_shapes_follow_the_configuration(kind, pool, target, variational, normalize):
    model = build(kind, model__pool=pool, model__splat_target=target, model__variational=variational,
                  model__normalize_latents=normalize)
    assert model.latent_shape == (6,) and model.latent_size == 6 and model.takes == model.gives == "splats"
    encoded = model.encode(batch())
    assert {name: tuple(value.shape) for name, value in encoded.items()} == dict.fromkeys(
        ("latent", "mu", "logvar") if variational else ("latent",), (4, 6))
    decoded = model.decode(encoded["latent"])
    assert {name: tuple(value.shape) for name, value in decoded.items()} == {
        "splats": (4, COUNT, 8), "rgb": (4, 3, 16, 16)}
    columns = len(TARGETS[target].columns)
    outputs = model(batch())
    assert set(outputs) == {"columns", "target", "raw_latent", *encoded}
    assert outputs["columns"].shape == outputs["target"].shape == (4, COUNT, columns)
    assert all(value.isfinite().all() and value.dtype == torch.float32
               for value in (*encoded.values(), *decoded.values(), *outputs.values()))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_layers_of_conv1d_are_those_described(norm):
    model = build(model__norm=norm)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convolutions] == [
        (8, 8, 5), (8, 16, 5), (16, 16, 5), (16, 8, 5), (8, 8, 1)]
    norms = [m for m in model.modules() if isinstance(m, (nn.GroupNorm, BatchNorm))]
    assert len(norms) == 4 + 2 + 1                     # of convolutions, dense layers, the decoder's start
    assert {type(m) for m in norms} == {BatchNorm if norm == "batch" else nn.GroupNorm}
    assert nn.ELU not in map(type, model.modules())


def test_layers_of_resnet1d_are_those_described():
    model = build("resnet1d", model__base_channels=6)
    assert model.config.splat_filters == ((6, 12, 24, 24, 24), (24, 24, 24, 12, 6))
    levels = [*model.encoder.levels, *model.decoder.levels]
    assert [type(level.shortcut) for level in levels] == [nn.Conv1d] * 3 + [nn.Identity] * 2 + [nn.Conv1d] + [
        nn.Identity] * 2 + [nn.Conv1d] * 2
    assert nn.ReLU not in map(type, model.modules())
    block, features = model.encoder.levels[3], torch.randn(2, 24, 4, generator=noise())
    with torch.no_grad():                                               # where the body gives 0, the shortcut remains
        block.body[-1].weight.zero_(), block.body[-1].bias.zero_()
    assert torch.equal(block(features), nn.functional.elu(features))


@pytest.mark.parametrize("latent, variational, pool, parameters", [
    (256, True, "mean", 1_589_688), (256, False, "mean", 1_458_360), (512, True, "mean", 1_983_416),
    (256, True, "none", 5_718_456)])
def test_parameters_are_as_many_as_the_source_has(latent, variational, pool, parameters):
    """About 1.6 million in all: 384 thousand of the encoder, 1.21 million of the decoder."""
    model = make_model(make_config({
        "data.source": "splats", "model.kind": "conv1d", "model.latent_dim": latent, "model.variational": variational,
        "model.pool": pool}, "test"), {"classes": [], "labels": []}, seed=1)
    assert count_parameters(model) == parameters
    if (latent, variational, pool) == (256, True, "mean"):
        assert [round(sum(p.numel() for p in part.parameters()), -3) for part in (model.encoder, model.decoder)] == [
            383_000, 1_207_000]


@pytest.mark.parametrize("kind, count", [("conv1d", 8), ("conv1d", 40), ("resnet1d", 64)])
def test_any_number_of_splats_that_the_levels_divide(kind, count):
    model = build(kind, data__splats=count, model__encoder_filters=[3], model__dropout_rates=[0.0],
                  model__pool="none", model__decoder_filters=[5, 4, 3], model__norm="batch")
    given = batch(2, count)
    assert model.decode(model.encode(given)["latent"])["splats"].shape == (2, count, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind):
    for settings in ({"model__variational": True, "model__pool": "none"}, {"model__norm": "batch"}):
        model = build(kind, model__splat_target="canonical", **settings).train()
        error(model(batch(8), noise())).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        idle = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
        assert not idle


# What the latent sees of the order -----------------------------------------------------------------------------------

def blocks_swapped(given: Tensor, length: int) -> Tensor:
    """The sequence with its first two blocks of so many splats exchanged."""
    return torch.cat((given[:, length:2 * length], given[:, :length], given[:, 2 * length:]), 1)


def without_neighbours(pool: str) -> SplatAutoencoder:
    """A model whose convolutions see one splat each, and whose statistics are of no sequence."""
    model = build(model__pool=pool, model__norm="batch", **NO_DROPOUT)
    with torch.no_grad():
        for level in model.encoder.levels:
            level[0].weight[..., [0, 1, 3, 4]] = 0
    return model


def test_mean_pooling_forgets_where_and_flattening_does_not():
    """Blocks as long as the pooling is, exchanged, permute what a mean is taken over."""
    for pool in ("mean", "none"):
        model = without_neighbours(pool)
        before, after = (model.encode(given)["latent"] for given in (batch(), blocks_swapped(batch(), 4)))
        assert torch.allclose(before, after, atol=1e-6) == (pool == "mean")


def test_mean_pooling_is_a_mean():
    """Of two sequences one after the other, the average of what each gives; of one twice over, the same."""
    model, seen = without_neighbours("mean"), []
    model.encoder.dense.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    first, second = batch().chunk(2)
    for given in (first, second, torch.cat((first, second), 1)):
        model.encoder(given)
    assert seen[0].shape == (2, 16) and torch.allclose((seen[0] + seen[1]) / 2, seen[2], atol=1e-6)
    assert torch.allclose(*(model.encoder(given)[0] for given in (first, first.repeat(1, 2, 1))), atol=1e-6)


# What is random -------------------------------------------------------------------------------------------------------

def test_dropout_is_as_described():
    features = torch.full((200, 1000), 2.0)
    dropped = dropout(features, 0.25, noise())
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.allclose(dropped[dropped != 0], torch.tensor(2 / 0.75))
    assert torch.equal(dropped, dropout(features, 0.25, noise()))
    half = dropout(features.bfloat16(), 0.25, noise())
    assert half.dtype == torch.bfloat16 and torch.equal(half == 0, dropped == 0)


@pytest.mark.parametrize("variational", [False, True])
def test_what_is_random_comes_from_the_generator(variational):
    model = build(model__variational=variational).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (model(batch(), noise(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["target"], other["target"]) and not torch.equal(first["raw_latent"], other["raw_latent"])
    build(seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_dropped_in_eval_mode_nor_by_resnet1d():
    model = build()
    assert torch.equal(model(batch(), noise(1))["columns"], model(batch(), noise(2))["columns"])
    assert torch.equal(model(batch())["latent"], model.encode(batch())["latent"])
    model = build("resnet1d").train()
    assert torch.equal(model(batch(), noise(1))["columns"], model(batch(), noise(2))["columns"])


def test_a_vae_decodes_a_draw_and_bounds_its_logvar():
    model = build(model__variational=True, model__latent="sample")
    encoded, outputs = model.encode(batch(), noise()), model(batch(), noise())
    assert torch.equal(encoded["latent"], draw(encoded["mu"], encoded["logvar"], noise()))
    assert torch.equal(outputs["latent"], encoded["latent"])
    with torch.no_grad():
        model.encoder.logvar.bias.copy_(torch.tensor([1e6, -1e6] * 3))
    logvar = model.encode(batch())["logvar"]
    assert logvar[:, ::2].unique().tolist() == [20] and logvar[:, 1::2].unique().tolist() == [-30]


@pytest.mark.parametrize("settings, differ", [
    ({"model__variational": True}, set()), ({"model__normalize_latents": True}, set()),
    ({"model__norm": "batch"}, set()), ({"model__pool": "none"}, {"encoder.dense"}),
    ({"model__latent_dim": 7}, {"encoder.mean", "decoder.dense"}),
    ({"model__splat_target": "canonical"}, {"encoder.levels.0", "decoder.last"})])
def test_parts_start_the_same_whatever_else_there_is(settings, differ):
    plain, other = build().state_dict(), build(**settings).state_dict()
    weights = [name for name in plain if name in other and "columns" not in name]
    different = [name for name in weights if not torch.equal(plain[name], other[name])]
    assert {part for part in differ if any(name.startswith(part) for name in different)} == differ
    assert not [name for name in different if not name.startswith(tuple(differ))]


def test_seeds():
    one, same, other = (build(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    for part in ("encoder.levels.0.0", "encoder.dense.0", "encoder.mean", "decoder.dense.0", "decoder.last"):
        assert not torch.equal(one[f"{part}.weight"], other[f"{part}.weight"])
    twins = build("resnet1d").encoder.levels[3:]                      # of equal shape
    assert not torch.equal(*(level.body[0].weight for level in twins))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_start_as_they_should(kind):
    model = build(kind, model__init="xavier", model__encoder_filters=[16, 32], model__base_channels=16)
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Linear))]
    for layer in layers:
        receptive = layer.weight[0, 0].numel()
        variance = 2 / (receptive * (layer.weight.shape[0] + layer.weight.shape[1]))
        assert layer.weight.var().item() == pytest.approx(variance, rel=6 / layer.weight.numel() ** 0.5)
        assert not layer.bias.any()


# Normalisation --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("target", TARGETS)
def test_columns_are_normalised_over_the_training_split(target):
    data = dataset(500)                                              # 350 to train on: two chunks
    model = build_model(config(model__splat_target=target), data)
    train = torch.from_numpy(data.splats[data.splits["train"]])
    columns = model.columns(train)
    assert columns.mean((0, 1)).abs().max() < 1e-5
    assert (columns.std((0, 1), correction=0) - 1).abs().max() < 1e-5
    expected = TARGETS[target].encode(train).flatten(0, 1)
    assert torch.allclose(model.column_mean, expected.mean(0), atol=1e-5)
    assert torch.allclose(model.column_std, expected.std(0, correction=0), atol=1e-5)
    assert torch.equal(model.decoder.columns.mean, model.column_mean)


@pytest.mark.parametrize("target", TARGETS)
def test_columns_and_back_are_the_same_splats(target):
    model = build_model(config(model__splat_target=target), dataset())
    back = model.decoder.columns.inverse(model.columns(batch()))
    assert torch.allclose(render(back, 16), render(batch(), 16), atol=1e-3)


def test_a_constant_column_does_not_blow_up():
    data = dataset()
    data.splats[..., 7] = 0.25
    model = build_model(config(), data)
    assert model.column_std[7] == pytest.approx(LEAST_STD)
    assert model.columns(torch.from_numpy(data.splats))[..., 7].abs().max() < 1e-3


def test_mean_splats_of_the_training_split():
    data = dataset(500)
    model = build_model(config(), data)
    train = longer_first(torch.from_numpy(data.splats[data.splits["train"]]).double())
    plain = [0, 1, 2, 3, 5, 6, 7]
    assert model.mean.shape == (8,) and model.position_mean.shape == (COUNT, 8)
    assert torch.allclose(model.mean[plain].double(), train.mean((0, 1))[plain], atol=1e-5)
    assert torch.allclose(model.position_mean[:, plain].double(), train.mean(0)[:, plain], atol=1e-5)
    anisotropy = (train[..., 2] - train[..., 3]) / (train[..., 2] + train[..., 3])
    vectors = torch.polar(anisotropy, 2 * train[..., 4])
    for found, mean in ((model.mean[4], vectors.mean()), (model.position_mean[:, 4], vectors.mean(0))):
        assert torch.allclose(found.double(), mean.angle().div(2).remainder(math.pi), atol=1e-4)


def test_angles_on_either_side_of_zero_have_a_mean_near_zero():
    data = dataset()
    data.splats[..., 2], data.splats[..., 3] = 0.2, 0.1
    data.splats[::2, :, 4], data.splats[1::2, :, 4] = 0.1, math.pi - 0.1
    model = build_model(config(), data)
    rows = data.splits["train"]
    share = (rows % 2 == 0).mean()                     # of angles 0.1, the others are -0.1
    expected = math.atan2((2 * share - 1) * math.sin(0.2), math.cos(0.2)) / 2 % math.pi
    assert model.mean[4].item() == pytest.approx(expected, abs=1e-4)


def test_a_model_that_was_never_fitted_takes_columns_as_they_are():
    model = build()
    assert torch.equal(model.columns(batch()), batch())
    assert not model.mean.any() and not model.position_mean.any()


# Decoding -------------------------------------------------------------------------------------------------------------

def test_only_what_is_asked_for_is_decoded():
    model = build_model(config(model__splat_target="logcov"), dataset()).eval()
    latent = model.encode(batch())["latent"]
    everything = model.decode(latent, ("columns", "splats", "rgb"))
    assert set(model.decode(latent)) == {"splats", "rgb"}
    for name, value in everything.items():
        alone = model.decode(latent, (name,))
        assert set(alone) == {name} and torch.equal(alone[name], value)
    assert torch.equal(everything["splats"], model.decoder.columns.inverse(everything["columns"]))
    assert torch.equal(everything["rgb"], render(everything["splats"], 16).clamp(-1, 1))
    assert everything["splats"][..., 2:4].min() > 0


@pytest.mark.parametrize("settings, trained", [({}, {"columns"}), ({"loss__mse": 0.1}, {"columns", "rgb"}),
                                               ({"loss__l1": 0.1}, {"columns", "rgb"}),
                                               ({"loss__custom": [{"target": "own:term"}]}, {"columns", "rgb"})])
def test_images_are_rendered_where_a_loss_is_over_them(settings, trained):
    model = build(**settings).train()
    outputs = model(batch(), noise())
    assert set(outputs) == {*trained, "target", "latent", "raw_latent"}
    if "rgb" in trained:
        outputs["rgb"].square().mean().backward()
        assert model.decoder.last.weight.grad.any()


def test_colours_beyond_the_range_are_clamped_where_they_are_seen():
    model = build()
    with torch.no_grad():
        model.decoder.last.bias[5:] = torch.tensor([9.0, -9.0, 0.0])
        model.decoder.last.bias[2:4] = 1.0
    decoded = model.decode(model.encode(batch())["latent"])
    assert decoded["splats"][..., 5].min() > 1
    assert decoded["rgb"].abs().max() == 1 and (decoded["rgb"][:, 0] == 1).all()


def test_normalising_latents_and_back():
    model, plain = build(model__normalize_latents=True), build()
    raw = plain.encode(batch())["latent"]
    model.encoder.latent_normalizer.set_statistics(raw.mean(0), raw.std(0, correction=0))
    encoded = model.encode(batch())
    assert encoded["latent"].mean(0).abs().max() < 1e-4
    assert (encoded["latent"].std(0, correction=0) - 1).abs().max() < 1e-3
    assert torch.allclose(model.raw_latent(encoded), raw, atol=1e-5)
    assert torch.allclose(model.decode(encoded["latent"], ("columns",))["columns"],
                          plain.decode(raw, ("columns",))["columns"], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_looks_at_a_value(kind):
    """On the meta device there are none; on a GPU a look at one would wait for it."""
    with torch.device("meta"):
        model = make_model(config(kind, model__variational=True, model__splat_target="canonical",
                                  model__normalize_latents=True, model__normalizer="running"),
                           {"classes": [], "labels": []}, seed=0).train()
        outputs = model(torch.empty(4, COUNT, 8))
        splats = model.decode(outputs["latent"], ("splats",))["splats"]
    assert splats.shape == (4, COUNT, 8) and splats.device.type == "meta"


def test_half_precision_ends_where_the_latent_begins():
    model = build(model__variational=True, loss__mse=1.0).train()
    full = model(batch(), noise())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(batch(), noise())
    assert all(value.dtype == torch.float32 for value in half.values())
    assert torch.equal(half["target"], full["target"])
    assert torch.allclose(half["mu"], full["mu"], atol=0.1) and not torch.equal(half["mu"], full["mu"])


# Batch normalisation --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_is_taken_by_running_statistics(kind):
    model = build(kind, model__norm="batch", **NO_DROPOUT).train()
    model(batch())
    before = {name: value.clone() for name, value in model.named_buffers()}
    one = model(batch(1))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    error(one).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert torch.allclose(one["columns"], model.eval()(batch(1))["columns"], atol=1e-6)


def test_batch_statistics_while_training_and_running_ones_otherwise():
    model = build(model__norm="batch", **NO_DROPOUT).train()
    whole = model(batch(6))["columns"]
    assert not torch.allclose(model(batch(6)[:3])["columns"], whole[:3], atol=1e-3)
    model.eval()
    assert torch.allclose(model(batch(6)[:3])["columns"], model(batch(6))["columns"][:3], atol=1e-5)


# Checkpoints and training ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, settings", [
    ("conv1d", {}), ("conv1d", {"model__norm": "batch", "model__pool": "none", "model__splat_target": "canonical"}),
    ("resnet1d", {"model__variational": True, "model__splat_target": "logcov"}),
    ("resnet1d", {"model__normalize_latents": True, "model__normalizer": "learned"})])
def test_a_checkpoint_gives_the_model_back(tmp_path, kind, settings):
    data = dataset()
    model = build_model(config(kind, **settings), data)
    model.train()(batch(), noise())                                  # moves running statistics
    content = checkpoint_content(model.config, data_shapes(data), model, epoch=1, metrics={})
    save_checkpoint(tmp_path / "model.pt", content)
    loaded = load_model(tmp_path / "model.pt")
    assert not loaded.training and loaded.config == model.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.column_mean.any() and loaded.position_mean.any()
    encoded = model.eval().encode(batch())["latent"]
    assert torch.equal(loaded.encode(batch())["latent"], encoded)
    assert all(torch.equal(value, loaded.decode(encoded)[name]) for name, value in model.decode(encoded).items())


def test_the_state_can_be_kept_without_pickle():
    from safetensors.torch import load, save

    state = build_model(config(model__norm="batch"), dataset()).state_dict()
    assert {name: value.shape for name, value in load(save(state)).items()} == {
        name: value.shape for name, value in state.items()}


def trained(model: SplatAutoencoder, optimizer: torch.optim.Optimizer, given: Tensor, steps: range) -> list[float]:
    errors = []
    model.train()
    for step in steps:
        loss = error(model(given, noise(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    return errors


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_equals_an_uninterrupted_one(kind):
    def start() -> tuple[SplatAutoencoder, torch.optim.Optimizer]:
        model = build_model(config(kind, model__norm="batch", model__variational=True), dataset())
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    straight, optimizer = start()
    errors = trained(straight, optimizer, batch(), range(6))
    first, optimizer = start()
    before = trained(first, optimizer, batch(), range(3))
    content = checkpoint_content(first.config, data_shapes(dataset()), first, epoch=1, metrics={},
                                 optimizer=optimizer.state_dict())
    trained(first, optimizer, batch(), range(3, 5))                  # does not change what was kept
    second, optimizer = start()
    second.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    assert before + trained(second, optimizer, batch(), range(3, 6)) == errors
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in straight.state_dict().items())


@pytest.mark.parametrize("kind, pool", [("conv1d", "mean"), ("conv1d", "none"), ("resnet1d", "mean")])
def test_a_few_sets_of_splats_are_learnt(kind, pool):
    model = build_model(config(kind, model__pool=pool, model__norm="batch", model__splat_target="canonical",
                               model__decoder_filters=[32, 32], model__base_channels=16, **NO_DROPOUT), dataset())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    errors = trained(model, optimizer, batch(), range(70))
    assert errors[-1] < errors[0] / 10, (errors[0], errors[-1])


def test_a_checkpoint_with_the_statistics_of_other_data_is_not_trained_on():
    settings = config("conv1d", train__epochs=2)
    state = next(train(settings, dataset())).state()
    assert len(list(train(settings, dataset(), resume=state))) == 1
    other = small_dataset(12, splats=COUNT, seed=7)
    with pytest.raises(InputError, match="statistics of other data"):
        train(settings, other, resume=state)
