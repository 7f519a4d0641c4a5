"""What batch jobs read and write, without an engine."""

from __future__ import annotations

import csv
import json
import math

import pytest

from jaxserve import InvalidRequestError, UnknownOptionError
from jaxserve.batch import inputs, kinds
from jaxserve.batch.columns import Asking, Columns, cells_of_text
from jaxserve.batch.rows import STRIDE

COLUMNS = Columns()


def asking(defaults=None, **columns):
    return Asking(Columns(**columns), defaults or {})


def all_rows(found):
    return [row for part in found.parts for row in inputs.read(part, COLUMNS)]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# -- rows of files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part_rows", [1, 3, 7, 100, None])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_jsonl_parts_are_the_lines_of_the_file(tmp_path, part_rows, ends):
    texts = [f"row {n} é " + "x" * (n % 13) for n in range(50)]
    lines = [json.dumps({"prompt": text}, ensure_ascii=bool(n % 2)) for n, text in enumerate(texts)]
    lines.insert(20, "   ")  # blank lines are no rows
    lines.insert(30, "")
    path = write(tmp_path / "in.jsonl", "\ufeff" + ends.join(lines))  # and no end of the last line
    found = inputs.scan([path], COLUMNS, part_rows, typed=False)
    rows = all_rows(found)
    assert [row.index for row in rows] == list(range(50))
    assert [row.values["prompt"] for row in rows] == texts
    size = part_rows or STRIDE
    assert [part.rows for part in found.parts] == [
        min(size, 50 - first) for first in range(0, 50, size)
    ]


