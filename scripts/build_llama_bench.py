"""Builds llama.cpp's llama-bench, or another of its programs, for this machine and prints its path.

    python -m scripts.build_llama_bench [--folder build/llama] [--jobs 2] [--program llama-perplexity]

The source is the one in the package llama-cpp-python on the package index: pip downloads it (77 MB), its hash is
checked, and nothing of the package is installed. The build is llama.cpp's own Release build with its defaults
(``GGML_NATIVE``: all instructions that this processor has; OpenMP), as one program, without server and TLS. Needs a C++
compiler; CMake and Ninja come from the package index if the system has none. It runs at the lowest priority, some ten
minutes on two processors; a second start builds what is missing. llama-bench is for
``benchmarks/compare_llama_cpp.py``, llama-perplexity and llama-quantize for ``benchmarks/quality.py``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

from scripts.fetch_smollm2 import sha256

ROOT = Path(__file__).parents[1]
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
UNPACKED = f"llama_cpp_python-{VERSION}"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
TARGET = "llama-bench"
PROGRAMS = (TARGET, "llama-perplexity", "llama-quantize")


def build(folder: Path, jobs: int, program: str = TARGET) -> Path:
    """The path of one of ``PROGRAMS``, built in ``folder``. Raises ``CalledProcessError`` if a step fails."""
    folder.mkdir(parents=True, exist_ok=True)
    package, objects = folder / UNPACKED, folder / "cmake"
    source = package / "vendor" / "llama.cpp"
    if not source.is_dir():
        unpack(download(folder), folder)
    cmake, ninja = tools(folder)
    # Without these, llama.cpp's build would take the number and commit of the git repository that it finds itself in.
    options = OPTIONS | {"LLAMA_BUILD_COMMIT": commit(package), "LLAMA_BUILD_NUMBER": "0"}
    flags = [f"-D{name}={value}" for name, value in options.items()]
    run([cmake, "-S", source, "-B", objects, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *flags])
    nice = shutil.which("nice")
    run([*([nice, "-n", "19"] if nice else []), cmake, "--build", objects, "--parallel", jobs, "--target", program])
    (built,) = (path for path in (objects / "bin").rglob(f"{program}*") if path.stem == program)
    return Path(shutil.copy2(built, folder))


def download(folder: Path) -> Path:
    """The source package in ``folder``, by pip if it is not there. pip prepares the package's metadata, too."""
    archive = folder / f"{UNPACKED}.tar.gz"
    if not archive.is_file():
        options = ["--disable-pip-version-check", "--no-deps", "--no-binary", PACKAGE, "--dest", folder]
        run([sys.executable, "-m", "pip", "download", *options, f"{PACKAGE}=={VERSION}"])
    if (found := sha256(archive)) != SHA256:
        sys.exit(f"error: {archive}: found the SHA-256 {found}, expected {SHA256}")
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Into ``folder / UNPACKED``, which is there only when all of it is."""
    part = folder / "unpacking"
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as file:
        file.extractall(part)  # its hash was checked: what is in it is known
    (part / UNPACKED).rename(folder / UNPACKED)
    part.rmdir()


def tools(folder: Path) -> tuple[str, str]:
    """The paths of CMake and Ninja; what the system lacks is installed in ``folder``."""
    missing = [name for name in ("cmake", "ninja") if shutil.which(name) is None]
    environment = folder / "tools"
    if missing:
        venv.create(environment, with_pip=True)
        programs = environment / ("Scripts" if sys.platform == "win32" else "bin")
        run([programs / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *missing])
    else:
        programs = environment
    cmake, ninja = (shutil.which(name) or str(programs / name) for name in ("cmake", "ninja"))
    return cmake, ninja


def commit(package: Path) -> str:
    """llama.cpp's commit, which the newest entry of the package's changelog names."""
    found = re.search(r"ggml-org/llama\.cpp@([0-9a-f]+)", (package / "CHANGELOG.md").read_text(encoding="utf-8"))
    return "unknown" if found is None else found[1]


def run(command: list[object]) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "llama", help="default: build/llama")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once (default: 2)")
    parser.add_argument("--program", choices=PROGRAMS, default=TARGET, help=f"which one (default: {TARGET})")
    args = parser.parse_args()
    try:
        print(build(args.folder.resolve(), args.jobs, args.program))
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
