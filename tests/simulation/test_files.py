"""Local files: cells are what is written in them, and a file that cannot be used is named with what is wrong in it."""

import csv
import gzip
import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from fedrot.simulation import SimulationConfig, load_task
from fedrot.simulation.tasks.files import load_file

BERT_LORA = {"r": 2, "target_modules": ["query"]}


@pytest.fixture
def file(tmp_path):
    """A file of the given content."""

    def write(name, content):
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(tmp_path / name)

    return write


@pytest.fixture
def text(tiny_bert, file):
    """A configuration of a text classifier on a file of the given content."""

    def configure(name, content, **options):
        data = {
            "model": str(tiny_bert),
            "dataset": file(name, content),
            "lora": BERT_LORA,
            "clients": 2,
            "test_fraction": 0.2,
        }
        return SimulationConfig(**data | options)

    return configure


def rows(*labels, sites=("s",), texts=("a good film",)):
    """A CSV whose rows repeat these cells."""
    cells = [f"{texts[i % len(texts)]},{labels[i % len(labels)]},{sites[i % len(sites)]}\n" for i in range(30)]
    return "text,label,site\n" + "".join(cells)


def as_jsonl(values, name="label"):
    return "".join(json.dumps({"text": "a good film", name: values[i % len(values)]}) + "\n" for i in range(30))


CELLS = {
    "integers": (["1", "0", "-2"], [1, 0, -2]),
    "zeros before": (["01", "1", "001"], ["01", "1", "001"]),
    "fractions": (["0.5", "1", "1e3"], [0.5, 1.0, 1000.0]),
    "truth values": (["true", "false"], [True, False]),
    "truth values of Python": (["True", "False"], [True, False]),
    "truth values in two spellings": (["True", "true"], ["True", "true"]),
    "words": (["NA", "null", "", "yes"], ["NA", "null", "", "yes"]),
    "more than 64 bits": (["123456789012345678901234", "1"], ["123456789012345678901234", "1"]),
    "signs": (["+1", "1"], ["+1", "1"]),
}


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("case", CELLS)
def test_a_column_has_a_type_only_if_every_cell_is_written_so(file, case, suffix):
    cells, expected = CELLS[case]
    separator = "," if suffix == "csv" else "\t"
    content = f"n{separator}cell\n" + "".join(f"{i}{separator}{cell}\n" for i, cell in enumerate(cells))
    assert load_file(file(f"t.{suffix}", content))["cell"][:] == expected


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_literal_column_is_text_whatever_it_looks_like(file, suffix):
    cells = ["007", "5", "1.50", "true", ""]
    separator = "," if suffix == "csv" else "\t"
    path = file(f"t.{suffix}", f"n{separator}cell\n" + "".join(f"{i}{separator}{cell}\n" for i, cell in enumerate(cells)))
    assert load_file(path, ["cell"])["cell"][:] == cells


def test_a_csv_is_what_pythons_own_reader_finds(file):
    content = 'text,label\n"a, ""good""\nfilm",1\n"NA",0\n, 1\n'
    expected = list(csv.DictReader(content.splitlines(keepends=True)))
    assert load_file(file("t.csv", content), ["text", "label"]).to_list() == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "t.csv is empty: it has 0 bytes"),
        ("t.tsv", "", "t.tsv is empty: it has 0 bytes"),
        ("t.json", "", "t.json is empty: it has 0 bytes"),
        ("t.jsonl", "", "t.jsonl is empty: it has 0 bytes"),
        ("t.jsonl", "\n\n", "t.jsonl has 0 rows"),
        ("t.json", "[]", "t.json has 0 rows"),
        ("t.csv", "text,label\n", "t.csv has 0 rows below its header"),
        ("t.tsv", "text\tlabel\n", "t.tsv has 0 rows below its header"),
        ("t.csv", "text,label\na,b,1\nc,d,0\n", "the first row of .*t.csv has more cells than its header, which has 2"),
        ("t.csv", "text,label\né,1\n".encode("latin-1"), "t.csv cannot be read as csv: 'utf-8' codec"),
        ("t.csv.gz", gzip.compress(b"text,label\na,1\n", mtime=0), "t.csv.gz is compressed; unpack it"),
        ("t.jsonl.zst", b"x", "t.jsonl.zst is compressed; unpack it"),
        ("t.txt", "a film", "t.txt is of no known kind; use .csv, .tsv, .json, .jsonl"),
        ("t.parquet", b"PAR1", "t.parquet is of no known kind"),
        (
            "t.json",
            json.dumps({"version": 1, "data": [{"text": "a", "label": 0}] * 3}),
            r"t.json holds one object, not rows; its 'data' is a list of 3: .* jq -c '.data\[\]'",
        ),
        (
            "t.json",
            json.dumps({"text": ["a", "b"], "label": [0, 1]}),
            "t.json holds one object, not rows; its 'text', 'label' are lists: save one object a row",
        ),
    ],
)
@pytest.mark.parametrize("role", ["dataset", "test_dataset"])
def test_a_file_that_cannot_be_used_is_named(text, file, name, content, message, role):
    config = text("good.csv", rows("0", "1"), **{role: file(name, content)})
    with pytest.raises(ValueError, match=message):
        load_task(config)


