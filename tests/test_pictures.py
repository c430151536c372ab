from __future__ import annotations

import base64
import io
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import FAIR, GOOD, POOR, Sweep, arms, rows_of
from PIL import Image

from autoenc.report.pictures import embedded, gallery
from autoenc.sweep.phase import decide_race

COLOURS = {"inputs": (10, 20, 30), "A": (200, 30, 60), "B": (30, 200, 60), "C": (60, 30, 200)}
KINDS = ["best", "best", "typical", "worst"]


@pytest.fixture
def sweep(tmp_path) -> Sweep:
    made = Sweep(tmp_path, arms("A", "B", "C"))
    made.trained("A", rows_of(GOOD))
    made.trained("B", rows_of(FAIR))
    made.trained("C", rows_of(POOR))
    made.stopped("C", 2, POOR[1], GOOD[1], by="A")
    return made


def make_gallery(made: Sweep, names=("A", "B"), channels=4, **over):
    """As the pictures' worker leaves it: strips of four cells of 8 px, images above classes."""
    folder = made.output / "phase" / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("inputs", *names):
        Image.new("RGB", (32, 16), COLOURS[name]).save(folder / f"{name}.png")
    edges = [-2 + 0.1 * place for place in range(41)]
    counts = [[place if channel % 2 else 40 - place for place in range(40)] for channel in range(channels)]
    content = {
        "format": 1, "images": 9, "inputs": "inputs.png", "cell": 8, "rows": ["image", "classes"],
        "columns": [{"index": place, "kind": kind, "mse": 0.1} for place, kind in enumerate(KINDS)],
        "arms": {name: {
            "trial": f"{name}_seed42", "key": made.folder(name).name, "epoch": 5, "picture": f"{name}.png",
            "mse": [0.1] * 4, "psnr": [30.0, 25.5, 20.0, None],
            "latent": {"edges": edges, "counts": counts, "mean": [0.0, 0.5] * (channels // 2),
                       "std": [1.0, 2.0] * (channels // 2)}} for name in names}, **over}
    (folder / "gallery.json").write_text(json.dumps(content))
    return folder, content


def seen(made: Sweep, folder) -> dict | None:
    race = made.race()
    return gallery(race, decide_race(race), folder)


def test_every_arm_side_by_side_on_the_same_images(sweep):
    make_gallery(sweep)
    sweep.sample("A", 5)
    page = sweep.page(sweep.winner("A"))
    strips = [picture for picture in page.pictures() if picture.size == (32, 16)]
    colours = [strip.convert("RGB").getpixel((3, 3)) for strip in strips]
    assert colours == [COLOURS[name] for name in ("inputs", "A", "B")]
    text = page.text()
    assert "best typical worst" in text and "30.0 25.5 20.0 ∞" in text and "Samples" not in text
    assert "Not shown: C." in text


def test_latents_are_a_line_a_channel_and_a_column_a_bin(sweep):
    make_gallery(sweep, channels=64)
    maps = [picture for picture in sweep.page().pictures() if picture.size == (40, 64)]
    assert len(maps) == 2
    tones = np.asarray(maps[0].convert("RGBA"))[..., 3].astype(int)
    assert (np.diff(tones[1]) >= 0).all() and (np.diff(tones[0]) <= 0).all()
    assert tones[0].max() == 255 and tones[1, 0] == 0
    assert "means 0 to 0.5, deviations 1 to 2" in sweep.page().text()


@pytest.mark.parametrize("change", [{"epoch": 4}, {"key": "another"}, {"psnr": [1.0]}, {"psnr": "x"},
                                    {"picture": "no.png"}])
def test_an_arm_that_is_not_what_the_sweep_compares_is_left_out(sweep, change):
    folder, content = make_gallery(sweep)
    content["arms"]["A"] |= change
    (folder / "gallery.json").write_text(json.dumps(content))
    assert [strip["arm"] for strip in seen(sweep, folder)["strips"]] == ["B"]


def test_pictures_outside_of_the_gallery_are_not_read(sweep, tmp_path):
    folder, content = make_gallery(sweep)
    Image.new("RGB", (32, 16), (1, 2, 3)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    secret = str(tmp_path / "secret.png")
    for name in (secret, "../../../secret.png", "link.png", "..", ".", "", "a\0b", 7, None, ["A.png"]):
        content["arms"]["A"]["picture"] = name
        (folder / "gallery.json").write_text(json.dumps(content))
        assert [strip["arm"] for strip in seen(sweep, folder)["strips"]] == ["B"]
        (folder / "gallery.json").write_text(json.dumps({**content, "inputs": name}))
        assert seen(sweep, folder) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 2}', '{"format": 1, "arms": []}', "[" * 100_000])
def test_a_broken_gallery_is_as_if_there_were_none(sweep, text):
    folder, _ = make_gallery(sweep)
    (folder / "gallery.json").write_text(text)
    sweep.sample("A", 5)
    page = sweep.page()
    assert "Samples" in page.text() and "Reconstructions" not in page.text() and len(page.pictures()) == 1


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=6)


def places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_gallery_with_anything_anywhere_gives_a_page(tmp_path_factory, data):
    made = Sweep(tmp_path_factory.mktemp("sweep"), arms("A"))
    made.trained("A", rows_of(GOOD))
    folder, content = make_gallery(made, names=("A",), channels=2)
    content["arms"]["A"]["latent"] |= {"edges": [-1.0, 0.0, 1.0], "counts": [[1, 2], [3, 0]]}
    path = data.draw(st.sampled_from([path for path in places(content) if path]))
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = data.draw(JSON)
    (folder / "gallery.json").write_text(json.dumps(content))
    assert "Decision" not in made.page().text()                       # a page, without an exception


def test_while_it_runs_the_sample_pictures_are_shown(sweep):
    make_gallery(sweep)
    sweep.sample("A", 5)
    assert "Samples" in sweep.page(state="running").text()


def test_pictures_are_the_last_within_this_sweep(sweep):
    sweep.sample("A", 1, colour=(1, 2, 3))
    sweep.sample("A", 5, colour=(10, 200, 30))
    sweep.sample("A", 8, colour=(7, 7, 7))                    # of a longer training that the store holds
    sweep.sample("C", 1, colour=(99, 0, 0))
    (sweep.folder("B") / "samples" / "epoch_0005.png").write_bytes(b"no picture")
    page = sweep.page(sweep.winner("A"))
    pictures = page.pictures()
    assert [picture.convert("RGB").getpixel((3, 3)) for picture in pictures] == [(10, 200, 30), (99, 0, 0)]
    assert "A winner epoch 5 of 5" in page.text() and "C behind at epoch 2 epoch 1 of 2" in page.text()


def test_large_pictures_are_shrunk_until_they_fit(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    path = tmp_path / "epoch_0001.png"
    Image.fromarray(noise).save(path)
    whole = base64.b64decode(embedded(path, 10_000_000)["src"].split(",")[1])
    small = base64.b64decode(embedded(path, 100_000)["src"].split(",")[1])
    assert whole == path.read_bytes()
    assert len(small) <= 100_000 and Image.open(io.BytesIO(small)).size == (200, 150)


def test_a_folder_that_cannot_be_read_is_no_gallery(sweep):
    folder, _ = make_gallery(sweep)
    (folder / "gallery.json").unlink()
    os.mkfifo(folder / "inputs2.png")
    assert seen(sweep, folder) is None
