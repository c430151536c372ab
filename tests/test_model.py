from __future__ import annotations

import itertools

import pytest
import torch
from helpers import small_config
from torch import nn

from autoenc.errors import InputError
from autoenc.model import Autoencoder, count_parameters, derived_seed, draw, level_channels
from autoenc.model.base import BatchNorm
from autoenc.model.conv2d import ConvAutoencoder

torch.set_num_threads(1)


def build(seed: int = 1, *, classes: int = 4, labels: int = 3, **settings) -> Autoencoder:
    return ConvAutoencoder(small_config(**settings), classes=classes, labels=labels, seed=seed)


def images(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("steps, base, variational", list(itertools.product((1, 2, 4), (3, 8), (False, True))))
def test_shapes_follow_the_configuration(steps, base, variational):
    model = build(model__downsampling_steps=steps, model__base_channels=base, model__variational=variational,
                  model__latent_channels=5, model__heads=["rgb", "segmentation", "classification"])
    encoded = model.encode(images())
    assert encoded["latent"].shape == (2, 5, 16 // 2**steps, 16 // 2**steps)
    assert encoded["latent"][0].numel() == model.latent_size
    assert set(encoded) == ({"latent", "mu", "logvar"} if variational else {"latent"})
    decoded = model.decode(encoded["latent"])
    assert {name: tuple(out.shape) for name, out in decoded.items()} == {
        "rgb": (2, 3, 16, 16), "segmentation": (2, 4, 16, 16), "classification": (2, 3)}
    assert decoded["rgb"].abs().max() <= 1
    assert set(model(images())) == {*decoded, *encoded, "raw_latent"}


def test_layers_are_those_described():
    model = build(model__base_channels=12, model__downsampling_steps=3)
    channels = level_channels(model.config.model)
    assert channels == [12, 24, 48]
    down = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert [(m.in_channels, m.out_channels, m.kernel_size) for m in down] == [(c, c, (4, 4)) for c in channels]
    up = [m for m in model.decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels) for m in up] == [(48, 24), (24, 12), (12, 12)]
    groups = {m.num_channels: m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {12: 4, 24: 8, 48: 8}


def test_vae_latent_is_the_mean_or_a_seeded_draw():
    x = images()
    mean = build(model__variational=True)
    assert torch.equal(mean.encode(x)["latent"], mean.encode(x)["mu"])
    sample = build(model__variational=True, model__latent="sample")
    first, again, other = (sample.encode(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["latent"], again["latent"]) and torch.equal(first["mu"], other["mu"])
    assert not torch.equal(first["latent"], other["latent"])
    trained = mean(x, torch.Generator().manual_seed(1))
    assert torch.equal(trained["latent"], first["latent"])          # training decodes a draw in either case
    assert torch.equal(trained["rgb"], mean.decode(trained["latent"])["rgb"])


def test_draw_has_the_posterior_moments():
    mu, logvar = torch.full((200_000,), 3.0), torch.full((200_000,), 2.0).log() * 2
    drawn = draw(mu, logvar, torch.Generator().manual_seed(0))
    assert drawn.mean().item() == pytest.approx(3, abs=0.03)
    assert drawn.std().item() == pytest.approx(2, rel=0.02)


def test_logvar_is_clamped():
    model = build(model__variational=True)
    with torch.no_grad():
        model.encoder.logvar.bias.copy_(torch.tensor([1e6, -1e6]))
    outputs = model(images())
    logvar = outputs["logvar"]
    assert logvar[:, 0].unique().tolist() == [20] and logvar[:, 1].unique().tolist() == [-30]
    assert all(value.isfinite().all() for value in outputs.values())


def test_a_head_changes_no_other_weight():
    alone = build().state_dict()
    with_heads = build(loss__segmentation=0.1, loss__classification=0.1).state_dict()
    assert {name.split(".")[2] for name in set(with_heads) - set(alone)} == {"segmentation", "classification"}
    assert all(torch.equal(with_heads[name], weight) for name, weight in alone.items())


def test_seeds():
    one, same, other = build(1).state_dict(), build(1).state_dict(), build(2).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["encoder.mean.weight"], other["encoder.mean.weight"])
    assert not torch.equal(one["decoder.heads.rgb.0.bias"], other["decoder.heads.rgb.0.bias"])
    assert len({derived_seed(1, "order", 12), derived_seed(1, "order1", 2), derived_seed(11, "order", 2)}) == 3


def test_global_random_state_is_untouched():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = build(model__variational=True, loss__classification=0.1)
    model(images(), torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_count_encoder_and_rgb_decoder():
    plain = build()
    assert count_parameters(plain) == sum(p.numel() for p in plain.parameters())
    assert count_parameters(build(loss__segmentation=0.1, loss__classification=0.1)) == count_parameters(plain)
    assert count_parameters(build(model__variational=True)) == count_parameters(plain) + 16 * 2 + 2


def test_classification_sees_nothing_but_the_latent():
    model = build(loss__classification=0.1)
    encoded = model.encode(images())["latent"]
    assert torch.equal(model.decode(encoded)["classification"], model(images())["classification"])
    assert set(model.decode(encoded, heads=("classification",))) == {"classification"}


@pytest.mark.parametrize("settings, classes, labels, said", [
    ({"loss__segmentation": 0.05}, 0, 3, ["loss.segmentation: 0.05", "loss.segmentation=0", "data.palette"]),
    ({"loss__classification": 0.01}, 4, 1, ["loss.classification: 0.01", "loss.classification=0", "has 1"]),
    ({"model__heads": ["rgb", "segmentation"]}, 0, 3, ["model.heads", "'segmentation' left out of model.heads"]),
    ({"train__monitor": "val/palette_miou"}, 0, 0, ["train.monitor: 'val/palette_miou'", "data.palette"]),
    ({"train__monitor": "val/kl_nats"}, 4, 3, ["model.variational"]),
    ({"train__monitor": "val/segmentation_ce"}, 4, 3, ["the segmentation head"]),
    ({"loss__segmentation": 0.1, "loss__classification": 0.2}, 0, 0, ["loss.segmentation", "loss.classification"]),
])
def test_what_the_data_cannot_serve_is_refused(settings, classes, labels, said):
    with pytest.raises(InputError) as caught:
        build(classes=classes, labels=labels, **settings)
    assert all(part in str(caught.value) for part in said), str(caught.value)


# Normalisation and initialisation of the layers ----------------------------------------------------------------------

def test_batch_normalisation_takes_the_place_of_group_normalisation():
    model = build(model__norm="batch", model__variational=True)
    kinds = [type(module) for module in model.modules()]
    assert nn.GroupNorm not in kinds
    group = [type(module) for module in build(model__variational=True).modules()]
    assert kinds.count(BatchNorm) == group.count(nn.GroupNorm) > 0
    assert count_parameters(model) == count_parameters(build(model__variational=True))


def test_batch_statistics_while_training_and_running_ones_otherwise():
    model = build(model__norm="batch").train()
    x = images(6)
    whole = model(x)["rgb"]
    assert not torch.allclose(model(x[:3])["rgb"], whole[:3], atol=1e-3)         # of other statistics
    reference = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert all(module.num_batches_tracked == 2 for module in reference)
    model.eval()
    assert torch.allclose(model(x[:3])["rgb"], model(x)["rgb"][:3], atol=1e-5)
    assert all(module.num_batches_tracked == 2 for module in reference)


@pytest.mark.parametrize("steps", [2, 4])                 # with 4, the deepest level has one pixel, where torch raises
def test_a_batch_of_one_image_is_taken_by_running_statistics(steps):
    model = build(model__norm="batch", model__downsampling_steps=steps).train()
    model(images(4))
    before = {name: value.clone() for name, value in model.named_buffers()}
    one = model(images(1))["rgb"]
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    one.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert torch.allclose(one, model.eval()(images(1))["rgb"], atol=1e-6)


@pytest.mark.parametrize("init", ["xavier", "kaiming"])
def test_weights_start_as_they_should(init):
    model = build(model__init=init, model__base_channels=32, loss__classification=0.1)
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    assert len(layers) > 10
    for layer in layers:
        receptive = layer.weight[0, 0].numel()
        inside, outside = layer.weight.shape[1] * receptive, layer.weight.shape[0] * receptive
        variance = 2 / (inside + outside) if init == "xavier" else 2 / inside
        assert layer.weight.var().item() == pytest.approx(variance, rel=6 / layer.weight.numel() ** 0.5)
        assert not layer.bias.any()
    assert all((norm.weight == 1).all() for norm in model.modules() if isinstance(norm, nn.GroupNorm))


def test_an_initialisation_is_seeded_for_each_part():
    alone, again = build(model__init="xavier"), build(model__init="xavier")
    with_heads = build(model__init="xavier", loss__segmentation=0.1).state_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in alone.state_dict().items())
    assert all(torch.equal(value, with_heads[name]) for name, value in alone.state_dict().items())
    assert not torch.equal(alone.state_dict()["encoder.mean.weight"], build().state_dict()["encoder.mean.weight"])


# Latent normaliser ----------------------------------------------------------------------------------------------------

def test_normalising_and_back():
    model = build(model__normalize_latents=True)
    plain = build()
    normalizer = model.encoder.latent_normalizer
    assert normalizer.shift.shape == normalizer.log_scale.shape == (1, 2, 1, 1)
    raw = plain.encode(images())["latent"]
    assert torch.equal(model.encode(images())["latent"], raw)                  # the identity, until it is set
    normalizer.set_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3), correction=0))
    latent = model.encode(images())["latent"]
    assert latent.mean((0, 2, 3)).abs().max() < 1e-4 and (latent.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    assert torch.allclose(model.raw_latent({"latent": latent}), raw, atol=1e-5)
    assert torch.allclose(model.decode(latent)["rgb"], plain.decode(raw)["rgb"], atol=1e-5)


def test_a_dead_channel_stays_quiet():
    model = build(model__normalize_latents=True)
    model.encoder.latent_normalizer.set_statistics(torch.zeros(2), torch.tensor([0.0, 1e9]))
    assert model.encode(images())["latent"].isfinite().all()
    assert model.encoder.latent_normalizer.log_scale.exp().flatten().tolist() == pytest.approx([1e-5, 1e5])


def test_running_statistics_start_from_the_first_batch_and_follow():
    model = build(model__normalize_latents=True, model__normalizer="running").train()
    raw = model(images())["raw_latent"]
    normalizer = model.encoder.latent_normalizer
    assert torch.allclose(normalizer.shift.flatten(), raw.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(normalizer.log_scale.exp().flatten(), raw.std((0, 2, 3), correction=0), rtol=1e-4)
    before = normalizer.shift.clone()
    other = model(-images())["raw_latent"].mean((0, 2, 3), keepdim=True)
    assert torch.allclose(normalizer.shift, 0.9 * before + 0.1 * other, atol=1e-6)
    after = normalizer.shift.clone()
    model.eval()(images())
    assert torch.equal(normalizer.shift, after)


def test_a_learned_normaliser_gets_no_gradient_to_speak_of():
    """Normalising and its inverse cancel, whatever shift and scale are."""
    model = build(model__normalize_latents=True, model__normalizer="learned").train()
    (model(images())["rgb"] - images()).square().mean().backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    learned = {name: norm for name, norm in norms.items() if "latent_normalizer" in name}
    assert len(learned) == 2 and max(learned.values()) < 1e-4 * norms["encoder.mean.weight"]


def test_only_the_learned_normaliser_has_parameters():
    plain = dict(build().named_parameters())
    for mode in ("exact", "running", "loss"):
        made = build(model__normalize_latents=True, model__normalizer=mode)
        assert dict(made.named_parameters()).keys() == plain.keys()
        assert all(torch.equal(made.state_dict()[name], value) for name, value in plain.items())


def test_a_vae_normalises_what_it_returns_and_keeps_its_posterior_raw():
    for latent in ("mean", "sample"):
        model = build(model__normalize_latents=True, model__variational=True, model__latent=latent)
        model.encoder.latent_normalizer.set_statistics(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        encoded = model.encode(images(), torch.Generator().manual_seed(1))
        shift, scale = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
        raw = draw(encoded["mu"], encoded["logvar"], torch.Generator().manual_seed(1)) if latent == "sample" \
            else encoded["mu"]
        assert torch.allclose(encoded["latent"], (raw - shift) / scale, atol=1e-6)
        assert torch.allclose(model.mean_latent(encoded), (encoded["mu"] - shift) / scale, atol=1e-6)
