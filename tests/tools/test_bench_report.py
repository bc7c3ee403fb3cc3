"""Tables, charts and the page of made-up results, against values worked out by hand."""

import csv
import html
import io
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from synthetic_results import CPU, GPU, NASTY, ceilings, cpu, gpu, layers, prediction, row, wrong

from resnet_triton.bench import report
from resnet_triton.bench.report import headline, tables, views
from resnet_triton.bench.results import Results, load, speedup
from resnet_triton.support.terminal import printable

pytest.importorskip("rich")
matplotlib = pytest.importorskip("matplotlib")
REPORT = "resnet_triton.bench.report"
canvas, charts, page = (pytest.importorskip(f"{REPORT}.{name}") for name in ("canvas", "charts", "page"))

ALL = {"cpu": cpu, "gpu": gpu, "wrong": wrong, "one": lambda: Results([row()]), "empty": Results}
NAME = printable(NASTY)


def column(table, name):
    return [cells[[c.lstrip(">") for c in table.columns].index(name)] for cells in table.rows]


def only(view_tasks):
    (tasks,) = view_tasks.values()
    return tasks


# --- tables ----------------------------------------------------------------------------------------------------------


def test_summary_compares_with_the_best_right_alternative():
    (table,) = tables.summaries(wrong(), "model")
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


def test_details_hold_every_row_and_a_ratio_only_for_ours():
    (table,) = tables.details(wrong())
    assert len(table.rows) == len(wrong().rows)
    assert [cell for cell in column(table, "speed-up") if cell] == ["1.50× against eager", f"0.89× against {NAME}"]
    first = dict(zip([c.lstrip(">") for c in table.columns], table.rows[0], strict=True))
    assert (first["p50, ms"], first["p20, ms"], first["p80, ms"], first["images/s"]) == ("2.00", "1.80", "2.40", "500")
    assert "0" in column(table, "peak, MiB")
    (table,) = tables.details(cpu())
    assert column(table, "first call cold, s")[4] == "24.0"
    assert column(table, "first call warm, s")[4] == "3.10"


def test_headline_says_the_mean_the_losses_and_the_gaps():
    (line,) = headline.headlines(wrong())
    mean = math.sqrt(3 / 2 * 8 / 9)
    assert f"{mean:.2f}× as fast as the best alternative, the geometric mean of 2 cases (0.89× to 1.50×)" in line
    assert f"Slower in 1: batch 32 (0.89× against {NAME})." in line
    assert "No speed-up in 4 more: batch 4 (ours is WRONG), batch 8 (no valid time of ours)" in line
    assert line.endswith("and 1 more, all in the tables.")
    (line,) = headline.headlines(Results([row()]))
    assert line.endswith("no speed-up can be given: batch 1 (no valid alternative).")
    (line,) = headline.headlines(Results([row(), row("eager", 1, 2.0)]))
    assert line.endswith("2.00× as fast as the best alternative, the geometric mean of 1 case (2.00× to 2.00×). "
                         "Slower in none.")  # fmt: skip


def test_floor_comes_from_the_measured_ceilings():
    rows = [row("resnet_triton", 1, 0.004, suite="kernel", layer="a", flops=2_000_000, bytes=1000, dtype="float16"),
            row("cuDNN", 1, 0.006, suite="kernel", layer="a", flops=2_000_000, bytes=1000, dtype="float16"),
            row("resnet_triton", 1, 0.004, suite="kernel", layer="b", flops=0, bytes=3000, dtype="float16"),
            row("cuDNN", 1, 0.002, suite="kernel", layer="b", flops=0, bytes=3000, dtype="float16")]  # fmt: skip
    limits = [*ceilings("float16", 1e9, 1e12), *ceilings("float32", 1e9, 5e12)]
    (table,) = tables.summaries(Results(rows, limits), "kernel")
    assert column(table, "layer") == ["a", "b"]
    assert column(table, "ours, µs") == ["4.00", "4.00"]
    assert column(table, "floor, µs") == ["2.00", "3.00"]  # by FLOPs, by bytes
    assert column(table, "floor / ours") == ["50%", "75%"]
    assert column(table, "speed-up") == ["1.50×", "0.50×"]
    elsewhere = [replace(r, environment=GPU) for r in rows]
    for table in tables.summaries(Results(rows + elsewhere, limits), "kernel"):
        assert ">floor, µs" not in table.columns, "a ceiling does not say whose it is"


