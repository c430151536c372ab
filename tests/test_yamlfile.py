"""What YAML is read as, what is refused, and that what is written is read back."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoenc.errors import InputError
from autoenc.yamlfile import MAX_BYTES, MAX_DEPTH, dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(("word", "value"), [
    ("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), ("1.e2", 100.0), (".5", 0.5), ("5.", 5.0), ("+5", 5),
    ("-7", -7), ("010", 10), ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
    (".inf", math.inf), ("no", "no"),
    ("on", "on"), ("yes", "yes"), ("1:30", "1:30"), ("0x10", "0x10"), ("1_000", "1_000"),
    ("2001-01-01", "2001-01-01"), ("=", "="), ("<<", "<<"), ("1.2.3", "1.2.3"), ("e5", "e5"), ("5%", "5%"),
    ("'1'", "1"), ('"1e-4"', "1e-4"),
])
def test_words_are_read_as_in_the_core_schema(word, value):
    read = parse_yaml(f"key: {word}", "a.yaml")["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(("text", "line", "said"), [
    ("a: 1\nb: 2\na: 3", 3, "key 'a' is given twice"),
    ("a:\n  b: 1\n  b: 1", 3, "key 'b' is given twice"),
    ("1: a\n1.0: b", 2, "key 1.0 is given twice"),
    ("a: &x [1]\nb: *x", 2, "alias *x is not allowed"),
    ("a: 1\nb: !!python/object/apply:os.system [ls]", 2, "tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
    ("a: !!bool maybe", 1, "tag"),
    ("a: !!set {b, c}", 1, "tag"),
    ("? [a, b]\n: 1", 1, "a key must be a plain word"),
    ("a: 1\n b: 2", 2, "not allowed here"),
    ("a: {b: 1", 1, "expected ',' or '}'"),
    ("a: 1\n---\nb: 2", 2, "another document"),
    ("x: " + "[" * (MAX_DEPTH + 1), 1, f"deeper than {MAX_DEPTH} levels"),
    ("a: " + "9" * 301, 1, "more than 300 digits"),
    ('a: "\\0"', 1, "character"),
    ('a: "\\ud800"', 1, "character"),
])
def test_refused_with_the_place(text, line, said):
    with pytest.raises(InputError) as error:
        parse_yaml(text, "some/sweep.yaml")
    assert str(error.value).startswith(f"some/sweep.yaml: line {line}, column ")
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["\x01", 'a: "\\UFFFFFFFF"', "a: 'b", "%YAML 9", "@", "\t- a", "!", "&", "*"])
def test_no_yaml_is_an_input_error(text):
    with pytest.raises(InputError, match=r"^w: "):
        parse_yaml(text, "w")


@settings(deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="ab:-,[]{}#&*!|>'\"%@`~?<=0123456789.e+_ \n\t\\xU"), st.binary()))
@example(b"[" * 10_000)
@example("{a: " * 10_000)
@example("- " * 5_000)
@example("9" * 10_000)
@example("!!int ''")
@example("!!timestamp x")
def test_any_text_is_a_plain_value_or_an_input_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        value = read_yaml(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert plain(value)


def plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(plain(key) and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (str, bool, int, float)


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])
                | st.sampled_from("\r\n\t \x85\u2028\ufeff"))
tricky = ["1e5", "no", "010", "1:30", "0x1", "yes", "~", "null", "", "<<", "=", "+.5e3", "1.", "True", ".inf", "-",
          " x", "a: b", "#", "2001-01-01", "1_0", "é", "/\x85"]
scalars = st.one_of(st.none(), st.booleans(), st.integers(-10**40, 10**40), st.floats(allow_nan=False), texts,
                    st.sampled_from(tricky))


@settings(deadline=None)
@given(st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
                    max_leaves=15))
def test_what_is_written_is_read_back(value):
    assert repr(parse_yaml(dump_yaml(value), "w")) == repr(value)


def test_keys_keep_their_order():
    assert list(parse_yaml(dump_yaml({"b": 1, "a": 2, "c": 3}), "w")) == ["b", "a", "c"]


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    for name, said in (("missing.yaml", "no such file"), ("", "directory"), ("large.yaml", "larger than"),
                       ("latin.yaml", r"not UTF-8 text \(byte 6\)")):
        with pytest.raises(InputError, match=f"^{tmp_path / name}: .*{said}"):
            read_yaml(tmp_path / name)


def test_an_empty_file_is_none_and_a_byte_order_mark_is_nothing(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"")
    assert read_yaml(path) is None
    path.write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_yaml(path) == {"a": 1}