BROKEN = [
    b'{"prompt": "a"',
    b'["prompt"]',
    b'{"prompt": "\xff"}',
    b"[" * 5000,
    b'{"prompt": ' + b"1" * 5000 + b"}",
    b"null",
]


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: line[:12].decode("latin-1"))
def test_a_broken_line_is_a_row_with_an_error(tmp_path, line):
    path = write(tmp_path / "in.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    first, broken, last = all_rows(inputs.scan([path], COLUMNS, None, typed=True))
    assert (first.values["prompt"], last.values["prompt"]) == ("a", "b")
    assert broken.index == 1 and broken.values == {}
    assert broken.error is not None and "row 1 of the file is no JSON" in broken.error


@pytest.mark.parametrize("part_rows", [1, 4, None])
def test_csv_parts_are_the_records_of_the_file(tmp_path, part_rows):
    cells = [["plain", "1"], ['two\nlines, and a "quote"', "2"], ["", "3"], ["é\r\nx", "4"]] * 6
    path = tmp_path / "in.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["prompt", "id"], *cells[:10], [], *cells[10:]])
    rows = all_rows(inputs.scan([str(path)], COLUMNS, part_rows, typed=False))
    assert [[row.values["prompt"] or "", row.values["id"]] for row in rows] == cells
    assert [row.index for row in rows] == list(range(24))


def test_csv_cells_of_parameters_are_read_and_bad_ones_fail_their_row(tmp_path):
    text = "prompt,temperature,stop,ignore_eos,note\na,0.5,.,TRUE,x\nb,hot,.,,\nc,,,,\nd,1\n"
    path = write(tmp_path / "in.csv", text + "e" * 200_000 + ",1,,,\n")
    good, bad, empty, short, long = all_rows(inputs.scan([path], COLUMNS, None, typed=False))
    assert good.values == {
        "prompt": "a", "temperature": 0.5, "stop": ".", "ignore_eos": True, "note": "x"
    }  # fmt: skip
    assert bad.error is not None and "temperature is no JSON" in bad.error and "'hot'" in bad.error
    assert bad.values["prompt"] == "b"
    assert asking().question(2, empty.values).params == {}
    assert short.error == "the row has 2 cells for 5 columns"
    assert len(long.values["prompt"]) == 200_000


def test_several_files_and_folders_are_one_input(tmp_path):
    for name, rows in {"b": "34", "a": "012", "_hidden": "9"}.items():
        text = "".join(json.dumps({"prompt": row}) + "\n" for row in rows)
        write(tmp_path / f"{name}.jsonl", text)
    write(tmp_path / "notes.txt", "nothing")
    more = write(tmp_path / "notes.ndjson", json.dumps({"prompt": "5"}))
    (tmp_path / "notes.ndjson").rename(tmp_path.parent / "more.ndjson")
    paths = inputs.find([tmp_path, str(tmp_path.parent / "more.ndjson")])
    assert more not in paths
    found = inputs.scan(paths, COLUMNS, 2, typed=False)
    assert [(row.index, row.values["prompt"]) for row in all_rows(found)] == [
        (number, str(number)) for number in range(6)
    ]
    assert [part.rows for part in found.parts] == [2, 1, 2, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", "x", r"the suffix '\.txt'; jobs read \.jsonl"),
        ("in.jsonl", "", "none of its 0 lines is a JSON object"),
        ("in.jsonl", '[{"prompt": "a"}]', "none of its 1 lines is a JSON object"),
        ("in.jsonl", b"PAR1\0\0", "is no JSONL file: it is binary"),
        ("in.csv", b"PAR1\0\0", "is no CSV file: it is binary"),
        ("in.csv", "", "must name its columns"),
        ("in.csv", "prompt,prompt\na,b\n", "must name its columns, each once"),
        ("in.csv", "prompt\n", "has no rows"),
        ("in.csv", "prompt\na\rb\n", "is no CSV file: new-line character"),
        ("in.jsonl", '{"text": "a"}', r"none of the columns prompt, .*it has \['text'\]"),
        ("in.csv", "text\na\n", "none of the columns prompt"),
    ],
)
def test_a_file_that_is_none_is_an_error(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(InvalidRequestError, match=message):
        inputs.scan([path], COLUMNS, None, typed=False)


def test_places_that_are_not_there(tmp_path):
    with pytest.raises(InvalidRequestError, match=r"input '.*missing\.jsonl' does not exist"):
        inputs.find(tmp_path / "missing.jsonl")
    with pytest.raises(InvalidRequestError, match="is a folder without a file of"):
        inputs.find(tmp_path)
    with pytest.raises(InvalidRequestError, match="input is an empty list"):
        inputs.find([])
    with pytest.raises(InvalidRequestError, match="neither a file nor a folder"):
        inputs.find("/dev/null")
    paths = [write(tmp_path / "a.csv", "prompt\nx\n"), write(tmp_path / "b.jsonl", "{}")]
    with pytest.raises(InvalidRequestError, match="have one format"):
        inputs.scan(paths, COLUMNS, None, typed=False)
    paths = [paths[0], write(tmp_path / "c.csv", "prompt,more\nx,y\n")]
    with pytest.raises(InvalidRequestError, match=r"same columns, but .*\['prompt', 'more'\]"):
        inputs.scan(paths, COLUMNS, None, typed=False)


def test_a_file_that_changed_while_it_was_read_is_an_error(tmp_path):
    path = write(tmp_path / "in.jsonl", '{"prompt": "a"}\n' * 4)
    found = inputs.scan([path], COLUMNS, 2, typed=False)
    write(tmp_path / "in.jsonl", '{"prompt": "a"}\n' * 3)
    with pytest.raises(InvalidRequestError, match="has changed: rows 2 to 3 are 1 now"):
        all_rows(found)


def test_an_input_is_known_again_by_its_content(tmp_path):
    path = write(tmp_path / "in.jsonl", '{"prompt": "a"}\n' * 4)
    found = inputs.scan([path], COLUMNS, 2, typed=False)
    assert found.difference([path]) is None
    copy = write(tmp_path / "copy.jsonl", '{"prompt": "a"}\n' * 4)
    assert found.difference([copy]) is None
    assert [part.path for part in found.at([copy]).parts] == [copy, copy]
    other = write(tmp_path / "copy.jsonl", '{"prompt": "b"}\n' * 4)
    assert "another content" in str(found.difference([other]))
    assert found.difference([path, copy]) == "2 input files instead of 1"


@pytest.mark.parametrize("rows", [1, 15, 16, 300, 5000, 10**6, 10**9])
def test_parts_are_neither_too_many_nor_too_large(rows):
    size = inputs.usual_part(rows)
    assert size % STRIDE == 0 and STRIDE <= size <= inputs.LARGEST_PART
    assert math.ceil(rows / size) >= min(16, math.ceil(rows / STRIDE))
    assert rows > 10**7 or math.ceil(rows / size) <= 2500


def test_kinds_of_columns_hold_every_value(tmp_path):
    values = {
        "text": ["a", None, "é"],
        "count": [1, None, -5],
        "share": [1, 0.5, None],
        "flag": [True, None, False],
        "mixed": [1, "a", None],
        "flags_and_counts": [True, 1, None],
        "large": [1 << 80, 1, 2],
        "nested": [[1], {"a": 2}, None],
        "nothing": [None, None, None],
        "prompt": ["x", "y", "z"],
    }
    lines = [{name: column[n] for name, column in values.items()} for n in range(3)]
    path = write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, lines)))
    columns = inputs.scan([path], COLUMNS, None, typed=True).columns
    assert columns == {
        "text": kinds.TEXT,
        "count": kinds.INTEGER,
        "share": kinds.NUMBER,
        "flag": kinds.FLAG,
        "mixed": kinds.JSON,
        "flags_and_counts": kinds.JSON,
        "large": kinds.JSON,
        "nested": kinds.JSON,
        "nothing": kinds.NULL,
        "prompt": kinds.TEXT,
    }


# -- from a row to a question ----------------------------------------------------------------------


def test_a_question_is_the_one_column_that_is_given():
    talk = [{"role": "user", "content": "Hi"}]
    for values, kind, value in [
        ({"prompt": "a", "messages": None}, "prompt", "a"),
        ({"messages": talk}, "messages", talk),
        ({"messages": json.dumps(talk), "input_ids": None}, "messages", talk),
        ({"input_ids": "[1, 2]", "prompt": float("nan")}, "input_ids", [1, 2]),
    ]:
        question = asking().question(0, values)
        assert (question.kind, question.value) == (kind, value)
    named = asking(prompt="question")
    assert named.question(0, {"question": "a", "prompt": "carried"}).value == "a"


