"Records: every format gives the same ones, what is broken is named, and no bytes make a reader fail otherwise."

import bz2
import csv
import gzip
import json
import lzma
import subprocess
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fengshen.data.task_dataloader.formats import FORMATS, OPENERS, BadLine, attempt, parse_line
from fengshen.data.task_dataloader.records import Skipped, Source, content_key, expand, find_sources, read, read_one, refuse_line

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("house")

RECORDS = [dict(question=f"第{i}个问题？\u2028", answer="答，\n\"'\t" * (i % 5) + "😀") for i in range(40)]


def pack(path, data):
    "Write bytes, compressed as the name says."
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as f:
            f.write(data)
    else:
        with {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(path.suffix, open)(path, "wb") as f:
            f.write(data)
    return path


def content(kind, records=RECORDS):
    "The records as the bytes of a format."
    if kind in (".csv", ".tsv"):
        import io

        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(records[0]), delimiter="\t" if kind == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue().encode()
    if kind in (".parquet", ".arrow", "stream"):
        table, sink = pa.Table.from_pylist(records), pa.BufferOutputStream()
        if kind == ".parquet":
            pa.parquet.write_table(table, sink)
        else:
            with (pa.ipc.new_file if kind == ".arrow" else pa.ipc.new_stream)(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
        return sink.getvalue().to_pybytes()
    if kind == ".json":
        return json.dumps(records, indent=1, ensure_ascii=False).encode()
    return "".join((repr(r) if kind == ".txt" else json.dumps(r)) + "\n" for r in records).encode()


def read_all(data, bad_line=refuse_line):
    return [record for source in find_sources(data)[0] for _, record in read(source, bad_line)]


@pytest.mark.parametrize("packed", ["", *OPENERS])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_and_compression_gives_the_same_records(tmp_path, kind, packed):
    path = pack(tmp_path / f"data{kind}{packed}", content(kind))
    source = find_sources(path)[0][0]
    got = list(read(source, refuse_line))
    assert got == list(enumerate(RECORDS, 1))
    assert read_one(source, 17) == RECORDS[16] and read_one(source, 40) == RECORDS[39]


@pytest.mark.parametrize("packed", OPENERS)
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".json", ".parquet"])
def test_an_archive_without_its_last_two_bytes_is_named(tmp_path, kind, packed):
    path = pack(tmp_path / f"data{kind}{packed}", content(kind, RECORDS * 200))
    for damaged in (path.read_bytes()[:-2], path.read_bytes()[:200], b"not an archive"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"cannot decompress the file: got .*data{kind}{packed}"):
            read_all(path)


@pytest.mark.parametrize("kind", [".parquet", ".arrow", "stream"])
def test_a_cut_table_is_named(tmp_path, kind):
    path = tmp_path / ("data" + kind.replace("stream", ".arrow"))
    whole = content(kind)
    path.write_bytes(whole)
    assert read_all(path) == RECORDS
    for end in (0, 1, 6, 50, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="cannot read the file"):
            read_all(path)


@given(data=st.binary(max_size=80), kind=st.sampled_from(FORMATS), packed=st.sampled_from(["", "", "", *OPENERS]))
@settings(max_examples=400)
def test_any_bytes_are_records_or_are_refused(tmp_path, data, kind, packed):
    path = tmp_path / f"x{kind}{packed}"
    for write in (path.write_bytes, lambda data: pack(path, data)):
        write(data)
        bad = []
        try:
            for number, record in read(Source(path.name, path), lambda *what: bad.append(what)):
                assert isinstance(record, dict) and number > 0
        except ValueError as e:
            assert str(path) in str(e) and "expected" in str(e)
        assert all(reason for _, _, reason, _ in bad)


chars = st.text("{}[]'\",:\\ \n0123456789eE+-.()abjNaIfntruels", max_size=40)


@given(st.one_of(st.binary(max_size=60), chars.map(str.encode), chars.map(lambda t: b"{" + t.encode())))
@settings(max_examples=500)
def test_any_line_is_parsed_or_a_bad_line(line):
    got = attempt(parse_line, line)
    assert not isinstance(got, BadLine) or str(got)


HARD = [b"[" * 100_000, b"{" * 100_000, b"{'a':" * 50_000, b"{'a': " + b"-" * 50_000 + b"1}", b"{[]: 1}", b"{" + b"(" * 300 + b")" * 300 + b"}", b"9" * 5000]