def test_devices_dtypes_and_clocks_are_kept_apart():
    rows = [row("resnet_triton", 1, 4.0), row("eager", 1, 8.0),
            row("eager", 1, 1.0, environment=GPU), row("eager", 1, 1.0, dtype="float16"),
            row("eager", 1, 1.0, clock="gpu"), row("eager", 1, 1.0, l2="cold"), row("eager", 1, 1.0, image=64),
            row("eager", 1, 1.0, environment={**CPU, "threads": 1}),
            row("eager", 1, 1.0, model="resnet34")]  # fmt: skip
    found = views.views(Results(rows), "model")
    assert len(found) == 8
    assert "Synthetic CPU 9000, 1 thread" in {view.place for view in found}
    assert [ratio for tasks in found.values() for task in tasks if (ratio := speedup(task))] == [2.0]


def test_gpu_time_and_a_cold_cache_are_preferred():
    found = views.views(gpu(), "model")
    assert [(view.clock, view.l2) for view in found] == [("gpu", "cold"), ("gpu", "warm"), ("wall", "uncontrolled")]
    (view,) = views.preferred(found)
    assert "GPU time, L2 cache cold" in str(view)
    assert all(task[0].clock == "gpu" and task[0].l2 == "cold" for task in found[view])
    titles = [chart.title for chart in charts.charts(gpu())]
    assert titles[0] == f"Speed-up over the best alternative. {view}"


def test_predictions_are_never_mistaken():
    table = tables.others(Results(predictions=[prediction()]))[0]
    assert table.title == "predicted, not measured"
    figures = [name for name in table.columns if name not in ("device", ">batch", "dtype", "layer", "kernel")]
    assert len(figures) == 6
    assert all("predicted" in name for name in figures)
    assert column(table, "predicted floor, µs") == ["0.310"]
    assert "## predicted, not measured" in tables.as_markdown(gpu())


def test_predictions_are_summed_in_a_terminal():
    launches = [prediction(floor_s=1e-6, flops=10), prediction(floor_s=2e-6, flops=20), prediction(batch=8)]
    first, second = tables.others(Results(predictions=launches), sums=True)[0].rows
    assert "all 2" in first
    assert first[-1] == "3.00"
    assert "30" in first
    assert "all 1" in second
    unknown = tables.others(Results(predictions=[*launches, prediction(floor_s=None)]), sums=True)[0].rows[0]
    assert unknown[-1] == "", "a sum of which a part is unknown is unknown"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0, "0"), (0.0123456, "0.0123"), (1.005, "1.00"), (45.678, "45.7"), (999.4, "999"),
     (12345.6, "12,346")],
)  # fmt: skip
def test_three_digits_and_no_exponent(value, text):
    assert tables.digits(value) == text