def test_a_file_that_is_not_there_is_no_name_on_the_hub(text):
    for name in ("/no/such/rows.parquet", "/no/such/rows", "rows.csv.gz"):
        with pytest.raises(ValueError, match=f"{name} is not a file"):
            load_task(text("good.csv", rows("0", "1"), dataset=name))


@pytest.mark.parametrize(
    ("count", "fraction", "message"),
    [
        (1, 0.1, "t.csv has 1 row, of which test_fraction 0.1 holds out all"),
        (3, 0.9, "t.csv has 3 rows, of which test_f.* 0.9"),
    ],
)
def test_too_few_rows_to_hold_any_out_are_counted(text, count, fraction, message):
    with pytest.raises(ValueError, match=message):
        load_task(text("t.csv", "text,label\n" + "a,1\n" * count, test_fraction=fraction))


def test_one_row_is_enough_beside_a_test_file(text, file):
    task = load_task(text("t.csv", "text,label\na,1\n", test_dataset=file("test.csv", "text,label\na,1\n"), clients=1))
    assert len(task.train) == len(task.test) == 1


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("blank", ["", " "])
@pytest.mark.parametrize(
    ("column", "labels", "sites"), [("label", ("0", None, "1"), ("s", "t", "u")), ("site", ("0", "1"), ("s", None, "t"))]
)
def test_a_blank_cell_is_no_class_and_no_client(text, suffix, blank, column, labels, sites):
    content = rows(*(blank if x is None else x for x in labels), sites=[blank if x is None else x for x in sites])
    content = content if suffix == "csv" else content.replace(",", "\t")
    config = text(f"t.{suffix}", content, partition="column", partition_column="site")
    with pytest.raises(
        ValueError, match=rf"\d+ of 24 rows of the training data have nothing in column '{column}'; leave them"
    ):
        load_task(config)


def test_a_blank_class_is_refused_in_the_test_data_and_in_jsonl_too(text, file):
    test = file("test.csv", "text,label\na,0\nb,\nc,1\n")
    with pytest.raises(ValueError, match="1 of 3 rows of the test data have nothing in column 'label'"):
        load_task(text("t.csv", rows("0", "1"), test_dataset=test))
    with pytest.raises(ValueError, match=r"\d+ of 24 rows of the training data have nothing in column 'label'"):
        load_task(text("t.jsonl", as_jsonl(["yes", "", "no", ""])))


@pytest.mark.parametrize(
    ("name", "content", "classes"),
    [
        ("t.csv", rows("true", "false"), ["false", "true"]),
        ("t.csv", rows("True", "False"), ["false", "true"]),
        ("t.jsonl", as_jsonl([True, False]), ["false", "true"]),
        ("t.csv", rows("01", "1"), ["01", "1"]),
        ("t.tsv", rows("01", "1", "001").replace(",", "\t"), ["001", "01", "1"]),
        ("t.jsonl", as_jsonl(["01", "1"]), ["01", "1"]),
        ("t.csv", rows("10", "9"), ["10", "9"]),
        ("t.csv", rows("yes", "no"), ["no", "yes"]),
    ],
)
@pytest.mark.parametrize("task_name", ["text-classification", "causal-lm"])
def test_labels_are_as_many_classes_as_the_file_writes(text, llama, name, content, classes, task_name):
    options = {} if task_name == "text-classification" else {"model": llama, "task": task_name, "lora": {"r": 2}}
    task = load_task(text(name, content, text_column="text", label_column="label", **options))
    assert task.classes == classes
    assert set(task.labels) == set(range(len(classes)))


