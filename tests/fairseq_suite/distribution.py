"""fairseq's own tests, from the source distribution of fairseq-fixed: fetched once, kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "0.12.3.1"
SHA256 = "c607577a54ab30e2ee0f0b0a754ea5cdbc6ad0a9f99a1726638a2201445bc1cc"
NAME = f"fairseq_fixed-{VERSION}"


class NotAvailable(Exception):
    """The distribution is neither here nor to be had."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightseq-fairseq"


def source_distribution(cache: Path) -> Path:
    """The .tar.gz: $FAIRSEQ_SDIST, else the cache's, else pip's. Raises NotAvailable."""
    given = os.environ.get("FAIRSEQ_SDIST")
    archive = Path(given) if given else cache / f"{NAME}.tar.gz"
    if not given and not archive.exists():
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary",
             ":all:", "--dest", str(cache), f"fairseq-fixed=={VERSION}"], capture_output=True, text=True)
        if pip.returncode:
            raise NotAvailable(f"pip cannot download fairseq-fixed=={VERSION}; put {NAME}.tar.gz into {cache} or name "
                               f"it in FAIRSEQ_SDIST. pip said: {pip.stderr.strip().splitlines()[-1:]}")
    if not archive.exists():
        raise NotAvailable(f"FAIRSEQ_SDIST names {archive}, which does not exist")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        raise NotAvailable(f"{archive} is not {NAME}.tar.gz of PyPI (sha256 {SHA256}); delete it or fetch it anew")
    return archive


def upstream_tests(folder: Path) -> Path:
    """Unpack ``tests/`` of the distribution as the package ``folder/tests``; returns ``folder``."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source_distribution(cache)) as archive:
        for member in archive:
            parent, _, name = member.name.rpartition("/")
            if parent == f"{NAME}/tests" and member.isfile():
                target = folder / "tests" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
    (folder / "tests" / "__init__.py").touch()
    return folder
