"""Losses of one's own."""

from __future__ import annotations

import pytest
from helpers import small_config, small_dataset
from owncode import LOSSES, VAE, own, run, same

from autoenc.errors import InputError
from autoenc.losses import losses_of
from autoenc.train import Diverged


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
