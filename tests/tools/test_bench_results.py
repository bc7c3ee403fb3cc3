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
    rows = [row(), row("eager", 150.0, config={"block": [1, 2]}), row(batch=9).checked(float("nan"), 0.0, 1.0)]
    rows.append(row(batch=10).checked(0.0, 0.0, float("inf")))
    whole = Results(rows, [Ceiling("copy", bytes_per_s=4e12)], steps, ["models"], ["exact", "conv1"])
    results.save(whole, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == whole == results.load(tmp_path) == results.resume(tmp_path)
    assert [r.correct for r in whole.rows] == [True, True, False, False], "what is no number is wrong"
    assert results.resume(tmp_path / "none") == Results()


def test_what_is_measured_again_is_replaced():
    found = Results()
    found.add([row(), row("eager"), Ceiling("copy", bytes_per_s=1.0), Step("a", "b", 1.0, None, {}, None)])
    found.add([row(us=50.0), row(us=70.0, batch=9), Ceiling("copy", bytes_per_s=2.0)])
    found.add([Step("a", "b", 2.0, None, {}, None)])
    assert found.rows == [row(us=50.0), row("eager"), row(us=70.0, batch=9)]
    assert ([c.bytes_per_s for c in found.ceilings], [s.seconds for s in found.steps]) == ([2.0], [2.0])


DAMAGE = {
    "truncated": (lambda text: text[: len(text) // 2], "not JSON .*, perhaps truncated"),
    "another program's": (lambda text: '{"benchmarks": []}', 'no results of bench, expected an object with "format"'),
    "NaN": (lambda text: text.replace('"p50_s": ', '"p50_s": NaN, "a": ', 1), "not JSON .NaN is no number"),
    "another version": (lambda text: text.replace('"version": 3', '"version": 1'), "is of version 1, expected 3"),
    "a time of nothing": (lambda text: re.sub('"p50_s": [^,]*', '"p50_s": 0', text, count=1), "a time of 0, expected"),
    "a time in words": (
        lambda text: re.sub('"p50_s": [^,]*', '"p50_s": "1"', text, count=1),
        "Measurement.p50_s is '1', expected float",
    ),
    "no environment": (lambda text: re.sub('"environment": {[^}]*}', '"environment": null', text), "Measurement.envi"),
    "an environment lacks something": (
        lambda text: text.replace('"threads"', '"t"'),
        "an environment has no 'threads'",
    ),
    "a failure that is a number": (
        lambda text: text.replace('"failure": null', '"failure": 5', 1),
        "Measurement.failure is 5, expected str",
    ),
    "no list of phases": (lambda text: text.replace('"complete": []', '"complete": null'), "damaged, TypeError: 'None"),
    "a row twice": (lambda text: re.sub(r"(\n\{.suite.*)", r"\1,\1", text, count=1), "a row is there twice"),
    "a missing field": (lambda text: text.replace('"batch": 8, ', "", 1), "damaged, TypeError: .*'batch'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage, capsys):
    spoil, message = DAMAGE[damage]
    path = write(tmp_path / "results.json", row())
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError, match=f"results.json: {message}"):
        results.load(path)
    assert cli.main(["compare", str(path), str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


# --- judgements ------------------------------------------------------------------------------------------------------


def test_the_best_of_the_others_is_the_measure():
    others = [row("eager", 300.0), row("folded", 150.0), row("wrong", 50.0).checked(1, 1, 1e-3)]
    assert results.speedup([row(), *others]) == pytest.approx(1.5)
    assert results.speedup([row(), others[2]]) is None, "nothing right to compare with"
    assert results.speedup([row(), row(correct=False, l2="cold"), *others]) is None
    assert results.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def without(**more):
    return row(p50_s=None, p20_s=None, p80_s=None, samples_s=[], correct=None, **more)


LATER = {**GPU, "commit": "7654321", "date": "2026-02-03T04:05:06+00:00"}
MISSING = "ours: is missing in the new results"
COMPARED = {  # old rows, new rows, limits, and how the complaints end
    "slower": ([row()], [row(us=106.0)], ["p50:+5%"], ["ours: p50 +6.0%, allowed +5.0%"]),
    "slower than nothing": ([row()], [row(us=101.0)], ["p50:+0%"], ["ours: p50 +1.0%, allowed +0.0%"]),
    "within the limit": ([row()], [row(us=104.0)], ["p50:+5%"], []),
    "faster": ([row()], [row(us=50.0)], ["p50:+5%", "p80:+0%"], []),
    "without a limit": ([row()], [row(us=200.0)], [], []),
    "another time": ([row()], [row(environment=LATER)], ["p50:+0%", "p80:-0%"], []),
    "others": ([row(), row("eager")], [row(us=99.0), row("eager", 300.0)], ["p50:+5%"], []),
    "speed-up": ([row(), row("eager", 200.0)], [row(us=99.0), row("eager", 180.0)], ["speedup:-5%"],
                 ["ours: speedup -9.1%, allowed -5.0%"]),
    "any speed-up": ([row(), row("eager", 200.0)], [row(us=101.0), row("eager", 200.0)], ["speedup:-0%"],
                     ["ours: speedup -1.0%, allowed -0.0%"]),
    "memory": ([row(peak_bytes=100, first_call_s=1.0)], [row(peak_bytes=120, first_call_s=1.0)],
               ["peak_memory:+10%", "first_call:+10%"], ["ours: peak_memory +20.0%, allowed +10.0%"]),
    "wrong": ([row()], [row(us=1.0).checked(1e-4, 1.0, 1e-3)], [], ["p50 in both results", "gives a wrong answer"]),
    "failed": ([row()], [without(failure="no"), row(batch=9)], [], ["p50 in both results", "ours: failed: no"]),
    "not timed": ([row(batch=9)], [row(batch=9), without()], [], ["ours: not timed"]),
    "not checked": ([row(batch=9)], [row(batch=9), row(correct=None)], [], ["ours: not checked"]),
    "missing": ([row(), row(batch=9)], [row()], [], ["batch 9, float16, gpu clock, L2 warm: " + MISSING]),
    "added": ([row(batch=9)], [row(batch=9, us=99.0), row()], ["p50:+5%"],
              ["ours: p50 cannot be compared: none before, 0.0001 now"]),
    "wrong before": ([row(batch=9), row(correct=False)], [row(batch=9, us=99.0), row()], ["p50:+5%"],
                     ["ours: p50 cannot be compared: none before, 0.0001 now"]),
    "both empty": ([], [], [], ["nothing was compared: no row of ours has p50 in both results"]),
    "only others": ([row("eager")], [row("eager")], [], ["no row of ours has p50 in both results"]),
    "another dtype": ([row()], [row(dtype="bfloat16")], [], ["p50 in both results", MISSING]),
    "another device": ([row()], [row(us=1.0, environment={**LATER, "device": "H100"})], ["p50:+5%"],
                       ["ours: cannot be compared: measured on Synthetic GPU before, on H100 now"]),
    "other threads": ([row(environment=CPU)], [row(us=1.0, environment={**CPU, "threads": 9})], ["p50:+5%"],
                      ["measured on Synthetic CPU 9000, 2 threads before, on Synthetic CPU 9000, 9 threads now"]),
    "the same run": ([row()], [row()], ["p50:+5%"], ["ours: cannot be compared: both are the same measurement"]),
    "no such metric": ([row()], [row(us=99.0)], ["peak_memory:+5%"],
                       ["has peak_memory in both results", "peak_memory cannot be compared: none before, none now"]),
    "a metric lost": ([row(peak_bytes=9), row(batch=9, peak_bytes=9)], [row(), row(batch=9, us=9.0, peak_bytes=9)],
                      ["peak_memory:+5%"], ["ours: peak_memory cannot be compared: 9 before, none now"]),
    "nothing before": ([row(peak_bytes=0)], [row(peak_bytes=9)], ["peak_memory:+5%"], ["compared: 0 before, 9 now"]),
    "no alternative": ([row()], [row(us=99.0)], ["speedup:-5%"],
                       ["has speedup in both results", "ours: speedup cannot be compared: none before, none now"]),
    "an alternative for some": ([row(), row(batch=9), row("eager", batch=9)],
                                [row(us=99.0), row(batch=9, us=99.0), row("eager", batch=9)], ["speedup:-50%"],
                                ["ours: speedup cannot be compared: none before, none now"]),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPARED)
def test_what_fails_a_comparison(tmp_path, capsys, case):
    old, new, limits, complaints = COMPARED[case]
    files = [str(write(tmp_path / name, *rows)) for name, rows in (("old.json", old), ("new.json", new))]
    arguments = ["compare", *files, *(f"--fail-if={limit}" for limit in limits)]
    assert cli.main([*arguments, "--json"]) == bool(complaints)
    out, err = capsys.readouterr()
    found = [line for line in err.splitlines() if "note: " not in line]
    assert len(found) == len(complaints)
    assert [line for line, end in zip(found, complaints, strict=True) if not line.endswith(end)] == []
    assert len(json.loads(out)) == len({r.key for r in (*old, *new)})


def test_images_of_another_size_are_named():
    names = [compare.title(row(image=32)), compare.title(row()), compare.title(row(layer="fc, 8x8", image=8))]
    assert [name.partition(", batch")[0] for name in names] == [
        "resnet18, 32x32",
        "resnet18",
        "resnet18 fc, 8x8",
    ]


@pytest.mark.parametrize("text", ["p50", "p50:5%", "p99:+5%", "p50:+x%"])
def test_limits_that_cannot_be_read(text):
    with pytest.raises(ValueError, match=r"cannot read limit .*, expected METRIC:\+N%"):
        compare.Limit.parse(text)


def test_the_command(tmp_path, capsys):
    elsewhere = {**GPU, "device": "NVIDIA H100"}
    old = str(write(tmp_path / "old.json", row(), row("eager", 200.0)))
    new = str(write(tmp_path / "new.json", row(us=120.0, environment=elsewhere), row("eager", 200.0)))
    assert cli.main(["compare", old, new]) == 0
    out, err = capsys.readouterr()
    assert "+20.0%" in out
    assert "note: device differs: Synthetic GPU before, NVIDIA H100, Synthetic GPU now" in err
    assert cli.main(["compare", old, new, "--json", "--metric", "speedup"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["old"], first["new"]) == (pytest.approx(2.0), pytest.approx(200 / 120))
    assert cli.main(["compare", str(tmp_path / "no.json"), old]) == 2
    assert "no.json: No such file" in capsys.readouterr().err
