"""What is shipped, how it is installed, and which module may import which.

The folder `kernels/` is installed as `resnet_triton.kernels`. It has no `__init__.py`: with one, a checkout would hide
PyPI's package `kernels` from everything that is run in its root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "resnet_triton"
KERNELS = ROOT / "kernels"


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
    """Standard output of a command that has to succeed, in an environment free of this process's Python settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "TRITON_", "COV_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, "PYTHONDONTWRITEBYTECODE": "1", **environ},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{done.args} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


def walk(folder: Path) -> Iterator[Path]:
    """The files below a folder, those behind symlinks left out."""
    for directory, _, files in os.walk(folder, followlinks=False):
        yield from (Path(directory) / file for file in files)


# The source tree


def test_oldest_triton_is_one_number() -> None:
    floor = re.search(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    checked = re.search(r"^OLDEST_TRITON := ([\d.]+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert floor
    assert checked
    assert checked[1].removesuffix(".0") == floor[1].removesuffix(".0")


# Importing the package


def test_import_is_lazy() -> None:
    run(
        sys.executable,
        "-c",
        textwrap.dedent("""
            import sys, torch, resnet_triton
            assert "torchvision" not in sys.modules
            assert "resnet_triton.config.targets" not in sys.modules, "files were read at import"
            assert not torch.cuda.is_initialized()
            if "triton" in sys.modules:
                from triton.runtime import driver
                assert driver._default is None and driver._active is None, "a GPU driver was chosen at import"
        """),
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    ("absent", "command", "code"),
    [
        ({"triton"}, ["doctor", "--json"], 0),
        ({"numpy", "scipy", "torchvision", "PIL", "safetensors", "rich", "sklearn", "matplotlib"}, ["predict", "x"], 2),
    ],
    ids=["triton", "every extra"],
)
def test_cpu_path_and_command_line_work_without(absent: set[str], command: list[str], code: int) -> None:
    run(
        sys.executable,
        "-c",
        textwrap.dedent(f"""
            import sys

            class Without:  # finds nothing, as if not installed; a finder that raised would break find_spec() too
                def __init__(self, finder):
                    self.finder = finder

                def find_spec(self, name, path=None, target=None):
                    absent = name.partition(".")[0] in {absent}
                    return None if absent else self.finder.find_spec(name, path, target)

                def __getattr__(self, name):
                    return getattr(self.finder, name)

            sys.meta_path[:] = map(Without, sys.meta_path)
            import torch, resnet_triton
            with torch.inference_mode():
                logits = resnet_triton.resnet18(num_classes=10).eval()(torch.rand(1, 3, 32, 32))
            assert logits.shape == (1, 10) and logits.isfinite().all()
            from resnet_triton.tools import cli
            assert cli.main({command}) == {code}
        """),
        cwd=ROOT,
    )


# Distributions


def copy_of_tree(destination: Path) -> Path:
    """The checkout without what is not its source; building in place would leave files that later builds pick up."""
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, destination, symlinks=True, ignore=ignore)


def build(source: Path, destination: Path, *formats: str) -> Path:
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", destination, *formats, source)
    run(*command, cwd=destination.parent)
    return destination


def wheel_contents(folder: Path) -> dict[str, bytes]:
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree that tests may read and run but not change."""
    return copy_of_tree(tmp_path_factory.mktemp("checkout") / "project")


@pytest.fixture(scope="module")
def wheel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the wheel built straight from the tree."""
    folder = tmp_path_factory.mktemp("from_tree")
    return build(copy_of_tree(folder / "project"), folder / "dist", "--wheel")


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to everything that is installed here except this project."""
    folder = tmp_path_factory.mktemp("dependencies")
    for path in map(Path, sys.path):
        if path.name in {"site-packages", "dist-packages"} and path.is_dir():
            for entry in path.iterdir():
                link = folder / entry.name
                if "resnet_triton" not in entry.name and entry.suffix != ".pth" and not link.exists():
                    link.symlink_to(entry)
    return folder


@pytest.fixture
def bare_python(tmp_path: Path, dependencies: Path) -> Path:
    """The interpreter of a new virtual environment that sees the dependencies, and this project not at all."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(site) / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    return python


def pip_install(python: Path, *arguments: str | Path) -> None:
    offline = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, *arguments, cwd=python.parent)


