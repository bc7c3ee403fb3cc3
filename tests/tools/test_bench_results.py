"""Files of results: what is written can be read, what is damaged is refused in one line, changes are judged."""

import dataclasses
import json
import re

import pytest
import synthetic_results as synthetic
from synthetic_results import CPU, GPU

from resnet_triton.bench import compare, results
from resnet_triton.bench.results import Ceiling, Results, Step
from resnet_triton.tools import cli


def row(alternative="ours", us=100.0, **more):
    """A good row of ours or of another; `us` are its times in microseconds."""
    base = {"ours": alternative == "ours", "dtype": "float16", "clock": "gpu", "l2": "warm", "environment": GPU}
    base = synthetic.row(alternative, 8, us / 1e3, **base).timed([us * f * 1e-6 for f in (0.99, 1.0, 1.01)])
    return dataclasses.replace(base.checked(1e-4, 1e-4, 1e-3), **more)


def write(path, *rows):
    results.save(Results(list(rows)), path)
    return path


# --- files -----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path):
    steps = [Step("models", "float16 8", 1.5, None, {"runs": 3}, GPU), Step("exact", "fc", 0.0, "died", {}, None)]
    rows = [row(), row("eager", 150.0, config={"block": [1, 2]})]
    whole = Results(rows, [Ceiling("copy", bytes_per_s=4e12)], steps, ["models"], ["exact", "conv1"])
    results.save(whole, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == whole == results.load(tmp_path) == results.resume(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert results.resume(tmp_path / "none") == Results()


def test_what_is_measured_again_is_replaced():
    found = Results()
    found.add([row(), row("eager"), Ceiling("copy", bytes_per_s=1.0)])
    found.add([row(us=50.0), row(us=70.0, batch=9), Ceiling("copy", bytes_per_s=2.0)])
    assert found.rows == [row(us=50.0), row("eager"), row(us=70.0, batch=9)]
    assert [c.bytes_per_s for c in found.ceilings] == [2.0]


DAMAGE = {
    "truncated": (lambda text: text[: len(text) // 2], "not JSON .*, perhaps truncated"),
    "empty": (lambda text: "", "not JSON"),
    "no UTF-8": (lambda text: b"\xff\xfe" + text.encode(), "not JSON"),
    "a list": (lambda text: "[]", 'no results of bench, expected an object with "format"'),
    "another program's": (lambda text: '{"benchmarks": []}', 'no results of bench, expected an object with "format"'),
    "NaN": (lambda text: re.sub('"p50_s": [^,]*', '"p50_s": NaN', text, count=1), "not JSON .NaN is no number"),
    "a row twice": (lambda text: re.sub(r"(\n\{.suite.*)", r"\1,\1", text, count=1), "2 rows of .*, expected one"),
    "another version": (lambda text: text.replace('"version": 3', '"version": 1'), "is of version 1, expected 3"),
    "infinity": (lambda text: re.sub('"p50_s": [^,]*', '"p50_s": 1e999', text, count=1), "p50_s is inf, expected"),
    "a negative time": (lambda text: text.replace('"p50_s": ', '"p50_s": -', 1), "p50_s is -.*, expected seconds"),
    "a wrong type": (lambda text: text.replace('"batch": 8', '"batch": "8"', 1), "batch '8', .*, expected int"),
    "a missing field": (lambda text: text.replace('"batch": 8, ', "", 1), "damaged, TypeError: .*'batch'"),
    "an unknown field": (lambda text: text.replace('"batch"', '"size": 1, "batch"', 1), "damaged, TypeError: .*'size'"),
    "deep nesting": (lambda text: "[" * 100_000, "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage, capsys):
    spoil, message = DAMAGE[damage]
    path = write(tmp_path / "results.json", row())
    text = spoil(path.read_text())
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"results.json: {message}") as caught:
        results.load(path)
    assert "\n" not in str(caught.value)
    assert cli.main(["compare", str(path), str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_a_missing_file_is_named(tmp_path, capsys):
    assert cli.main(["compare", str(tmp_path / "no.json"), str(tmp_path)]) == 2
    assert "no.json: No such file" in capsys.readouterr().err


def test_an_error_that_is_no_number_is_wrong_and_can_be_written(tmp_path):
    nan = float("nan")
    spoilt = [row().checked(nan, 0.0, 1.0), row(batch=9).checked(0.0, float("inf"), 1.0)]
    assert [r.correct for r in results.load(write(tmp_path / "r.json", *spoilt)).rows] == [False, False]


# --- judgements ------------------------------------------------------------------------------------------------------


def test_the_best_of_the_others_is_the_measure():
    others = [row("eager", 300.0), row("folded", 150.0), row("wrong", 50.0).checked(1, 1, 1e-3)]
    assert results.speedup([row(), *others]) == pytest.approx(1.5)
    assert results.speedup([row(), others[2]]) is None, "nothing right to compare with"
    assert results.speedup([row(), row(correct=False, l2="cold"), *others]) is None
    assert results.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def changes(old, new, *limits):
    found = compare.compare(Results(old), Results(new), [compare.Limit.parse(text) for text in limits])
    return {c.row.alternative: c for c in found}


def test_a_planted_slowdown_is_caught():
    slower = changes([row(), row("eager", 200.0)], [row(us=106.0), row("eager", 300.0)], "p50:+5%")
    assert slower["ours"].failures == ("p50 +6.0%, allowed +5.0%",)
    assert slower["ours"].relative == pytest.approx(0.06)
    assert slower["eager"].failures == (), "another's slowdown is not ours"
    assert changes([row()], [row(us=104.0)], "p50:+5%")["ours"].failures == ()
    assert changes([row()], [row(us=50.0)], "p50:+5%")["ours"].failures == ()


def test_a_planted_wrong_answer_is_caught_without_a_limit():
    assert changes([row()], [row().checked(1e-4, 1.0, 1e-3)])["ours"].failures == ("gives a wrong answer",)
    failed = row(p50_s=None, samples_s=[], correct=None, failure="OutOfMemoryError")
    assert changes([row()], [failed])["ours"].failures == ("failed: OutOfMemoryError",)
    assert changes([row(), row("eager")], [row("eager")])["ours"].failures == ("is missing in the new results",)


def test_other_metrics():
    old = [row(peak_bytes=100, first_call_s=1.0), row("eager", 200.0)]
    new = [row(peak_bytes=120, first_call_s=1.0), row("eager", 180.0)]
    found = changes(old, new, "peak_memory:+10%", "first_call:+10%", "speedup:-5%", "p80:+1%")
    assert found["ours"].failures == ("peak_memory +20.0%, allowed +10.0%", "speedup -10.0%, allowed -5.0%")


def test_the_sign_of_zero_counts():
    old, slower = [row(), row("eager", 200.0)], [row(us=101.0), row("eager", 200.0)]
    assert changes(old, slower, "p50:+0%")["ours"].failures == ("p50 +1.0%, allowed +0.0%",)
    assert changes(slower, old, "p50:+0%", "speedup:-0%")["ours"].failures == ()
    assert changes(old, slower, "speedup:-0%")["ours"].failures == ("speedup -1.0%, allowed -0.0%",)


@pytest.mark.parametrize("text", ["p50", "p50:5%", "p99:+5%", "p50:+5", "p50:+x%", ""])
def test_limits_that_cannot_be_read(text):
    with pytest.raises(ValueError, match=r"cannot read limit .*, expected METRIC:\+N%"):
        compare.Limit.parse(text)


def without(**more):
    return row(p50_s=None, p20_s=None, p80_s=None, samples_s=[], correct=None, **more)


LATER = {**GPU, "commit": "7654321", "date": "2026-02-03T04:05:06+00:00"}
MISSING = "ours: is missing in the new results"
LAYER = {"suite": "kernel", "layer": "fc"}
NOTHING = {
    "empty old": ([], [row()], ["p50:+5%"], "ours: cannot be compared: is missing in the old results"),
    "empty new": ([row()], [], ["p50:+5%"], MISSING),
    "both empty": ([], [], [], "nothing was compared: no row of ours has p50 in both results"),
    "only others": ([row("eager")], [row("eager")], ["p50:+5%"], "nothing was compared: no row of ours has p50"),
    "another dtype": ([row()], [row(dtype="bfloat16")], [], MISSING),
    "another batch": ([row()], [row(batch=9)], ["p50:+5%"], "cannot be compared: is missing in the old results"),
    "another image": ([row()], [row(image=32)], [], MISSING),
    "another device": ([row()], [row(us=1.0, environment={**LATER, "device": "H100"})], ["p50:+5%"],
                       "ours: cannot be compared: measured on Synthetic GPU before, on H100 now"),
    "other threads": ([row(environment=CPU)], [row(us=1.0, environment={**CPU, "threads": 9})], ["p50:+5%"],
                      "measured on Synthetic CPU 9000, 2 threads before, on Synthetic CPU 9000, 9 threads now"),
    "the same run": ([row()], [row()], ["p50:+5%"], "ours: cannot be compared: both are the same measurement"),
    "no such metric": ([row()], [row(us=99.0)], ["peak_memory:+5%"], "memory cannot be compared: none before, none"),
    "a metric lost": ([row(peak_bytes=9)], [row(us=99.0)], ["peak_memory:+5%"], "peak_memory cannot be compared: 9"),
    "nothing before": ([row(peak_bytes=0)], [row(peak_bytes=9)], ["peak_memory:+5%"], "compared: 0 before, 9 now"),
    "a metric of models": ([row(**LAYER)], [row(us=99.0, **LAYER)], ["first_call:+5%"],
                           "nothing was compared: no row of ours has first_call"),
    "no alternative": ([row()], [row(us=99.0)], ["speedup:-5%"], "speedup cannot be compared: none before, none now"),
    "alternatives lost": ([row(), row("eager", 300.0)], [row(us=99.0)], ["speedup:-5%"], "cannot be compared: 3"),
    "all failed": ([without(failure="no")], [without(failure="no")], [], "ours: failed: no"),
    "all failed before": ([without(failure="no")], [row()], ["p50:+5%"], "cannot be compared: failed: no, before"),
    "wrong before": ([row(correct=False)], [row()], ["p50:+5%"], "ours: cannot be compared: WRONG: error"),
    "not timed": ([without()], [without()], [], "ours: not timed"),
    "not checked": ([row()], [row(us=99.0, correct=None)], [], "ours: not checked"),
}  # fmt: skip


@pytest.mark.parametrize("way", NOTHING)
def test_what_compares_nothing_does_not_pass(tmp_path, capsys, way):
    old, new, limits, message = NOTHING[way]
    files = [str(write(tmp_path / name, *rows)) for name, rows in (("old.json", old), ("new.json", new))]
    assert cli.main(["compare", *files, *(f"--fail-if={limit}" for limit in limits)]) == 1
    assert message in capsys.readouterr().err
    assert cli.main(["compare", *files, "--json", *(f"--fail-if={limit}" for limit in limits)]) == 1
    json.loads(capsys.readouterr().out)


def test_a_row_that_cannot_be_compared_is_named_beside_those_that_can(tmp_path, capsys):
    old = write(tmp_path / "old.json", row(), row(batch=16), row(batch=32))
    new = write(tmp_path / "new.json", *(row(us=99.0, batch=b, environment=LATER) for b in (8, 16, 64)))
    assert cli.main(["compare", str(old), str(new), "--fail-if", "p50:+5%"]) == 1
    assert [line.partition("resnet18, ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "batch 64, float16, gpu clock, L2 warm: ours: cannot be compared: is missing in the old results",
        "batch 32, float16, gpu clock, L2 warm: ours: is missing in the new results",
    ]


def test_images_of_another_size_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # or long cells are folded
    old = write(tmp_path / "old.json", *(row(image=image) for image in (224, 64)))
    new = write(tmp_path / "new.json", row(us=99.0), row(image=32), row(layer="32 channels, 14x14, 3x3", image=14))
    assert cli.main(["compare", str(old), str(new)]) == 1
    out, err = capsys.readouterr()
    assert "error: resnet18, 64x64, batch 8, float16, gpu clock, L2 warm: ours: is missing in the new results" in err
    assert "resnet18, 32x32, batch 8" in out
    assert "resnet18, batch 8" in out
    assert "resnet18 32 channels, 14x14, 3x3, batch 8" in out


@pytest.mark.parametrize("count", [5, 30])
def test_many_missing_rows_are_one_line(tmp_path, capsys, monkeypatch, count):
    monkeypatch.setenv("COLUMNS", "400")  # or long cells are folded
    layers = [row(suite="kernel", layer=f"layer{i}") for i in range(count)]
    files = [str(write(tmp_path / name, row(us=i), *more)) for i, name, more in ((1.0, "a", layers), (2.0, "b", []))]
    assert cli.main(["compare", *files]) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == (5 if count == 5 else 1)
    assert "error: resnet18 layer0, batch 8" in lines[0]
    assert lines[-1].endswith("missing in the new results" + (count == 30) * ", and so are 29 other rows")
    assert out.count("is missing in the new results") == count
    assert cli.main(["compare", *files[::-1], "--fail-if", "p50:+5%"]) == 1
    assert capsys.readouterr().err.count("is missing in the old results") == len(lines)


def test_another_commit_and_another_time_compare(tmp_path, capsys):
    old, new = write(tmp_path / "old.json", row()), write(tmp_path / "new.json", row(environment=LATER))
    assert cli.main(["compare", str(old), str(new), "--fail-if", "p50:+0%", "--fail-if", "p80:-0%"]) == 0
    assert capsys.readouterr().err == ""


def test_the_command(tmp_path, capsys):
    old = write(tmp_path / "old.json", row(), row("eager", 200.0))
    new = write(tmp_path / "new.json", row(us=120.0), row("eager", 200.0))
    assert cli.main(["compare", str(old), str(new)]) == 0
    assert "+20.0%" in capsys.readouterr().out
    assert cli.main(["compare", str(old), str(new), "--fail-if", "p50:+5%"]) == 1
    assert "resnet18, batch 8, float16, gpu clock, L2 warm: ours: p50 +20.0%, allowed +5.0%" in capsys.readouterr().err
    assert cli.main(["compare", str(old), str(new), "--json", "--metric", "speedup"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["old"], first["new"]) == (pytest.approx(2.0), pytest.approx(200 / 120))


def test_other_machines_are_noted(tmp_path, capsys):
    elsewhere = {**GPU, "device": "NVIDIA H100"}
    old, new = write(tmp_path / "old.json", row()), write(tmp_path / "new.json", row(environment=elsewhere))
    assert cli.main(["compare", str(old), str(new)]) == 0
    assert "note: device differs: Synthetic GPU before, NVIDIA H100 now" in capsys.readouterr().err
