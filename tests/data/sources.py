"""The same twelve pictures and captions as every kind of source that is read."""

import csv
import json

from tar_files import encoded, picture, write_tar

CLASSES = ("dog", "house", "tree")
CAPTIONS = [f'a "red", round {CLASSES[i % 3]}\nnumber {i}' if i == 5 else f"{CLASSES[i % 3]} number {i}, ünïcode" for i in range(12)]
PICTURES = [encoded(picture(i)) for i in range(12)]


def pictures(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(PICTURES):
        (folder / f"{i:02d}.png").write_bytes(data)


def delimited(path, separator, header=("filepath", "title"), **options):
    pictures(path.parent / "pictures")
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=separator, **options)
        rows.writerow(header)
        rows.writerows((f"pictures/{i:02d}.png", caption) for i, caption in enumerate(CAPTIONS))
    return str(path)


def json_lines(path):
    pictures(path.parent / "pictures")
    rows = ({"file_name": f"pictures/{i:02d}.png", "text": caption} for i, caption in enumerate(CAPTIONS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def files(folder):
    pictures(folder / "000")
    for i, caption in enumerate(CAPTIONS):
        (folder / "000" / f"{i:02d}.txt").write_text(caption, encoding="utf-8")
    return str(folder)


def arrow_table(image):
    import pyarrow

    return pyarrow.table({"key": [f"{i:02d}" for i in range(12)], image: PICTURES, "caption": CAPTIONS})


def parquet(path):
    import pyarrow.parquet

    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(arrow_table("jpg"), path, row_group_size=5)
    return str(path)


def features(table, **types):
    """With what ``datasets`` writes about its columns."""
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": types}})})


def hugging_face(folder, split=None):
    """As ``save_to_disk`` writes it: two files of a stream of batches each; the first picture lies in a file of its own."""
    import pyarrow
    import pyarrow.ipc

    folder = folder / split if split else folder
    pictures(folder / "pictures")
    cells = [{"bytes": None, "path": "pictures/00.png"}, *({"bytes": data, "path": None} for data in PICTURES[1:])]
    table = features(pyarrow.table({"photo": cells, "label": [i % 3 for i in range(12)], "caption": CAPTIONS}),
                     photo={"_type": "Image"}, label={"_type": "ClassLabel", "names": list(CLASSES)},
                     caption={"dtype": "string", "_type": "Value"})
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 7), table.slice(7)), strict=True):
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(part, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_indices_data_files": None}))
    return str(folder)


def tar(path):
    path.parent.mkdir(exist_ok=True)
    return write_tar(path, [member for i, (data, caption) in enumerate(zip(PICTURES, CAPTIONS, strict=True))
                            for member in ((f"{i:02d}.png", data), (f"{i:02d}.txt", caption.encode()))])


MAKERS = {
    "tar": lambda folder: tar(folder / "x.tar"),
    "open_clip's csv": lambda folder: delimited(folder / "x.csv", "\t"),
    "csv": lambda folder: delimited(folder / "x.csv", ","),
    "quoted tsv": lambda folder: delimited(folder / "x.tsv", "\t", quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "named columns": lambda folder: delimited(folder / "x.csv", ";", ("where", "what")) + "?image=where&caption=what&sep=;",
    "json lines": lambda folder: json_lines(folder / "x.jsonl"),
    "folder with a table": lambda folder: json_lines(folder / "metadata.jsonl") and str(folder),
    "folder of files": lambda folder: files(folder / "files"),
    "parquet": lambda folder: parquet(folder / "x.parquet"),
    "folder of parquet": lambda folder: parquet(folder / "parts" / "x.parquet").rpartition("/")[0],
    "datasets": lambda folder: hugging_face(folder / "saved"),
}