def location_of_kernels(python: Path, cwd: Path, **environ: str) -> Path:
    """Where resnet_triton.kernels.conv_bn_relu is imported from."""
    script = "import resnet_triton, resnet_triton.kernels.conv_bn_relu as module; print(module.__file__)"
    return Path(run(python, "-c", script, cwd=cwd, **environ).strip()).resolve()


@pytest.mark.packaging
def test_wheel_from_tree(wheel_folder: Path) -> None:
    contents = wheel_contents(wheel_folder)
    expected = {f"resnet_triton/kernels/{file.name}" for file in KERNELS.glob("*.py")}
    for path in (file.relative_to(ROOT) for file in walk(PACKAGE)):
        if path.suffix == ".py" or path.name in ("py.typed", "look.c") or path.match("config/gpus/*.json"):
            expected.add(path.as_posix())
    assert "resnet_triton/py.typed" in expected
    metadata = {name for name in contents if PurePosixPath(name).parts[0].endswith(".dist-info")}
    assert set(contents) - metadata == expected
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    (entry_points,) = (contents[name].decode() for name in metadata if name.endswith("/entry_points.txt"))
    assert "resnet-triton = resnet_triton.tools.cli:main" in entry_points


@pytest.mark.packaging
def test_sdist_and_the_wheel_built_from_it(tmp_path: Path, checkout: Path, wheel_folder: Path) -> None:
    source = shutil.copytree(checkout, tmp_path / "project", symlinks=True)
    folder = build(source, tmp_path / "dist")  # without a format: an sdist, then a wheel from that sdist
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {"/".join(PurePosixPath(name).parts[1:]) for name in archive.getnames()}
    folders = ("kernels", "tests", "benchmarks", "docs", "examples", "resnet_triton")
    wanted = [file for folder in folders for file in walk(checkout / folder)]
    wanted += [path for path in checkout.iterdir() if path.is_file()]
    missing = {path.relative_to(checkout).as_posix() for path in wanted} - names
    assert missing == set()
    assert wheel_contents(folder) == wheel_contents(wheel_folder)


@pytest.mark.packaging
def test_installed_wheel(tmp_path: Path, bare_python: Path, wheel_folder: Path) -> None:
    (wheel,) = wheel_folder.glob("*.whl")
    pip_install(bare_python, wheel)
    assert (tmp_path / "venv").resolve() in location_of_kernels(bare_python, tmp_path).parents
    script = "import importlib.metadata; print(importlib.metadata.version('resnet-triton'))"
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", run(bare_python, "-c", script, cwd=tmp_path).strip())
    files = run(sys.executable, "-m", "pip", "--python", bare_python, "show", "-f", "resnet-triton", cwd=tmp_path)
    assert not re.search(r"^\s+kernels/", files, re.MULTILINE)


@pytest.mark.packaging
def test_editable_install(tmp_path: Path, checkout: Path, bare_python: Path) -> None:
    source = shutil.copytree(checkout, tmp_path / "project", symlinks=True)
    pip_install(bare_python, "--editable", source)
    assert location_of_kernels(bare_python, tmp_path) == (source / "kernels" / "conv_bn_relu.py").resolve()


@pytest.mark.packaging
def test_uninstalled_checkout_beside_another_package_named_kernels(
    tmp_path: Path, checkout: Path, bare_python: Path
) -> None:
    other = tmp_path / "elsewhere" / "kernels" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_text("", encoding="utf-8")
    expected = (checkout / "kernels" / "conv_bn_relu.py").resolve()
    assert location_of_kernels(bare_python, checkout, PYTHONPATH=".") == expected
    script = "import resnet_triton.kernels.conv_bn_relu, kernels; print(kernels.__file__)"
    found = run(bare_python, "-c", script, cwd=checkout, PYTHONPATH=str(other.parents[1])).strip()
    assert Path(found).resolve() == other.resolve()