def test_truth_values_of_two_files_are_the_same_classes(text, file):
    task = load_task(
        text("t.jsonl", as_jsonl([True, False]), test_dataset=file("test.csv", "text,label\na,True\nb,False\n"))
    )
    assert sorted(task.test["label"][:]) == [0, 1]


@pytest.mark.parametrize(
    ("values", "content"),
    [
        ([["a", "b"], ["c"]], "lists of text"),
        ([[1], [2, 3]], "lists of int64"),
        ([{"x": "a"}, {"x": "b"}], "objects with x"),
        ([[{"role": "user", "content": "a"}]], "chat messages"),
        ([[{"from": "human", "value": "a"}]], "lists of objects with from, value"),
        ([1, "yes"], "values of more than one type"),
        (["a", ["b"]], "values of more than one type"),
    ],
)
@pytest.mark.parametrize("column", ["text", "label", "site"])
def test_a_column_of_something_else_is_named_with_its_content(text, column, values, content):
    base = {"text": "a good film", "label": 0, "site": "s"}
    lines = "".join(json.dumps(base | {column: values[i % len(values)]}) + "\n" for i in range(30))
    config = text("t.jsonl", lines, text_column="text", partition="column", partition_column="site")
    with pytest.raises(ValueError, match=f"column {column} of the training data holds {content}, not"):
        load_task(config)


def test_a_column_of_text_is_no_column_of_images(text):
    with pytest.raises(ValueError, match="column text of the training data holds text, not images"):
        load_task(text("t.csv", rows("0", "1"), task="image-classification", image_column="text"))
    with pytest.raises(ValueError, match="no column 'image'; its columns are text, label, site; set image_column"):
        load_task(text("t.csv", rows("0", "1"), task="image-classification"))


def questions(answers):
    return "".join(json.dumps({"question": "how many?", "answer": answers[i % len(answers)]}) + "\n" for i in range(9))


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_an_answer_is_trained_on_as_it_is_written(llama, file, suffix):
    cells, separator = ["007", "5", "1.50"], "," if suffix == "csv" else "\t"
    path = file(f"t.{suffix}", f"question{separator}answer\n" + "".join(f"how many?{separator}{x}\n" for x in cells * 3))
    templates = {"prompt_template": "{question}", "response_template": " {answer}"}
    options = {"model": llama, "dataset": path, "task": "causal-lm", "clients": 1, "test_fraction": 0.2}
    task = load_task(SimulationConfig(**options, **templates))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = [tokenizer.decode(row["input_ids"][row["prompt_tokens"] :]) for data in (task.train, task.test) for row in data]
    assert sorted(found) == sorted(f" {x}</s>" for x in cells * 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["007", 5], "column answer of the training data holds values of more than one type, .* in quotation marks"),
        ([5, True], "column answer of the training data holds values of more than one type"),
        ([5, 1.5], r"column answer of .*t.jsonl mixes fractions and 5 whole numbers, such that 5 would .* as 5.0"),
        (["2026-01-01", "2026-02-01"], "column answer of .*t.jsonl holds dates, .* save the rows as CSV"),
        ([["a"], ["b"]], "column answer of the training data holds lists of text"),
    ],
)
def test_answers_that_would_be_trained_on_in_another_form_are_refused(llama, file, values, message):
    templates = {"prompt_template": "{question}", "response_template": " {answer}"}
    options = {"model": llama, "dataset": file("t.jsonl", questions(values)), "task": "causal-lm", "clients": 1}
    with pytest.raises(ValueError, match=message):
        load_task(SimulationConfig(**options, **templates))


def test_a_format_of_numbers_has_numbers(llama, file):
    path = file("t.csv", "question,answer\n" + "how much?,1.5\n" * 9)
    templates = {"prompt_template": "{question}", "response_template": " {answer:.2f}"}
    task = load_task(SimulationConfig(model=llama, dataset=path, task="causal-lm", clients=1, **templates))
    assert task.train["answer"][:] == [1.5] * 8


def test_an_integer_column_is_what_datasets_makes_of_it(file):
    path = file("t.jsonl", as_jsonl([3, 1]))
    assert load_file(path)["label"][:] == Dataset.from_json(path)["label"][:]