@pytest.mark.parametrize("line", HARD, ids=range(len(HARD)))
def test_a_hard_line_is_refused_in_few_words(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: (?s:.)*on_bad_line=skip") as refusal:
        read_all(path)
    assert len(str(refusal.value)) < 1500
    skipped = Skipped()
    assert read_all(path, skipped) == [dict(text="a"), dict(text="b")] and skipped.count == 1


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


def test_a_deep_record_is_shown_without_falling_into_it(tmp_path):
    for depth in range(900, 1000, 7):  # near the recursion limit, parsing may succeed and printing fail
        path = tmp_path / "data.jsonl"
        path.write_text('{"text": ' + "[" * depth + "]" * depth + "}")
        skipped = Skipped(tmp_path / "skipped.jsonl")
        for number, record in read(Source("data.jsonl", path), skipped):
            skipped(Source("data.jsonl", path), number, "wrong", record)
        assert skipped.count == 1


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst"])
def test_ten_megabytes_of_text_are_one_value(tmp_path, kind):
    long = [dict(text="长" * 3_500_000), dict(text="短")]
    path = pack(tmp_path / f"data{kind}", content("." + kind.split(".")[1], long))
    assert read_all(path) == long


def test_a_broken_line_of_ten_megabytes_is_refused_in_few_words(tmp_path):
    path = tmp_path / "data.jsonl"
    for start in (b'{"text": "', b"{'text': [", b""):
        path.write_bytes(start + b"1, " * (3_500_000 if start.endswith(b'"') else 300_000))
        skipped = Skipped(tmp_path / "skipped.jsonl")
        assert read_all(path, skipped) == [] and skipped.count == 1
        assert len((tmp_path / "skipped.jsonl").read_text()) < 1500


def test_marks_returns_and_blank_lines(tmp_path):
    for kind in (".jsonl", ".csv", ".json"):
        path = tmp_path / f"data{kind}"
        path.write_bytes(b"\xef\xbb\xbf" + content(kind))
        assert read_all(path) == RECORDS
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\r\n" + content(".jsonl").replace(b"\n", b"\r\n\r\n  \r\n"))
    assert [n for n, _ in read(Source("", path), refuse_line)] == list(range(2, 2 + 3 * 40, 3))
    (tmp_path / "lines.json").write_bytes(b"\n" + content(".jsonl"))
    source = Source("lines.json", tmp_path / "lines.json")
    assert list(read(source, refuse_line)) == list(enumerate(RECORDS, 2)) and source.unit == "line"
    assert read_one(source, 3) == RECORDS[1]


def test_other_encodings_are_told(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"text": "问"}\n'.encode("gb18030"))
    with pytest.raises(ValueError, match=r"line 1: byte 11 is not UTF-8 \(a file in GB18030"):
        read_all(path)
    path.write_bytes('{"text": "问"}\n'.encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16"):
        read_all(path)
    table = tmp_path / "data.csv"
    table.write_bytes("a,b\n好,1\n".encode() + "问,2\n".encode("gb18030") + "好,3\n".encode())
    skipped = Skipped()
    assert [r["b"] for r in read_all(table, skipped)] == ["1", "3"] and "'a': byte 1 is not UTF-8" in skipped.first[0][2]
    table.write_bytes("问题,答案\n好,1\n".encode("gb18030"))
    with pytest.raises(ValueError, match="does not name the columns.*GB18030"):
        read_all(table)
    path = tmp_path / "data.parquet"
    column = pa.array([b"good", b"\xff", b"fine"]).cast(pa.binary()).view(pa.string())
    pa.parquet.write_table(pa.table(dict(text=column)), path)
    skipped = Skipped()
    assert [r["text"] for r in read_all(path, skipped)] == ["good", "fine"] and skipped.first[0][1] == 2


def test_bad_rows_of_a_table(tmp_path):
    path = tmp_path / "data.csv"
    for text, count in [('a,b\n1,2\n3\n"4"x,5\n6,7,8\n9,"0\n', 4), ("a,b\n\n1,2\n", 0), ("", 0), ("a,b", 0)]:
        path.write_text(text)
        skipped = Skipped()
        assert read_all(path, skipped) == ([dict(a="1", b="2")] if "1" in text else []) and skipped.count == count
    path.write_text("a,a\n1,2\n")
    with pytest.raises(ValueError, match="two columns have one name"):
        read_all(path)
    pa.parquet.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="two columns have one name"):
        read_all(tmp_path / "twice.parquet")


def test_json_files_of_every_build(tmp_path):
    path = tmp_path / "data.json"
    for value in (RECORDS, dict(version=1, data=RECORDS), dict(data=RECORDS, tags=["a"])):
        for indent in (None, 2):
            path.write_text(json.dumps(value, indent=indent))
            assert read_all(path) == RECORDS
    one = dict(messages=[dict(role="user", content="几点？")])
    for indent in (None, 2):
        path.write_text(json.dumps(one, indent=indent))
        assert read_all(path) == [one]
    for text in ('[{"a": 1}, 2', "text", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="data.json is not JSON"):
            read_all(path)
    path.write_text('[{"a": 1}, 2, "b", null]')
    skipped = Skipped()
    assert read_all(path, skipped) == [dict(a=1)] and [n for _, n, _ in skipped.first] == [2, 3, 4]


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(dict(text=name)))


