"""Files, folders and hub names: which rows are read, and how a bad file is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from chats import ONE, TWO

from hft_cli.data.chats import CHATS
from hft_cli.data.files import Hub
from hft_cli.data.rows import read_chats
from hft_cli.errors import UserError

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": partial(pyarrow.compress, codec="zstd", asbytes=True),
}

LINES = [f".jsonl{suffix}" for suffix in COMPRESS]


def write(path: Path, rows: list[Any]) -> str:
    """Write the rows in the format which the suffix says."""
    if path.name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    if path.name.endswith(".arrow"):
        import pyarrow as pa

        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
        return str(path)
    lines = ".jsonl" in path.name or ".ndjson" in path.name
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(text.encode()))
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".json.gz", *LINES, ".parquet", ".arrow"])
def test_every_file_format_gives_the_same_chats_and_hash(suffix: str, tmp_path: Path) -> None:
    read = read_chats(write(tmp_path / f"a{suffix}", [{"messages": ONE.turns}, {"messages": TWO.turns}]))
    assert read == [ONE, TWO]
    assert CHATS.sha256(read) == CHATS.sha256([ONE, TWO])


TABLE = 'prompt,completion,system\n q ,1.0,\n"two\r\nlines, ""quoted""",null,Be brief.\n\n'


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
def test_the_values_of_a_csv_table_are_its_texts(suffix: str, tmp_path: Path) -> None:
    text = TABLE.replace("s, ", "s\0 ").replace(",", "\t").replace("\0", ",") if suffix == ".tsv" else TABLE
    content = ("\ufeff" + text).encode()
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    first, second = read_chats(str(tmp_path / f"a{suffix}"))
    assert [turn["content"] for turn in first.turns] == [" q ", "1.0"]
    assert [turn["content"] for turn in second.turns] == ["Be brief.", 'two\r\nlines, "quoted"', "null"]


def test_a_folder_of_save_to_disk_gives_its_split(tmp_path: Path) -> None:
    import datasets

    one, two = (datasets.Dataset.from_list([{"messages": list(each.turns)}]) for each in (ONE, TWO))
    one.save_to_disk(str(tmp_path / "set"))
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "splits"))
    assert read_chats(str(tmp_path / "set")) == read_chats(str(tmp_path / "set"), split="test") == [ONE]
    assert read_chats(str(tmp_path / "splits")) == [ONE]
    assert read_chats(str(tmp_path / "splits"), split="test") == [TWO]
    with pytest.raises(UserError, match=r"No split 'dev' in .*splits \(it holds \['train', 'test'\]\)\. Set data\."):
        read_chats(str(tmp_path / "splits"), split="dev")
    (tmp_path / "other").mkdir()
    write(tmp_path / "other/train.jsonl", [{"messages": TWO.turns}])
    (tmp_path / "other/state.json").write_text("{}")  # of another program
    assert read_chats(str(tmp_path / "other")) == [TWO]
    two.save_to_disk(str(tmp_path / "splits/train"))  # the cache sees changes below the folder
    assert read_chats(str(tmp_path / "splits")) == [TWO]
    (tmp_path / "splits/train/data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(UserError, match=r"splits/train/data-00000-of-00001\.arrow cannot be read: "):
        read_chats(str(tmp_path / "splits"))


def test_an_object_with_one_list_is_read_as_that_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": [{"messages": ONE.turns}]}))
    assert read_chats(str(tmp_path / "a.json")) == [ONE]


def test_a_byte_order_mark_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\ufeff" + json.dumps({"messages": ONE.turns}) + "\n\n", encoding="utf-8")
    assert read_chats(str(tmp_path / "a.jsonl")) == [ONE]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train.jsonl", "test.jsonl"], "train"),
        (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], "train"),
        (["eval.json", "train.json", "test.json"], "eval"),
        (["train_prefs.jsonl.gz", "test_prefs.jsonl.gz"], "train_prefs"),
        (["mine.jsonl"], "train"),
        (["Train.jsonl", "Test.jsonl"], "train"),
        (["train1.jsonl", "test1.jsonl"], "train"),
    ],
)
def test_a_folder_gives_the_files_of_its_split(names: list[str], split: str, tmp_path: Path) -> None:
    for name in names:
        wanted = name.lower().startswith(split) or len(names) == 1
        write(tmp_path / name, [{"messages": (ONE if wanted else TWO).turns}])
    (tmp_path / "README.md").write_text("not data")
    assert read_chats(str(tmp_path), split=split) == [ONE]