@pytest.mark.parametrize(
    ("given", "images"),
    [
        (None, []),
        (float("nan"), []),
        ([], []),
        ("a.png", ["a.png"]),
        (["a.png", None, "data:,"], ["a.png", "data:,"]),
        (' ["a.png", "b.png"]', ["a.png", "b.png"]),
        (b"PNG", [b"PNG"]),
        ({"bytes": b"PNG", "path": "a.png"}, [b"PNG"]),
        ([{"path": "a.png"}, {"url": "b.png"}], ["a.png", {"url": "b.png"}]),
    ],
)
def test_images_of_a_row(given, images):
    question = asking().question(0, {"prompt": "a", "image_data": given})
    assert [*question.images] == images and question.may_show == bool(images)
    named = asking(image_data="picture").question(0, {"input_ids": [1], "picture": given})
    assert [*named.images] == images


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"id": 1}, "exactly one of prompt, messages, input_ids; this one has none"),
        ({"prompt": "a", "input_ids": [1]}, "this one has prompt and input_ids"),
        ({"messages": "[{"}, r"messages is no JSON: .*got '\[\{'"),
        ({"messages": "[]", "image_data": "a.png"}, "images as parts.*none in image_data.*'a.png'"),
        ({"prompt": "a", "image_data": "[x].png"}, r"image_data is no JSON: .*got '\[x\]\.png'"),
        ({"prompt": "a", "sampling_params": 5}, "sampling_params must be a dict, got 5"),
        ({"prompt": "a", "sampling_params": "{"}, "sampling_params is no JSON"),
        ({"prompt": "a", "top_p": 3}, "top_p must be .*got 3"),
        ({"prompt": "a", "n": 2}, r"n must be 1 in a batch job, got 2"),
        ({"prompt": "a", "sampling_params": {"top": 3}}, "unknown sampling parameter 'top'"),
    ],
)
def test_a_row_that_asks_nothing_or_the_impossible(values, message):
    with pytest.raises((InvalidRequestError, UnknownOptionError), match=message):
        asking().question(0, values)


def test_parameters_of_a_row_go_over_those_of_the_job():
    ask = asking({"temperature": 0.1, "top_p": 0.9, "max_new_tokens": 4})
    row = {
        "prompt": "a",
        "sampling_params": {"temperature": 0.2, "top_p": 0.8, "max_new_tokens": None},
        "temperature": 0.3,
        "top_k": None,
    }
    assert ask.question(0, row).params == {
        "temperature": 0.3, "top_p": 0.8, "max_new_tokens": None
    }  # fmt: skip
    assert ask.question(0, {"prompt": "a"}).params is ask.defaults
    assert asking(sampling=()).question(0, {"prompt": "a", "n": 7}).params == {}
    pairs = {"prompt": "a", "sampling_params": [("top_k", 2)]}  # a map of Parquet
    assert ask.question(0, pairs).params["top_k"] == 2


def test_seeds_follow_from_the_row_and_not_from_the_engine():
    ask = Asking(COLUMNS, {}, seed=7)
    seeds = [ask.question(index, {"prompt": "a"}).params["sampling_seed"] for index in range(1000)]
    assert seeds == [
        ask.question(index, {"prompt": "b"}).params["sampling_seed"] for index in range(1000)
    ]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 1 << 32 for seed in seeds)
    own = ask.question(0, {"prompt": "a", "sampling_seed": 5})
    assert own.params["sampling_seed"] == 5


def test_columns_are_named_once_and_parameters_exist():
    with pytest.raises(InvalidRequestError, match="'prompt' is named for two things"):
        Columns(messages="prompt")
    with pytest.raises(UnknownOptionError, match=r"'temprature'.*did you mean 'temperature'"):
        Columns(sampling=("temprature",))
    assert cells_of_text({"a": "", "top_k": "5"}, Columns(sampling=())) == {"a": None, "top_k": "5"}


# -- Parquet ---------------------------------------------------------------------------------------


def test_parquet_parts_are_the_rows_of_the_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {
            "prompt": f"p{n}",
            "messages": [{"role": "user", "content": "x"}] if n % 2 else None,
            "sampling_params": {"temperature": 0.5 if n % 2 else None, "top_k": n + 1},
        }
        for n in range(25)
    ]
    path = str(tmp_path / "in.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    found = inputs.scan([path], COLUMNS, 4, typed=False)
    read = all_rows(found)
    assert [row.index for row in read] == list(range(25))
    assert [row.values["prompt"] for row in read] == [row["prompt"] for row in rows]
    # what is null in a struct was not given
    assert read[0].values["sampling_params"] == {"top_k": 1}
    assert "messages" not in read[0].values and read[1].values["messages"] == rows[1]["messages"]
    assert found.columns == dict.fromkeys(rows[0], kinds.NATIVE)
    write(tmp_path / "no.parquet", "PAR1 nothing of the kind")
    with pytest.raises(InvalidRequestError, match=r"no\.parquet' is no Parquet file"):
        inputs.scan([str(tmp_path / "no.parquet")], COLUMNS, None, typed=False)