def test_folders_and_globs_have_one_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "d/b.jsonl", "d/a/z.jsonl", "d/a.jsonl", "d/.git/x.jsonl", "d/.x.jsonl", "d/LICENSE", "d/notes.md", "d/[1].jsonl", "d/e/deep/c.json")
    want = ["d/[1].jsonl", "d/a/z.jsonl", "d/a.jsonl", "d/b.jsonl", "d/e/deep/c.json"]
    assert [name for name, _ in expand("d")] == want and [r["text"] for r in read_all("d")] == want
    assert [name for name, _ in expand("d/*")] == ["d/[1].jsonl", "d/a.jsonl", "d/b.jsonl"]
    assert [name for name, _ in expand("d/**/*.json*")] == want
    assert [name for name, _ in expand("d/[1].jsonl")] == ["d/[1].jsonl"], "a file of that very name"
    assert [s.name for s in find_sources(["d/b.jsonl", "d/a"])[0]] == ["d/b.jsonl", "d/a/z.jsonl"], "a list has its own order"
    sources, weights = find_sources({"d/a": 1, "d/[ab].jsonl": 0.5})
    assert [(s.name, s.group) for s in sources] == [("d/a/z.jsonl", 0), ("d/a.jsonl", 1), ("d/b.jsonl", 1)] and weights == [1.0, 0.5]
    (tmp_path / "empty").mkdir()
    for name, why in [("d/x*", "there is no file"), ("empty", "no file of a known format in the folder"), ("d/LICENSE", "format is not known"),
                      ("d/*.md", "format is not known"), ("d/none.jsonl", "no such file"), ("d/none", "no such file"), ("fengshen:qa_demo/trian.jsonl", "train.jsonl")]:
        with pytest.raises(ValueError, match=why):
            find_sources(name)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "2", None, True])
def test_a_useless_weight_is_refused(tmp_path, weight):
    make(tmp_path, "a.jsonl")
    with pytest.raises(ValueError, match="the weight of .* cannot be used"):
        find_sources({tmp_path / "a.jsonl": weight})


def test_what_is_no_data_is_refused(tmp_path):
    make(tmp_path, "a.jsonl")
    a = str(tmp_path / "a.jsonl")
    for data, why in [(None, "no data"), (3, "no data"), ([a, {}], "all paths, or all dicts"), ([[]], "all paths, or all dicts"), ([a, a], "named twice"),
                      ({"question": "问", "answer": "答"}, "for one record give a list")]:
        with pytest.raises(ValueError, match=why):
            find_sources(data)
    assert read_all("fengshen:qa_demo/valid.jsonl") and read_all([]) == []
    with pytest.raises(ValueError, match="record 2: a int, not an object"):
        list(read(Source("the list", [{}, 3]), refuse_line))


