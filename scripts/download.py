#!/usr/bin/env python3
"""Download files and hold their checksums: download.py FOLDER URL [URL=SHA256 ...]

A file that is there is not fetched again. Each is compared with the SHA256 given or, where none is known, with the one
in FOLDER/SHA256SUMS (sha256sum's format: put a line there to demand one); a file without any is trusted on first
use, and its checksum is written there, so that a later download of other content is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

BLOCK = 1 << 20


def fetch(url: str, file: Path) -> None:
    """Write what ``url`` serves to ``file``, which appears only when it is complete."""
    part = file.with_name(file.name + ".part")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, open(part, "wb") as out:
            size = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, desc=file.name, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
                while block := answer.read(BLOCK):
                    out.write(block)
                    bar.update(len(block))
        if size and part.stat().st_size != size:
            raise OSError(f"got {part.stat().st_size} of {size} bytes")
    except (OSError, urllib.error.URLError) as error:
        sys.exit(f"download: {url} could not be fetched ({error}): check the network and run this again, or fetch it "
                 f"by other means and put it at {file}")
    part.replace(file)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def known_checksums(sums: Path) -> dict[str, str]:
    """SHA256SUMS as {file name: checksum}; empty where there is none."""
    if not sums.exists():
        return {}
    return {name.lstrip("*"): digest for digest, name in (line.split() for line in sums.read_text().splitlines())}


def check(file: Path, wanted: str, sums: Path) -> None:
    """Refuse ``file`` if it is not what was wanted or seen before; note what is seen for the first time."""
    got = sha256(file)
    wanted = wanted or known_checksums(sums).get(file.name, "")
    if not wanted:
        with open(sums, "a") as stream:
            print(f"{got}  {file.name}", file=stream)
        print(f"{file.name}: no checksum is known, sha256 {got} is written to {sums}", file=sys.stderr)
    elif got != wanted:
        sys.exit(f"download: {file} has sha256 {got}, expected {wanted}: delete it to fetch it again")


def main() -> None:
    parser = argparse.ArgumentParser(description="Download files and hold their checksums.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("urls", nargs="+", metavar="URL[=SHA256]")
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    for entry in args.urls:
        url, _, wanted = entry.partition("=")
        file = args.folder / url.rpartition("/")[2]
        if not file.exists():
            fetch(url, file)
        check(file, wanted, args.folder / "SHA256SUMS")


if __name__ == "__main__":
    main()
