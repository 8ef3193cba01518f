"""Elements of JSON lists one by one: at every piece size what json.loads gives, and broken ones alone are lost."""

import json

import pytest

from capcur_jax.data.problem import BadRow
from capcur_jax.data.sources import json_stream
from capcur_jax.errors import InputError

VALUES = [{"a": [1, {"b": 'quote " and ] and \\'}]}, [], "text, with ] and }", 12345, -1.5e3, None, {"ä": "日本"}, {}]


def found(path, key=""):
    return [
        (number, value.args[0] if isinstance(value, BadRow) else value)
        for number, value in json_stream.items(path, key)
    ]


def write(tmp_path, content):
    path = tmp_path / "list.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_values_are_those_of_json_at_every_piece_size(piece, indent, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "_PIECE", piece)
    expected = list(enumerate(VALUES, start=1))
    assert found(write(tmp_path, json.dumps(VALUES, indent=indent, ensure_ascii=False))) == expected
    around = {"info": {"rows": [0], "n": 1}, "rows": VALUES, "after": [1]}
    assert found(write(tmp_path, b"\xef\xbb\xbf" + json.dumps(around, indent=indent).encode()), "rows") == expected
    assert found(write(tmp_path, " [ ] ")) == []


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"a": 1}, {"a": }, {"a": 3}]', [(1, {"a": 1}), (2, "not JSON"), (3, {"a": 3})]),
        ("[1, NaN, [Infinity], 4]", [(1, 1), (2, "not JSON"), (3, "not JSON"), (4, 4)]),
        ("[1, 'two, 2', 3]", [(1, 1), (2, "not JSON"), (3, "not JSON"), (4, 3)]),
        ('[1, {"a": [1, 2}, 3]', [(1, 1), (2, "not JSON")]),
        ('[1, "no end, 3]', [(1, 1), (2, "not JSON")]),
        ("[1, 2", [(1, 1), (2, "not JSON")]),
        ("[1,", [(1, 1), (2, "not JSON")]),
        ("[1} 2, 3]", [(1, "not JSON"), (2, 2), (3, 3)]),
        ("[,]", [(1, "not JSON")]),
        ("[1,]", [(1, 1)]),
        ("[" + "[" * 100_000 + "]" * 100_000 + ", 2]", [(1, "not JSON"), (2, 2)]),
    ],
)
def test_a_broken_element_costs_itself_alone_where_its_brackets_match(piece, content, expected, tmp_path, monkeypatch):
    if piece == 1 and len(content) > 1000:
        pytest.skip("quadratic at this size")
    monkeypatch.setattr(json_stream, "_PIECE", piece)
    assert found(write(tmp_path, content)) == expected


def test_bytes_that_are_no_utf8_stay_in_their_text(tmp_path):
    (_, first), (_, second) = found(write(tmp_path, b'["\xff", "b"]'))
    assert first == "\udcff" and second == "b"


def test_an_endless_element_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "_PIECE", 16)
    monkeypatch.setattr(json_stream, "_LONGEST", 64)
    assert found(write(tmp_path, '[1, "' + "x" * 1000 + '", 2]')) == [(1, 1), (2, "not JSON")]


@pytest.mark.parametrize(
    "content", ["", "{}", '{"a": 1}', '{"rows": {}}', '{"x": nul, "rows": []}', "3", '{"rows" []}']
)
def test_files_without_the_list_are_named(content, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=r"list.json: not a JSON list, or an object with one under 'rows'"):
        found(path, "rows")
    with pytest.raises(InputError, match=r"list.json: not a JSON list; download the file again"):
        found(path)
