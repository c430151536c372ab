from __future__ import annotations

import pickle
import stat

import pytest
import torch
from helpers import PALETTE, small_config, small_dataset

from autoenc import load_model
from autoenc.checkpoint import model_checkpoint, read_checkpoint, save_checkpoint
from autoenc.errors import InputError
from autoenc.metrics import to_unit
from autoenc.train import train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained():
    config = small_config(train__epochs=1, loss__segmentation=0.1, loss__classification=0.1, model__variational=True)
    return next(train(config, small_dataset()))


@pytest.mark.parametrize("kept", ["latest", "best"])
def test_saved_model_decodes_the_same(tmp_path, trained, kept):
    content = trained.state() if kept == "latest" else model_checkpoint(trained.state())
    save_checkpoint(tmp_path / "model.pt", content)
    read = read_checkpoint(tmp_path / "model.pt")
    assert ("optimizer" in read, "scaler" in read) == (kept == "latest",) * 2
    assert read["epoch"] == 1 and read["metrics"] == trained.metrics
    assert read["shapes"] == {"classes": ["red", "green", "blue", "white"], "labels": ["a", "b", "c"],
                              "palette": PALETTE.tolist()}
    model = load_model(tmp_path / "model.pt")
    assert not model.training and model.config == small_config(
        train__epochs=1, loss__segmentation=0.1, loss__classification=0.1, model__variational=True)
    assert all(torch.equal(weight, content["model"][name]) for name, weight in model.state_dict().items())
    images = to_unit(small_dataset().images[:2])
    outputs = model.decode(model.encode(images)["latent"])
    assert set(outputs) == {"rgb", "segmentation", "classification"}
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    assert stat.S_IMODE((tmp_path / "model.pt").stat().st_mode) & 0o400
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_the_content_is_plain(trained):
    def kinds(value):
        if isinstance(value, dict):
            return set().union(set(), *(kinds(item) for item in value.values()))
        return set().union(set(), *(kinds(item) for item in value)) if isinstance(value, list) else {type(value)}

    assert kinds(trained.state()) <= {torch.Tensor, int, float, str, bool, type(None), tuple}


class Trap:
    def __reduce__(self):
        return (print, ("code from the file ran",))


def test_broken_files_are_told(tmp_path, trained, capsys):
    good = tmp_path / "good.pt"
    save_checkpoint(good, trained.state())
    raw = good.read_bytes()
    broken = {"cut.pt": raw[:len(raw) // 2], "empty.pt": b"", "text.pt": b"hello world",
              "trap.pt": pickle.dumps(Trap(), protocol=2)}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(InputError, match=r"missing\.pt: no such file"):
        load_model(tmp_path / "missing.pt")
    with pytest.raises(InputError, match=str(tmp_path)):
        load_model(tmp_path)
    assert "code from the file ran" not in capsys.readouterr().out


def change(content, **parts):
    return {**content, **parts}


@pytest.mark.parametrize("spoil, said", [
    (lambda c: change(c, format=99), "format: 99"),
    (lambda c: [1, 2], "no checkpoint"),
    (lambda c: {key: value for key, value in c.items() if key != "model"}, "model: missing"),
    (lambda c: change(c, config={"model": {"kind": "conv9d"}}), "model.kind: 'conv9d'"),
    (lambda c: change(c, config={**c["config"], "models": {}}), "'models' is no setting"),
    (lambda c: change(c, shapes={}), "not those of the configuration"),
    (lambda c: change(c, shapes={**c["shapes"], "classes": []}), "segmentation"),
    (lambda c: change(c, model={**c["model"], "more": torch.zeros(1)}), "more"),
    (lambda c: change(c, model=dict(list(c["model"].items())[1:])), "Missing key"),
    (lambda c: change(c, model={**c["model"], "encoder.mean.bias": torch.zeros(9)}), "encoder.mean.bias"),
])
def test_wrong_content_is_told(tmp_path, trained, spoil, said):
    content = spoil(trained.state())
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(InputError, match=r"wrong\.pt|loss\.segmentation") as caught:
        load_model(tmp_path / "wrong.pt")
    assert said in str(caught.value)