def test_show_prints_the_red_rows_and_no_control_characters(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # or long cells are folded
    tables.show(wrong())
    text = capsys.readouterr().out
    assert "ours is WRONG" in text
    assert "failed: CUDA out of memory" in text
    assert "\x1b" not in text
    tables.show(Results())
    assert capsys.readouterr().out == "No results.\n"


def test_markdown_keeps_its_columns_whatever_the_names():
    text = tables.as_markdown(wrong())
    assert NASTY not in text
    assert "\x1b" not in text
    assert not re.search(r"(?<!\\)[<>&$]", text)
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert "resnet_triton" in text, "an underscore within a word needs no backslash"


def test_csv_has_a_line_for_each_row_and_a_column_for_each_fact():
    results = wrong()
    results.rows.append(row("=HYPERLINK(1)", config={"BLOCK_M": 64}))
    read = list(csv.DictReader(io.StringIO(tables.as_csv(results))))
    assert len(read) == len(results.rows)
    assert "samples_s" not in read[0]
    assert (read[0]["p50_s"], read[0]["device"], read[0]["commit"]) == ("0.002", CPU["device"], CPU["commit"])
    assert (read[2]["correct"], read[2]["error_after"]) == ("False", "0.25")
    assert NAME in {line["alternative"] for line in read}
    assert read[-1]["alternative"] == "'=HYPERLINK(1)"
    assert read[-1]["config"] == '{"BLOCK_M": 64}'


# --- charts ----------------------------------------------------------------------------------------------------------


def test_bars_are_as_long_as_the_speed_ups():
    tasks = views.views(gpu(), "model")
    tasks = tasks[views.preferred(tasks)[0]]
    figure = charts.speedups(tasks, lambda task: f"batch {task[0].batch}")
    bars = figure.axes[0].patches
    expected = [speedup(task) for task in tasks]
    assert [bar.get_width() for bar in bars] == expected
    assert [bool(bar.get_hatch()) for bar in bars] == [ratio < 1 for ratio in expected]
    assert any(bar.get_hatch() for bar in bars)
    assert [1, 1] in [list(line.get_xdata()) for line in figure.axes[0].lines]
    notes = [text.get_text() for text in figure.axes[0].child_axes[0].get_yticklabels()]
    assert notes == [f"{ratio:.2f}× against TensorRT 10.3" for ratio in expected]


def test_no_bar_where_ours_is_wrong():
    axes = charts.speedups(only(views.views(wrong(), "model")), lambda task: str(task[0].batch)).axes[0]
    assert {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in axes.patches} == {
        0: pytest.approx(1.5), 4: pytest.approx(8 / 9),
    }  # fmt: skip
    assert axes.child_axes[0].get_yticklabels()[1].get_text() == "ours is WRONG"


def test_lines_show_the_medians_and_break_where_there_is_none():
    rows = wrong().rows
    looks = canvas.appearances(rows)
    axes = charts.lines(rows, charts.LATENCY, looks).axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    assert set(drawn) == {"resnet_triton", "eager", NAME}
    assert list(drawn["eager"].get_xdata()) == [1, 4, 8, 16, 32, 64]
    assert [y for y in drawn["eager"].get_ydata() if y == y] == pytest.approx([3, 9, 12])
    ours = drawn["resnet_triton"].get_ydata()
    assert [math.isnan(y) for y in ours] == [False, True, True, False, False, False]
    bars = {tuple(c.get_color()[0]): c.get_segments() for c in axes.collections}
    assert bars[matplotlib.colors.to_rgba(canvas.OURS)][0][:, 1] == pytest.approx([1.8, 2.4])
    axes = charts.lines(rows, charts.THROUGHPUT, looks).axes[0]
    ours = next(line for line in axes.lines if line.get_label() == "resnet_triton")
    assert ours.get_ydata()[0] == pytest.approx(500)


def test_roofline_has_every_layer_and_both_ceilings():
    results = cpu()
    tasks = only(views.views(results, "kernel"))
    axes = charts.roofline(tasks, views.roof(results, "float32")).axes[0]
    points = {line.get_label(): line for line in axes.lines if line.get_marker() != "None"}
    work = [task for task in tasks if task[0].flops]
    assert list(points["ours"].get_xdata()) == [task[0].flops / task[0].bytes for task in work]
    ours = [task[0].flops / task[0].p50_s / 1e9 for task in work]
    assert list(points["ours"].get_ydata()) == pytest.approx(ours)
    others = [task[0].flops / min(r.p50_s for r in task[1:]) / 1e9 for task in work]
    assert list(points["best alternative"].get_ydata()) == pytest.approx(others)
    assert points["best alternative"].get_markerfacecolor() == "none"
    texts = [text.get_text() for text in axes.texts]
    assert "memory 19.0 GB/s" in texts
    assert "matrix product 120 GFLOP/s" in texts
    flat = [line for line in axes.lines if list(line.get_ydata()) == pytest.approx([120, 120])]
    assert flat[0].get_xdata()[0] == pytest.approx(1.2e11 / 1.9e10)
    assert sum("layer" in text for text in texts) >= 2, "the best and the worst are named"


def test_start_up_shows_cold_and_warm():
    axes = charts.startup(cpu().rows).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "torch.compile max-autotune"
    assert {"24.0", "3.10", "0.300", "0.200"} <= {text.get_text() for text in axes.texts}
    for cold, warm in ((0.2, 0.201), (0.2, 0.2), (0.21, 0.2)):
        figure = charts.startup([row(first_call_cold_s=cold, first_call_warm_s=warm)])
        figure.draw_without_rendering()
        one, other = (text.get_window_extent() for text in figure.axes[0].texts)
        assert not one.overlaps(other)


def test_what_has_no_data_is_left_out():
    assert list(charts.charts(Results())) == []
    names = [chart.title.split(".")[0] for chart in charts.charts(Results([row()]))]
    assert names == ["Latency", "Throughput"]
    assert "Peak memory" not in " ".join(chart.title for chart in charts.charts(cpu()))
    assert "Peak memory" in " ".join(chart.title for chart in charts.charts(gpu()))


def words(figure):
    """Every text that is drawn, with its place."""
    found = []
    for axes in [a for top in figure.axes for a in (top, *top.child_axes)]:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 if tick.label1.get_visible() else tick.label2
                      for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]  # fmt: skip
            found.append(axis.label)
        found += [axes.title, *axes.texts]
    found += [text for legend in figure.legends for text in legend.get_texts()]
    return [
        (t.get_text(), matplotlib.text.Text.get_window_extent(t)) for t in found if t.get_text() and t.get_visible()
    ]


