"""Tables, charts and the page of made-up results, against values worked out by hand."""

import base64
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from synthetic_results import CPU, GPU, NASTY, ceilings, gpu, row, wrong

from resnet_triton.bench import output, report
from resnet_triton.bench.results import Results, Step, load, speedup
from resnet_triton.support.terminal import printable

pytest.importorskip("rich")
matplotlib = pytest.importorskip("matplotlib")
page = pytest.importorskip("resnet_triton.bench.page")

ALL = {"gpu": gpu, "wrong": wrong, "one": lambda: Results([row()]), "empty": Results}
NAME = printable(NASTY)


def column(table, name):
    return [cells[[c.lstrip(">") for c in table.columns].index(name)] for cells in table.rows]


def only(view_tasks):
    (tasks,) = view_tasks.values()
    return tasks


# --- tables ----------------------------------------------------------------------------------------------------------


def test_summary_compares_with_the_best_right_alternative():
    (table,) = report.summaries(wrong(), "model")
    assert column(table, "batch") == ["1", "4", "8", "16", "32", "64"]
    assert column(table, "speed-up") == [
        "1.50×", "ours is WRONG", "no valid time of ours", "no valid alternative", "0.89×", "no valid alternative",
    ]  # fmt: skip
    assert column(table, "best alternative") == ["eager", "eager", "eager", "", NAME, ""]
    remarks = column(table, "remarks")
    assert remarks[0] == "compiled WRONG: error 0.25, limit 0.0001"
    assert remarks[1] == "resnet_triton WRONG: error not a number, limit 0.0001"
    assert remarks[2] == "resnet_triton failed: CUDA out of memory"
    assert remarks[4] == "slower"
    assert remarks[5] == "eager not checked"


def test_details_hold_every_row():
    (table,) = report.details(wrong())
    assert len(table.rows) == len(wrong().rows)
    first = dict(zip([c.lstrip(">") for c in table.columns], table.rows[0], strict=True))
    assert (first["p50, ms"], first["p20, ms"], first["p80, ms"], first["images/s"]) == ("2.00", "1.80", "2.40", "500")
    assert "0" in column(table, "peak, MiB")
    table = next(report.details(gpu()))
    assert column(table, "first call, s")[0] == "24.0"


def test_peak_memory_stands_beside_each_time_of_a_model():
    table = next(report.summaries(gpu(), "model"))
    names = [name.lstrip(">") for name in table.columns]
    assert [names[names.index(name) + 1] for name in ("ours, ms", "best, ms")] == ["ours, MiB", "best, MiB"]
    for whose in ("ours", "best"):
        times, peaks = (column(table, f"{whose}, {unit}") for unit in ("ms", "MiB"))
        assert [bool(time) for time in times] == [bool(peak) for peak in peaks]
    assert not any("MiB" in name for layers in report.summaries(gpu(), "kernel") for name in layers.columns)


def test_headline_says_the_mean_the_losses_and_the_gaps():
    (line,) = report.headlines(wrong())
    mean = math.sqrt(3 / 2 * 8 / 9)
    assert f"{mean:.2f}× as fast as the best alternative, the geometric mean of 2 cases (0.89× to 1.50×)" in line
    assert f"Slower in 1: batch 32 (0.89× against {NAME})." in line
    assert "No speed-up in 4 more: batch 4 (ours is WRONG), batch 8 (no valid time of ours)" in line
    assert line.endswith("and 1 more, all in the tables.")
    (line,) = report.headlines(Results([row()]))
    assert line.endswith("no speed-up can be given: batch 1 (no valid alternative).")
    (line,) = report.headlines(Results([row(), row("eager", 1, 2.0)]))
    assert line.endswith("2.00× as fast as the best alternative, the geometric mean of 1 case (2.00× to 2.00×). "
                         "Slower in none.")  # fmt: skip


def test_floor_comes_from_the_measured_ceilings():
    rows = [row("resnet_triton", 1, 0.004, suite="kernel", layer="a", flops=2_000_000, bytes=1000, dtype="float16"),
            row("cuDNN", 1, 0.006, suite="kernel", layer="a", flops=2_000_000, bytes=1000, dtype="float16"),
            row("resnet_triton", 1, 0.004, suite="kernel", layer="b", flops=0, bytes=3000, dtype="float16"),
            row("cuDNN", 1, 0.002, suite="kernel", layer="b", flops=0, bytes=3000, dtype="float16")]  # fmt: skip
    limits = [*ceilings("float16", 1e9, 1e12), *ceilings("float32", 1e9, 5e12)]
    (table,) = report.summaries(Results(rows, limits), "kernel")
    assert column(table, "layer") == ["a", "b"]
    assert column(table, "ours, µs") == ["4.00", "4.00"]
    assert column(table, "floor, µs") == ["2.00", "3.00"]  # by FLOPs, by bytes
    assert column(table, "floor / ours") == ["50%", "75%"]
    assert column(table, "speed-up") == ["1.50×", "0.50×"]
    elsewhere = [replace(r, environment=GPU) for r in rows]
    for table in report.summaries(Results(rows + elsewhere, limits), "kernel"):
        assert ">floor, µs" not in table.columns, "a ceiling does not say whose it is"


def test_devices_dtypes_and_clocks_are_kept_apart():
    rows = [row("resnet_triton", 1, 4.0), row("eager", 1, 8.0),
            row("eager", 1, 1.0, environment=GPU), row("eager", 1, 1.0, dtype="float16"),
            row("eager", 1, 1.0, clock="gpu"), row("eager", 1, 1.0, l2="cold"), row("eager", 1, 1.0, image=64),
            row("eager", 1, 1.0, environment={**CPU, "threads": 1}),
            row("eager", 1, 1.0, model="resnet34")]  # fmt: skip
    found = report.views(Results(rows), "model")
    assert len(found) == 8
    assert "Synthetic CPU 9000, 1 thread" in {view.place for view in found}
    assert [ratio for tasks in found.values() for task in tasks if (ratio := speedup(task))] == [2.0]


