"""Commands with processes of their own: stopped from outside, or with a process that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import compiling
import pytest
import torch

import resnet_triton
from resnet_triton.bench import results
from resnet_triton.support.processes import Pool, undisturbed

ROOT = Path(__file__).resolve().parents[2]
BENCH = ["bench", "--device", "cpu", "--suites", "model", "--image", "32", "--batches", "1", "--baselines", "eager"]
STOPS = {"ctrl-c": (signal.SIGINT, 130), "terminated": (signal.SIGTERM, 143)}


def start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    """A command of ours in a session of its own, as a terminal would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "resnet_triton", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env={**compiling.environ(), **environ}, start_new_session=True,
        # A shell starts what runs in its background with the signal ignored, and that is inherited.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def stop(process: subprocess.Popen[str], how: str) -> str:
    """Send the signal, to the process or, as a terminal does, to all of the command; what it says until it ends."""
    number, code = STOPS[how]
    if how == "ctrl-c":
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return err


def ended(pids: set[int]) -> bool:
    """Whether these processes end within 20 seconds."""
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(alive, pids))


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().split()[2] != "Z"


def children(pid: int) -> set[int]:
    """Processes that `pid` has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_what_must_not_be_disturbed(number: int) -> None:
    """Another thread, which no mask of this one covers, receives it; the handler is this one's."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before, done = signal.signal(number, stop), threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    reached = []

    def work() -> None:
        with undisturbed():
            os.kill(os.getpid(), number)
            time.sleep(0.2)
            reached.append("the end")

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert signal.getsignal(number) is stop
    finally:
        done.set()
        other.join()
        signal.signal(number, before)
    assert reached


def test_workers_of_a_command_that_ignores_hangups_ignore_them() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Pool(1, get_context("fork")) as pool:
            assert pool.submit(signal.getsignal, signal.SIGHUP).result() == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("how", STOPS)
def test_a_benchmark_that_is_stopped_keeps_what_was_measured(tmp_path: Path, how: str) -> None:
    bench = start(*BENCH, "--budget", "300", "--out", str(tmp_path))
    workers: set[int] = set()
    assert bench.stderr
    for line in bench.stderr:
        if "batch 1: taking turns" in line:
            workers = children(bench.pid)
            break
    stop(bench, how)
    assert len(workers) >= 3
    assert ended(workers)
    found = results.load(tmp_path)
    assert [(row.batch, row.good) for row in found.rows] == [(1, True), (1, True)]
    assert (tmp_path / "results.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", STOPS)
def test_compiling_ahead_of_time_can_be_stopped(tmp_path: Path, how: str) -> None:
    cache = tmp_path / "cache"
    command = ["codegen", "--archs", "90", "--batches", "1", "--dtypes", "float16", "--jobs", "2"]
    process = start(*command, "--out", str(tmp_path / "out"), TRITON_CACHE_DIR=str(cache))
    deadline = time.monotonic() + 100
    while not (cache.exists() and any(cache.iterdir())) and time.monotonic() < deadline:  # both are at work
        time.sleep(0.1)
    workers = children(process.pid)
    stop(process, how)
    assert len(workers) >= 2
    assert ended(workers)
    assert not list((tmp_path / "out").glob("*.json"))


DIES = """
import os
from concurrent.futures.process import BrokenProcessPool
from resnet_triton.config import ConvConfig, ConvShape
from resnet_triton.config.targets import KNOWN
from resnet_triton.tuner.precompile import Compilers

def main():
    shape, config = ConvShape(2, 16, 8, 8, 16), ConvConfig(32, 16, 16, 4, 2)
    with Compilers(KNOWN[90], 1) as compilers:
        died = compilers._pool.submit(os._exit, 1)
        lost = compilers.submit(shape, config)
        assert isinstance(died.exception(), BrokenProcessPool)
        assert isinstance(lost.exception(), BrokenProcessPool)
        print(compilers.submit(shape, config).result())

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_a_compiler_that_dies_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(DIES)
    environ = {**compiling.environ(), "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, tmp_path / "script.py"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)
    assert done.stdout == "[]\n", done.stderr[-2000:]


# --- predict ---------------------------------------------------------------------------------------------------------


def album(folder: Path, images: int, size: int) -> list[str]:
    """`predict` for that many photographs, by random weights that want images of `size`."""
    sklearn = pytest.importorskip("sklearn.datasets")
    torch.manual_seed(0)
    state = resnet_triton.resnet18(num_classes=10).state_dict()
    torch.save({"state_dict": state, "image_size": size, "categories": list("abcdefghij")}, folder / "ten.pt")
    (folder / "album").mkdir()
    for i in range(images):
        (folder / "album" / f"{i:04}.jpg").symlink_to(Path(sklearn.__file__).parent / "images" / "china.jpg")
    return ["predict", str(folder / "album"), "--weights", str(folder / "ten.pt"), "--device", "cpu", "--json"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["nobody reads", "ctrl-c"])
def test_predictions_come_as_a_stream_that_can_be_stopped(tmp_path: Path, how: str) -> None:
    predict = start(*album(tmp_path, 2000, 32))
    assert predict.stdout
    assert predict.stderr
    for i in range(40):
        assert json.loads(predict.stdout.readline())["file"].endswith(f"{i:04}.jpg")
    assert predict.poll() is None
    if how != "nobody reads":
        assert stop(predict, how) == ""
        return
    with predict:
        predict.stdout.close()
        assert (predict.wait(60), predict.stderr.read()) == (141, "")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """The peak is the kernel's of the process by itself; `ru_maxrss` starts with that of the process it came from."""
    script = "import sys; from resnet_triton.tools import cli; code = cli.main(sys.argv[1:]); " \
             "print(open('/proc/self/status').read(), file=sys.stderr); sys.exit(code)"  # fmt: skip
    peaks = []
    for images in (32, 1000):
        (tmp_path / str(images)).mkdir()
        command = [sys.executable, "-c", script, *album(tmp_path / str(images), images, 128)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.count('"top"') == images
        peaks.append(int(re.findall(r"VmHWM:\s+(\d+) kB", done.stderr)[0]) / 1024)
    assert peaks[1] - peaks[0] < 100, f"MiB: {peaks}"