@pytest.mark.parametrize("name", ["cpu", "gpu", "wrong", "one"])
def test_no_text_covers_another_or_leaves_the_figure(name):
    for chart in charts.charts(ALL[name]()):
        chart.figure.draw_without_rendering()
        texts = words(chart.figure)
        assert len(texts) > 4
        for i, (text, box) in enumerate(texts):
            assert chart.figure.bbox.x0 <= box.x0 <= box.x1 <= chart.figure.bbox.x1, (chart.title, text)
            assert chart.figure.bbox.y0 <= box.y0 <= box.y1 <= chart.figure.bbox.y1, (chart.title, text)
            for other, place in texts[i + 1 :]:
                turned = text.startswith("memory ") or other.startswith(
                    "memory "
                )  # written along its line, above it: the upright box is too large
                assert turned or not box.overlaps(place), f"{chart.title}: {text!r} covers {other!r}"
        for label in chart.figure.axes[0].texts:
            if label.arrow_patch is not None:
                line = label.arrow_patch.get_transform().transform_path(label.arrow_patch.get_path())
                crossed = [text for text, box in texts if line.intersects_bbox(box) and text != label.get_text()]
                assert crossed == [], label.get_text()


def test_long_names_and_many_layers_stay_readable():
    long = {"resnet_triton": 0.8, "x" * 200: 0.7, "torch.compile max-autotune-no-cudagraphs frozen channels_last": 0.6}
    results = Results(layers(long, 3, 1e12))
    results.rows.extend(
        [row(name, batch, 3.0 * batch) for name in long for batch in (1, 2, 3, 4, 5, 6, 7, 8, 100, 101)]
    )
    for chart in charts.charts(results):
        chart.figure.draw_without_rendering()
        boxes = words(chart.figure)
        for i, (text, box) in enumerate(boxes):
            assert chart.figure.bbox.x0 <= box.x0 <= box.x1 <= chart.figure.bbox.x1, (chart.title, text)
            assert not box.count_overlaps([place for _, place in boxes[i + 1 :]]), (chart.title, text)