def test_gpu_time_and_a_cold_cache_are_preferred():
    found = report.views(gpu(), "model")
    assert [(view.clock, view.l2) for view in found] == [("gpu", "cold"), ("gpu", "warm"), ("wall", "warm")]
    (view,) = report.views(gpu(), "model", preferred=True)
    assert "GPU time, L2 cache cold" in str(view)
    assert next(page.charts(gpu()))[0] == f"Speed-up over the best alternative. {view}"


def test_steps_that_failed_are_named():
    results = Results([row()], steps=[Step("exact", "fc", 1.0, "AssertionError: 3 runs", {}, None)])
    *_, table = report.tables(results)
    assert (table.title, table.rows) == ("Steps that failed", [["exact", "fc", "AssertionError: 3 runs"]])


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0, "0"), (0.0123456, "0.0123"), (1.005, "1.00"), (45.678, "45.7"), (999.4, "999"),
     (12345.6, "12,346")],
)  # fmt: skip
def test_three_digits_and_no_exponent(value, text):
    assert report.digits(value) == text


def test_show_prints_the_red_rows_and_no_control_characters(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # or long cells are folded
    report.show(wrong())
    text = capsys.readouterr().out
    assert "ours is WRONG" in text
    assert "failed: CUDA out of memory" in text
    assert "\x1b" not in text
    report.show(Results())
    assert capsys.readouterr().out == "No results.\n"


def test_markdown_keeps_its_columns_whatever_the_names():
    text = report.as_markdown(wrong())
    assert NASTY not in text
    assert "\x1b" not in text
    assert not re.search(r"(?<!\\)[<>&$]", text)
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert "resnet_triton" in text, "an underscore within a word needs no backslash"


# --- the page --------------------------------------------------------------------------------------------------------


def test_bars_are_as_long_as_the_speed_ups():
    tasks = only(report.views(gpu(), "model", preferred=True))
    axes = page.speedups(tasks, [str(task[0].batch) for task in tasks]).axes[0]
    expected = [speedup(task) for task in tasks]
    assert [bar.get_width() for bar in axes.patches] == expected
    greys = [bar.get_facecolor() == matplotlib.colors.to_rgba(page._LOSS) for bar in axes.patches]
    assert greys == [ratio < 1 for ratio in expected] == [False, False, True]
    others = ["TensorRT", "TensorRT", "TensorRT"]
    assert [t.get_text() for t in axes.texts] == [f"{r:.2f}× {o}" for r, o in zip(expected, others, strict=True)]


def test_no_bar_where_ours_is_wrong():
    tasks = only(report.views(wrong(), "model"))
    axes = page.speedups(tasks, [str(task[0].batch) for task in tasks]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1.5, 0, 0, 0, 8 / 9, 0])
    assert axes.texts[1].get_text() == "ours is WRONG"


def test_curves_show_the_medians_and_break_where_there_is_none():
    latency, throughput = page.curves(only(report.views(wrong(), "model"))).axes
    drawn = {line.get_label(): line for line in throughput.lines}
    assert set(drawn) == {"resnet_triton", "eager", NAME}
    assert drawn["resnet_triton"].get_ydata()[0] == pytest.approx(500)
    ours = latency.lines[0].get_ydata()
    assert [math.isnan(y) for y in ours] == [False, True, True, False, False, False]
    assert [y for y in latency.lines[1].get_ydata() if y == y] == pytest.approx([3, 9, 12])


class Reader(HTMLParser):
    """Checks that every tag is closed, and keeps tags, images and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.text = [], Counter(), [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("name", ALL)
def test_page_is_whole_and_loads_nothing_and_says_everything_in_words_too(name):
    results = ALL[name]()
    text = page.render(results)
    reader = Reader(text)
    assert not {"script", "link", "iframe", "object", "svg"} & set(reader.tags)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
    drawings = [image["src"].removeprefix("data:image/svg+xml;base64,") for image in reader.images]
    assert [base64.b64decode(drawing)[:5] for drawing in drawings] == [b"<?xml"] * len(list(page.charts(results)))
    assert all(image["alt"] for image in reader.images)
    assert NASTY not in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    content = " ".join(reader.text)
    for table in report.tables(results):
        assert table.title in content
        assert all(cell in content for cells in table.rows for cell in cells)
    assert all(line in content for line in report.headlines(results) or ["No results."])


def test_red_cells_are_red():
    text = page.render(wrong())
    assert '<td class="right red">ours is WRONG</td>' in text
    assert '<td class=" red">resnet_triton failed: CUDA out of memory</td>' in text


def test_same_results_same_page_whatever_a_reader_prefers():
    first = page.render(wrong())
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path", "text.usetex": True}):
        assert page.render(wrong()) == first


def test_names_in_any_script_need_no_font_here():
    assert "快い" in " ".join(Reader(page.render(Results([row("快い"), row()]))).text)


def test_files_are_written_and_read_back(tmp_path):
    assert output.write(gpu(), tmp_path / "new") == f"written: {tmp_path}/new/results.html, .md and .json"
    names = ["results.html", "results.json", "results.md"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    assert load(tmp_path / "new") == gpu()


def test_only_charts_need_matplotlib(tmp_path, monkeypatch):
    output.write(gpu(), tmp_path)
    monkeypatch.delitem(sys.modules, "resnet_triton.bench.page")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    said = output.write(wrong(), tmp_path)
    assert re.fullmatch(r"written: \S+/results.md and .json, but no charts \(.*\): pip install matplotlib", said), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"], "no page of others"