def test_datasets_and_iterables(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(RECORDS)
    assert read_all(data) == RECORDS and read_one(find_sources(data)[0][0], 3) == RECORDS[2]
    assert content_key(find_sources(data)[0][0], tmp_path) == content_key(find_sources(datasets.Dataset.from_list(RECORDS))[0][0], tmp_path) is not None
    data.save_to_disk(tmp_path / "saved")
    assert read_all(tmp_path / "saved") == RECORDS
    with pytest.raises(ValueError, match="several splits were given"):
        find_sources(datasets.DatasetDict(train=data))
    once = find_sources(iter(RECORDS))[0][0]
    assert content_key(once, tmp_path) is None and [r for _, r in read(once, refuse_line)] == RECORDS
    with pytest.raises(ValueError, match="read only once"):
        list(read(once, refuse_line))
    many = find_sources(data.to_iterable_dataset())[0][0]
    assert [r for _, r in read(many, refuse_line)] == [r for _, r in read(many, refuse_line)] == RECORDS


def test_a_hub_dataset_that_cannot_be_reached(monkeypatch):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set, and it is not in the cache.*hf download nobody/nothing --repo-type dataset"):
        find_sources("nobody/nothing:validation")
    assert not datasets.config.HF_HUB_OFFLINE, "as it was"


def test_a_hub_dataset_is_asked_for_its_split(monkeypatch):
    import datasets

    from fengshen.data.task_dataloader import records

    asked = []

    def load(name, split):
        asked.append((name, split))
        if name == "org/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist on the Hub")
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(records, "why_offline", lambda: "")
    monkeypatch.setattr(datasets, "load_dataset", load)
    sources, weights = find_sources({"org/name:train[:10%]": 1, "org/name-v1.5": 2})
    assert asked == [("org/name", "train[:10%]"), ("org/name-v1.5", "train")] and [s.name for s in sources] == ["org/name:train[:10%]", "org/name-v1.5"]
    assert read_all("org/name") == RECORDS
    with pytest.raises(ValueError, match="nor a hub dataset: Dataset 'org/none' doesn't exist.*check the spelling"):
        find_sources("org/none")
    for path in ("/org/name", "./org/name", "org/name.jsonl", "a/b/c", "tests/none"):
        with pytest.raises(ValueError, match="no such file"):
            find_sources(path)


def test_skipped_lines_are_written_and_twenty_remembered(tmp_path):
    path, out = tmp_path / "data.jsonl", tmp_path / "run" / "skipped.jsonl"
    path.write_bytes(b"x\xff\n" * 50 + b"y" * 5000)
    for _ in range(2):
        skipped = Skipped(out)
        assert read_all(path, skipped) == []
        lines = [json.loads(line) for line in out.read_text("utf8").splitlines()]
        assert skipped.count == len(lines) == 51 and len(skipped.first) == 20
        assert len(lines[-1]["text"]) == 1000 and lines[0] == dict(file=str(path), line=1, reason=skipped.first[0][2], text="x\ufffd")
    Skipped(out)
    assert not out.exists(), "nothing was skipped this time"


def test_the_key_follows_the_content(tmp_path, monkeypatch):
    a, b, c = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.csv"))
    for path in (a, b, c):
        path.write_text('{"text": "一"}\n')
    keys = [content_key(Source("", path), tmp_path) for path in (a, b, c)]
    assert keys[0] == keys[1] != keys[2], "the same bytes read as another format are other records"
    from fengshen.data.task_dataloader import records

    monkeypatch.setattr(records, "file_key", lambda path: pytest.fail("it was read again"))
    assert [content_key(Source("", path), tmp_path) for path in (a, b, c)] == keys
    monkeypatch.undo()
    a.write_text('{"text": "二"}\n')
    assert content_key(Source("", a), tmp_path) != keys[0]
    for damage in (b"", b"[]", b"{", b"\xff", b'{"x": 1}'):
        (tmp_path / "content_keys.json").write_bytes(damage)
        assert content_key(Source("", b), tmp_path) == keys[1]
    lists = [[dict(a="一")], [dict(a="二")], [dict(a="一"), dict(a="一")], [], [dict(b="一")], [dict(a=1)], [dict(a=True)], [{(1,): "\ud83d"}]]
    assert len({content_key(Source("", data), tmp_path) for data in lists}) == len(lists)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet", ".arrow", ".jsonl.zst"])
def test_a_large_file_is_read_in_constant_memory(tmp_path, kind):
    path = pack(tmp_path / f"data{kind}", content("." + kind.split(".")[1], [dict(text=f"{i}" + "长" * 300) for i in range(40_000)]))
    tracemalloc.start()
    try:
        arrow = [pa.total_allocated_bytes() for number, _ in read(Source("", path), refuse_line) if number % 1000 == 1]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(arrow) == 40 and peak < 12 << 20 and max(arrow) < 12 << 20, f"{peak / 2**20:.0f} and {max(arrow) / 2**20:.0f} MiB for 36 MB"


def test_importing_loads_no_arrow():
    code = "import sys; import fengshen.data.task_dataloader.records, fengshen.data.task_dataloader.shapes\nprint([m for m in ('pyarrow', 'datasets', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
