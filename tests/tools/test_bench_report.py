"""Tables, charts and the page of made-up results, against values worked out by hand."""

import html
import math
import re
import sys
from dataclasses import replace

import pytest
from synthetic_results import CPU, GPU, NASTY, ceilings, gpu, row, wrong

from resnet_triton.bench import output, report
from resnet_triton.bench.results import Results, Step, load, speedup

pytest.importorskip("rich")
matplotlib = pytest.importorskip("matplotlib")
page = pytest.importorskip("resnet_triton.bench.page")


def column(table, name):
    return [cells[[c.lstrip(">") for c in table.columns].index(name)] for cells in table.rows]


# --- tables ----------------------------------------------------------------------------------------------------------


def test_summary_compares_with_the_best_right_alternative():
    (table,) = report.summaries(wrong(), "model")
    assert column(table, "batch") == ["1", "4", "8", "16", "32", "64"]
    assert column(table, "speed-up") == [
        "1.50×", "ours is WRONG", "no valid time of ours", "no valid alternative", "0.89×", "no valid alternative",
    ]  # fmt: skip
    assert column(table, "best alternative") == ["eager", "eager", "eager", "", "compiled", ""]
    remarks = column(table, "remarks")
    assert remarks[:3] == [
        "compiled WRONG: error 0.25, limit 0.0001", "resnet_triton WRONG: error not a number, limit 0.0001",
        "resnet_triton failed: CUDA out of memory",
    ]  # fmt: skip
    assert remarks[4:] == ["slower", "eager not checked"]


def test_details_hold_every_row():
    (table,) = report.details(wrong())
    assert len(table.rows) == len(wrong().rows)
    first = dict(zip([c.lstrip(">") for c in table.columns], table.rows[0], strict=True))
    assert (first["p50, ms"], first["p20, ms"], first["p80, ms"], first["images/s"]) == ("2.00", "1.80", "2.40", "500")
    table = next(report.details(gpu()))
    assert (column(table, "first call, s")[0], column(table, "peak, MiB")[0]) == ("24.0", "2.86")
    assert column(next(report.summaries(gpu(), "model")), "ours, MiB") == ["2.86", "22.9", "732"]


def test_headline_says_the_mean_the_losses_and_the_gaps():
    (line,) = report.headlines(wrong())
    mean = math.sqrt(3 / 2 * 8 / 9)
    assert f"{mean:.2f}× as fast as the best alternative, the geometric mean of 2 cases (0.89× to 1.50×)" in line
    assert "Slower in 1: batch 32 (0.89× against compiled)." in line
    assert "No speed-up in 4 more: batch 4 (ours is WRONG), batch 8 (no valid time of ours)" in line
    (line,) = report.headlines(Results([row()]))
    assert line.endswith("no speed-up can be given: batch 1 (no valid alternative).")


def test_floor_comes_from_the_measured_ceilings():
    rows = [row("resnet_triton", 1, 0.004, suite="kernel", layer="a", flops=2_000_000, bytes=1000, dtype="float16"),
            row("cuDNN", 1, 0.006, suite="kernel", layer="a", flops=2_000_000, bytes=1000, dtype="float16"),
            row("resnet_triton", 1, 0.004, suite="kernel", layer="b", flops=0, bytes=3000, dtype="float16"),
            row("cuDNN", 1, 0.002, suite="kernel", layer="b", flops=0, bytes=3000, dtype="float16")]  # fmt: skip
    limits = [*ceilings("float16", 1e9, 1e12), *ceilings("float32", 1e9, 5e12)]
    (table,) = report.summaries(Results(rows, limits), "kernel")
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
    assert [ratio for tasks in found.values() for task in tasks if (ratio := speedup(task))] == [2.0]


def test_gpu_time_and_a_cold_cache_are_preferred():
    found = report.views(gpu(), "model")
    assert [(view.clock, view.l2) for view in found] == [("gpu", "cold"), ("gpu", "warm"), ("wall", "warm")]
    assert [(view.clock, view.l2) for view in report.views(gpu(), "model", preferred=True)] == [("gpu", "cold")]


def test_steps_that_failed_are_named():
    results = Results([row()], steps=[Step("exact", "fc", 1.0, "AssertionError: 3 runs", {}, None)])
    *_, table = report.tables(results)
    assert (table.title, table.rows) == ("Steps that failed", [["exact", "fc", "AssertionError: 3 runs"]])


def test_three_digits_and_no_exponent():
    assert [report.digits(value) for value in (None, 0, 0.0123456, 45.678, 12345.6)] == [
        "", "0", "0.0123", "45.7", "12,346",
    ]  # fmt: skip


def test_every_form_says_what_is_wrong_and_means_itself(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # or long cells are folded
    report.show(wrong())
    forms = capsys.readouterr().out, report.as_markdown(wrong()), page.render(wrong())
    for text in forms:
        assert "ours is WRONG" in text
        assert "failed: CUDA out of memory" in text
        assert "\x1b" not in text
    _, markdown, web = forms
    assert NASTY not in markdown + web
    assert not re.search(r"(?<!\\)[<>&$]", markdown)
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    for table in report.tables(wrong()):
        assert all(html.escape(cell) in web for cells in table.rows for cell in cells)
    report.show(Results())
    assert capsys.readouterr().out == "No results.\n"
    assert "No results." in page.render(Results())


# --- charts and files ------------------------------------------------------------------------------------------------


def test_bars_are_as_long_as_the_speed_ups():
    """And there is none where ours is wrong."""
    (tasks,) = report.views(wrong(), "model").values()
    axes = page.speedups(tasks, [str(task[0].batch) for task in tasks]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1.5, 0, 0, 0, 8 / 9, 0])
    greys = [bar.get_facecolor() == matplotlib.colors.to_rgba(page._LOSS) for bar in axes.patches]
    assert greys == [False, True, True, True, True, True]
    assert [axes.texts[i].get_text() for i in (0, 1, 4)] == ["1.50× eager", "ours is WRONG", "0.89× compiled"]


def test_curves_show_the_medians_and_break_where_there_is_none():
    (tasks,) = report.views(wrong(), "model").values()
    latency, throughput = page.curves(tasks).axes
    drawn = {line.get_label(): line for line in throughput.lines}
    assert set(drawn) == {"resnet_triton", "eager", "compiled"}
    assert drawn["resnet_triton"].get_ydata()[0] == pytest.approx(500)
    ours = latency.lines[0].get_ydata()
    assert [math.isnan(y) for y in ours] == [False, True, True, False, False, False]
    assert [y for y in latency.lines[1].get_ydata() if y == y] == pytest.approx([3, 9, 12])


def test_files_are_written_and_read_back(tmp_path):
    assert output.write(gpu(), tmp_path / "new") == f"written: {tmp_path}/new/results.html, .md and .json"
    assert load(tmp_path / "new") == gpu()
    assert (tmp_path / "new" / "results.html").read_text().count("<img ") == len(list(page.charts(gpu()))) == 3


def test_only_charts_need_matplotlib(tmp_path, monkeypatch):
    output.write(gpu(), tmp_path)
    monkeypatch.delitem(sys.modules, "resnet_triton.bench.page")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "but no charts" in output.write(wrong(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"], "no page of others"
