"""Without transformers, or with one we do not know, one line says what to install."""

from __future__ import annotations

import importlib.metadata

import pytest

from lightseq_fairseq import huggingface


@pytest.mark.parametrize("found", ["4.57.6", "5.16.1", "none"])
def test_other_versions_are_refused(found, monkeypatch):
    def version(name: str) -> str:
        if found == "none":
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=rf"5.17 or later, found {found}: pip install"):
        huggingface._check_version()


@pytest.mark.parametrize("found", ["5.17.0", "5.23.0", "5.18.0.dev0", "6.0.0"])
def test_later_versions_pass(found, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    huggingface._check_version()