def test_a_part_in_an_unknown_compression_is_not_dropped(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.jsonl", [{"messages": ONE.turns}])
    (tmp_path / "train.jsonl.md5").write_text("not data")
    assert read_chats(str(tmp_path)) == [ONE]
    (tmp_path / "train-00001-of-00002.jsonl.lz4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds train-00001-of-00002\.jsonl\.lz4, whose compression is not known"):
        read_chats(str(tmp_path))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_broken_compressed_file_is_one_line(suffix: str, tmp_path: Path) -> None:
    whole = COMPRESS[suffix](json.dumps({"text": "a b c"}).encode())
    for content in (b"abc", whole[: len(whole) // 2]):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.jsonl\{suffix} cannot be read: "):
            read_chats(str(tmp_path / f"a.jsonl{suffix}"))


def test_the_parts_of_a_split_are_read_in_order(tmp_path: Path) -> None:
    for part in (1, 0):
        write(tmp_path / f"train-0000{part}-of-00002.jsonl", [{"messages": [ONE, TWO][part].turns}])
    assert read_chats(str(tmp_path)) == [ONE, TWO]


def test_max_rows_leaves_later_rows_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": ONE.turns}) + "\nnot JSON\n")
    assert read_chats(str(path), max_rows=1) == [ONE]


def test_any_other_name_is_loaded_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, subset: str | None, **options: Any) -> Any:
        calls.append((name, subset, options))
        return iter([{"messages": list(ONE.turns)}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_chats("org/set", split="test", max_rows=2) == [ONE, ONE]
    assert read_chats("org/set", max_rows=1, hub=Hub("main", "v1")) == [ONE]
    assert calls == [
        ("org/set", None, {"split": "test", "streaming": True, "revision": None}),
        ("org/set", "main", {"split": "train", "streaming": True, "revision": "v1"}),
    ]


@pytest.mark.parametrize(("hub", "key"), [(Hub("main"), "subset"), (Hub(revision="v1"), "revision")])
def test_a_local_file_has_no_subset_and_no_revision(hub: Hub, key: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": ONE.turns}])
    with pytest.raises(UserError, match=rf"a\.jsonl is not on the hub, so it has no {key} '.*': leave out data\.{key}"):
        read_chats(path, hub=hub)


def test_an_error_of_the_hub_is_one_line_with_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, *_: Any, **__: Any) -> Any:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as caught:
        read_chats("org/set")
    assert str(caught.value) == (
        "'org/set' is no local file or folder, and its split 'train' could not be loaded from the hub: no route"
    )


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_bad_row_of_a_list_or_table_is_named_by_its_number(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}", [{"prompt": "q", "answer": "a"}, {"prompt": "q", "answer": None}])
    with pytest.raises(UserError) as caught:
        read_chats(path)
    assert str(caught.value) == f"{path}, row 2: 'answer' is null, which the shape 'trace' needs (keys found: prompt)."


FILES: dict[str, tuple[str, bytes, str]] = {
    "not JSON": ("a.jsonl", b'{"a": 1}x\n', "a.jsonl, line 1: not JSON (Extra data at line 1 column 9)."),
    "JSON lines in .json": (
        "a.json",
        b"{}\n{}",
        "a.json: not JSON (Extra data at line 2 column 1). One object a line? ",
    ),
    "no list": ("a.json", b'{"a": 1}', "neither a list of objects nor an object with one list in it, but an object."),
    "two lists": ("a.json", b'{"a": [], "b": []}', "neither a list of objects nor an object with one list in it"),
    "no rows": ("a.jsonl", b"\n", "No rows in "),
    "an empty list": ("a.json", b"[]", "No rows in "),
    "not UTF-8": ("a.jsonl", b'{"a": "\xff"}', "a.jsonl cannot be read: 'utf-8' codec"),
    "not gzip": ("a.jsonl.gz", b"{}", "a.jsonl.gz cannot be read: Not a gzipped file"),
    "gzip cut short": ("a.jsonl.gz", gzip.compress(b"{}" * 99)[:15], "a.jsonl.gz cannot be read: "),
    "not parquet": ("a.parquet", b"{}", "a.parquet cannot be read: "),
    "another suffix": ("a.xlsx", b"", "a.xlsx has an unknown format. Known: .json, .jsonl, .ndjson, .csv, .tsv, "),
    "not Arrow": ("a.arrow", b"{}", "a.arrow cannot be read: "),
    "an open quote": ("a.csv", b'prompt,answer\na,b\n"c,d\n', "a.csv cannot be read: unexpected end of data"),
    "a row too long": ("a.csv", b"prompt,answer\na,b,c\n", "a.csv, row 1: 3 values in 2 columns."),
    "a row too short": ("a.csv", b"prompt,answer\n\na\n", "a.csv, row 1: 1 value in 2 columns."),
    "a column twice": ("a.csv", b"prompt,answer,answer\na,b,c\n", "a.csv: the column 'answer' comes twice."),
    "a header alone": ("a.csv", b"prompt,answer\n", "No rows in "),
    "semicolons": ("a.csv", b"prompt;answer\na;b\n", "a.csv, row 1: unknown shape (keys found: prompt;answer)."),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named_with_its_fault(name: str, tmp_path: Path) -> None:
    file, content, reason = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_chats(str(tmp_path / file))
    assert reason in str(caught.value)
    assert str(tmp_path / file) in str(caught.value)


@pytest.mark.parametrize("path", ["./nothing", "/nothing/here", "nothing.jsonl", "some/where/train.parquet"])
def test_a_path_that_looks_local_is_not_looked_up_on_the_hub(path: str) -> None:
    with pytest.raises(UserError) as caught:
        read_chats(path)
    assert str(caught.value) == f"No such file or folder: '{path}'."


def test_a_clone_of_a_hub_data_set_names_its_folders(tmp_path: Path) -> None:
    for name in ("main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path / name, [{"messages": ONE.turns}])
    (tmp_path / "README.md").write_text("---\n")
    with pytest.raises(UserError, match=r"Give one of the folders in it that have some: main, socratic\.$"):
        read_chats(str(tmp_path))
    assert read_chats(str(tmp_path / "main")) == [ONE]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "(it holds no file ending in .json, .jsonl, .ndjson, .csv, "),
        (["eval.json", "test.json"], "No file for the split 'train' in the folder"),
        (["train_prefs.jsonl", "test_prefs.jsonl"], "(it holds test_prefs.jsonl, train_prefs.jsonl)."),
        (["tiny_dev.jsonl"], "(it holds tiny_dev.jsonl)."),
        (["train.json", "train.jsonl"], "More than one format for the split 'train'"),
    ],
)
def test_a_folder_without_one_clear_split_is_refused(names: list[str], reason: str, tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / name, [{"messages": ONE.turns}])
    with pytest.raises(UserError) as caught:
        read_chats(str(tmp_path))
    assert reason in str(caught.value)