def contrast(colour, ground):
    def light(name):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(name)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    bright, dark = sorted((light(colour), light(ground)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_series_are_told_apart_without_colour_and_read_on_both_grounds():
    rows = gpu().rows[:108]
    looks = canvas.appearances(rows)
    names = {r.alternative for r in rows}
    assert len(names) == 12
    assert set(looks) == names
    assert len({look["marker"] for look in looks.values()}) == len(names)
    assert len({(look["color"], str(look["linestyle"])) for look in looks.values()}) == len(names)
    assert [name for name, look in looks.items() if look["color"] == canvas.OURS] == ["resnet_triton"]
    grounds = re.findall(r"--paper: (#\w+)", page._CSS)
    assert len(grounds) == 2
    for ground in grounds:
        for colour in (canvas.OURS, canvas.BLUE, canvas.GREEN, canvas.PURPLE):
            assert contrast(colour, ground) >= 3, (colour, ground)


# --- the page --------------------------------------------------------------------------------------------------------

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Checks that every tag is closed, and keeps tags, identifiers and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.text = [], Counter(), [], [], []
        self.attributes = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module", params=list(ALL))
def read(request):
    results = ALL[request.param]()
    text = page.render(results)
    return results, text, Reader(text)


def test_page_is_whole_and_loads_nothing(read):
    _, text, reader = read
    assert not {"script", "img", "iframe", "link", "object", "image"} & set(reader.tags)
    assert all(reference.startswith("#") for reference in reader.references)
    assert {reference[1:] for reference in reader.references} <= set(reader.ids)
    assert len(set(reader.ids)) == len(reader.ids)
    assert "@import" not in text
    loads = [value for tag, attributes in reader.attributes for name, value in attributes.items()
             if value and "http" in value and not name.startswith("xmlns") and tag != "meta"]  # fmt: skip
    assert loads == []
    policy = next(a["content"] for t, a in reader.attributes if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_page_says_everything_in_words_too(read):
    results, text, reader = read
    assert reader.tags["svg"] == len(list(charts.charts(results)))
    for tag, attributes in reader.attributes:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    assert text.count("<title>") == 1 + reader.tags["svg"]
    content = " ".join(reader.text)
    for table in tables.tables(results):
        assert table.title in content
        for cell in {cell for cells in table.rows for cell in cells}:
            assert cell in content
    for line in headline.headlines(results):
        assert line in content
    if not results.rows:
        assert "No results." in content


def test_colours_follow_the_page(read):
    results, text, _ = read
    for colour in (canvas.INK, canvas.GRID, canvas.PAPER):
        assert colour not in text
    if results.rows:
        assert "currentColor" in text
        assert "var(--grid)" in text
    assert "prefers-color-scheme: dark" in text


def test_axes_have_units(read):
    results, _, reader = read
    content = " ".join(reader.text)
    assert "mathdefault" not in content
    if results == gpu():
        for label in ("latency (ms)", "throughput (images/s)", "batch size (images)", "peak memory (MiB)",
                      "first call (s)", "performance (TFLOP/s)",
                      "arithmetic intensity (FLOP per byte of least traffic)",
                      "time of the best alternative / time of ours (×), 1 = equally fast"):  # fmt: skip
            assert label in content


def test_names_mean_themselves():
    text = page.render(wrong())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert NASTY not in text
    assert "evil" not in " ".join(re.findall(r"<b>([^<]*)</b>", text))
    assert NAME in drawn(text)
    tricky = f'{canvas.INK} id="x" url(#y)'
    assert tricky in drawn(page.render(Results([row(tricky), row("resnet_triton")])))


def drawn(text):
    return [html.unescape(words) for words in re.findall(r"<text[^>]*>([^<]*)</text>", text)]


def test_red_cells_are_red():
    text = page.render(wrong())
    assert '<td class="right red">ours is WRONG</td>' in text
    assert '<td class="left red">resnet_triton failed: CUDA out of memory</td>' in text


def test_same_results_same_page_whatever_a_reader_prefers():
    first = page.render(wrong())
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path", "text.usetex": True}):
        assert page.render(wrong()) == first


def test_a_drawing_has_no_date():
    first, again = (canvas.svg(charts.startup(cpu().rows)) for _ in range(2))
    assert first == again
    assert "<dc:date>" not in first


def test_names_in_any_script_need_no_font_here():
    assert "快い" in " ".join(Reader(page.render(Results([row("快い"), row()]))).text)


def test_files_are_written_and_read_back(tmp_path):
    paths = report.write(cpu(), tmp_path / "new")
    assert [path.name for path in paths] == ["results.json", "results.md", "results.csv", "results.html"]
    assert load(paths[0]) == cpu()
    assert paths[1].read_text("utf-8") == tables.as_markdown(cpu())
    assert paths[2].read_text("utf-8") == tables.as_csv(cpu())
    assert paths[3].read_text("utf-8") == page.render(cpu())


@pytest.mark.parametrize(
    "code",
    [
        "sys.modules['matplotlib'] = None; from resnet_triton.bench.report import show, write",
        "from resnet_triton.bench.report import page; assert 'matplotlib.pyplot' not in sys.modules",
    ],
)
def test_what_is_imported(code):
    """Tables need no matplotlib, and charts none of pyplot's state."""
    subprocess.run([sys.executable, "-c", f"import sys; {code}"], check=True, timeout=120)
