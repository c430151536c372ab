"""The pages under docs/ and the README say what is: sweeps parse, figures and settings exist, links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from sweepfiles import SWEEPS

from autoenc import figures
from autoenc.config import KEYS, SECTIONS
from autoenc.sweep.inherit import arm_candidates, load_chain, parse_override, starting_point
from autoenc.sweep.parts import PARTS
from autoenc.sweep.spec import PARTIAL_KEYS, read_layer
from autoenc.yamlfile import parse_yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SETTINGS = {*KEYS, *(f"{name}.{key}" for name, part in PARTS.items() for key in part.model_fields)}
NESTED = {f"decision.baseline.{key}" for key in ("arm", "margin", "gains")}
BESIDE = {"val/palette_classes", "val/segmentation_classes"}     # in trials.csv, but nothing to decide by
NAMED = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


@cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)


def code(page: Path) -> list[str]:
    """What stands in backticks within the lines of a page, and its indented and fenced code, line by line."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)
    plain = re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)
    return [*re.findall(r"`([^`]+)`", plain.replace("\n", " ")), *re.findall(r"^ {4,}(.+)$", plain, re.MULTILINE),
            *(line for block in fenced for line in block.splitlines())]


def yaml_blocks() -> list:
    return [pytest.param(page, block, id=f"{page.stem}-{number}")
            for page in PAGES for number, block in enumerate(blocks(page, "yaml"), start=1)]


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory) -> Iterator[Path]:
    """The project's sweeps, and beside them those of the pages that say what file they are; the modules of the pages
    are on Python's path."""
    folder = tmp_path_factory.mktemp("project") / "sweeps"
    (folder / "presets").mkdir(parents=True)
    for path in SWEEPS.rglob("*.yaml"):
        (folder / path.relative_to(SWEEPS)).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    for page in PAGES:
        for block in blocks(page, "yaml"):
            if named := re.match(r"# sweeps/(\S+\.yaml)\n", block):
                (folder / named[1]).write_text(block, encoding="utf-8")
        for block in blocks(page, "python"):
            if named := re.match(r"# (\w+\.py)\n", block):
                (folder.parent / named[1]).write_text(block, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder.parent)
        yield folder


@pytest.mark.parametrize(("page", "block"), yaml_blocks())
def test_every_yaml_block_is_read_by_the_loader(page, block, sweeps):
    content = parse_yaml(block, page.name)
    if "name" not in content:                    # a preset, a configuration
        assert read_layer(content, sweeps / "presets" / "block.yaml", PARTIAL_KEYS).config
        return
    path = sweeps / f"{content['name']}.yaml"
    path.write_text(block, encoding="utf-8")
    spec = load_chain(path)[-1]
    assert spec.name == content["name"]
    assert arm_candidates(spec, starting_point(spec, None)) or spec.space
    shipped = SWEEPS / path.name
    assert not shipped.exists(), f"{page.name}: name the excerpt of a shipped sweep otherwise"


def test_a_page_with_a_wrong_sweep_would_be_noticed(sweeps):
    block = blocks(ROOT / "docs" / "rules.md", "yaml")[0]
    with pytest.raises(Exception, match="is no figure"):
        test_every_yaml_block_is_read_by_the_loader(PAGES[0], block.replace("val/palette_miou", "val/palette"), sweeps)


def test_the_page_of_figures_has_them_all_and_no_other():
    page = text(ROOT / "docs" / "metrics.md")
    named = set(re.findall(r"`((?:train|val|latent|stability)/\w+|latent_size|parameters|encode_ms|beta)`", page))
    assert named - BESIDE == set(figures.MODES)


def test_the_page_of_figures_tells_the_direction():
    words = {"smaller": "min", "larger": "max"}
    rows = re.findall(r"^\| (`.+?) \|.*\| ([^|]+) \|$", text(ROOT / "docs" / "metrics.md"), re.MULTILINE)
    told = {name: better for names, better in rows for name in re.findall(r"`([^`]+)`", names)}
    assert len(told) > 40
    for name, better in told.items():
        if name in figures.EITHER_WAY:
            assert better == f"either ({figures.MODES[name]})", name
        else:
            assert words[better] == figures.MODES[name], name


@NAMED
def test_figures_exist(page):
    for piece in code(page):
        for name in re.findall(r"\b((?:train|val|latent|stability)/[a-z_]+)\b", piece):
            assert name in {*figures.MODES, *BESIDE} or name == "latent/channel_", f"{page.name}: {name}"


@NAMED
def test_settings_exist(page):
    sections = "|".join([*SECTIONS, *PARTS])
    for piece in code(page):
        for name in re.findall(rf"(?<![\w./])((?:{sections})\.[a-z_]+(?:\.[a-z_]+)?)(?![\w.(/*])", piece):
            assert name in SETTINGS | NESTED or name.endswith((".yaml", ".json", ".py", ".csv")), f"{page.name}: {name}"


@NAMED
def test_overrides_can_be_given(page):
    for piece in code(page):
        for quoted, plain in re.findall(r"--set (?:'([^']+)'|([^\s'`]+))", piece):
            if "=" in (given := quoted or plain) and "KEY" not in given:
                parse_override(given).layer(ROOT)


@NAMED
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT) and there.exists(), f"{page.name}: {target}"
        if heading:
            assert heading in headings(there), f"{page.name}: {target}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    plain = re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-")
            for line in re.findall(r"^#+ (.+)$", plain, re.MULTILINE)}


@NAMED
def test_commands_name_files_that_are_there(page):
    """Scripts, modules and sweeps in commands exist, or are written on a page."""
    written = {match for other in PAGES for block in blocks(other, "yaml")
               for match in re.findall(r"^# (\S+\.yaml)\n", block)}
    for piece in code(page):
        for path in re.findall(r"(?:^|\s)((?:sweeps|tests|docs|autoenc)/[\w/.]+\.(?:yaml|py|md))", piece):
            assert (ROOT / path).exists() or path in written, f"{page.name}: {path}"
        for module in re.findall(r"python -m (autoenc[\w.]*)", piece):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name}: {module}"


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", text(ROOT / "README.md")))
    assert linked == {page.name for page in PAGES if page.parent.name == "docs"}
