"""Which room may import what (data flows one way), and that generation loads no training code and touches no GPU."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lightseq_fairseq"


@dataclass(frozen=True)
class Room:
    """What a module or folder of the package may import beside itself and the standard library."""

    rooms: str = ""
    third_parties: str = ""
    inside_functions: str = ""  # rooms and third parties that only a call may load


ROOMS = {
    "__init__": Room(inside_functions="plugin"),
    "config": Room(),
    "_build": Room(),
    "ops": Room("_build", "torch"),
    "optim": Room("ops", "torch"),
    "layers": Room("ops config", "torch"),
    "training": Room("layers ops optim config", "torch", "export"),
    "fairseq_compat": Room("", "torch numpy", "fairseq omegaconf"),
    "plugin": Room("fairseq_compat layers ops optim config", "torch numpy fairseq omegaconf", "deepspeed"),
    "huggingface": Room("layers", "torch transformers"),
    "model_file": Room("config", "torch numpy google h5py"),
    "export": Room("model_file config", "torch numpy", "fairseq_compat fairseq safetensors"),
    "generator": Room("model_file layers ops config", "torch numpy"),
    "inference": Room("generator model_file config", "torch numpy", "export"),
    "cli": Room(),
    "cli.train": Room("plugin fairseq_compat"),
    "cli.deepspeed": Room("cli.train plugin"),
    "cli.hydra_train": Room("cli.train fairseq_compat"),
    "cli.validate": Room("plugin fairseq_compat"),
    "cli.export": Room("export model_file", "torch tqdm"),
    "cli.ahead": Room("generator", "torch"),
    "cli.generate": Room("cli.ahead generator model_file config", "torch", "export fairseq_compat fairseq"),
    "cli.interactive": Room("cli.generate"),
}


def room_of(name: str) -> str:
    """"layers.encoder" -> "layers"; each command line is a room of its own."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "cli" and len(parts) > 1 else parts[0]


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether inside a function) of each import; names imported from the package itself are modules."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == PACKAGE.name:
                yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
            else:
                yield "." * node.level + (node.module or ""), inside
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def forbidden(module: str, source: str) -> list[str]:
    """What ``module`` (dotted, without the package's name) imports against the table."""
    name = room_of(module)
    room = ROOMS.get(name)
    if room is None:
        return [f"{name} is no room of the table"]
    wrong = []
    for imported, inside in imports(ast.parse(source)):
        head, _, rest = imported.partition(".")
        ours = head == PACKAGE.name
        target = (room_of(rest) if rest else "__init__") if ours else head
        allowed = (room.rooms if ours else room.third_parties).split()
        allowed += room.inside_functions.split() if inside else []
        if head == "":
            wrong.append(f"{module}: relative import {imported}")
        elif target not in allowed and target not in sys.stdlib_module_names and not (ours and target == name):
            wrong.append(f"{module} imports {imported}" + (" inside a function" if inside else ""))
    return wrong


def modules() -> list[tuple[str, Path]]:
    """(dotted name without the package's, file) of every module; a folder's ``__init__`` has the folder's name."""
    return [(".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), path)
            for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_arrow_is_kept(module, path):
    assert forbidden(module, path.read_text()) == []


@pytest.mark.parametrize(("module", "source"), [
    ("generator.model", "import fairseq.models"),
    ("generator.model", "def load():\n    from fairseq import utils"),
    ("generator.model", "from lightseq_fairseq import plugin"),
    ("config", "import torch"),
    ("layers.encoder", "if True:\n    from lightseq_fairseq.plugin.ls_adam import LSAdam"),
    ("export.fairseq", "import fairseq"),
    ("cli.train", "from lightseq_fairseq.generator import Generator"),
    ("ops.adam", "from . import softmax"),
    ("utils", "import os"),
])
def test_wrong_arrow_is_found(module, source):
    assert len(forbidden(module, source)) == 1


def test_registration_is_the_plugin_s_alone():
    """Nothing but the package's own ``register`` and the training command lines loads the plugin."""
    users = {room_of(module) for module, path in modules()
             for imported, _ in imports(ast.parse(path.read_text())) if imported.startswith("lightseq_fairseq.plugin")}
    assert users <= {"__init__", "plugin", "cli.train", "cli.validate", "cli.deepspeed"}


def test_kernels_know_no_torch():
    sources = [path for room in ("kernels", "common") for path in (ROOT / "csrc" / room).rglob("*.*")]
    assert [path.name for path in sources if re.search(r"#\s*include\s*[<\"](torch|ATen|c10)", path.read_text())] == []


IMPORT_TIMES = """
import json, sys, time
start = time.process_time()
import torch
middle = time.process_time()
import lightseq_fairseq.inference, lightseq_fairseq.generator
end = time.process_time()
print(json.dumps({"torch": middle - start, "ours": end - middle, "cuda": torch.cuda.is_initialized(),
                  "modules": sorted(sys.modules)}))
"""


def import_in_fresh_process() -> dict:
    result = subprocess.run([sys.executable, "-c", IMPORT_TIMES], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(result.stdout)


def test_generation_loads_no_training_code_and_no_gpu():
    runs = [import_in_fresh_process() for _ in range(3)]
    loaded = {name.split(".")[0] for name in runs[0]["modules"]}
    assert loaded & {"fairseq", "fairseq_cli", "transformers", "hydra", "omegaconf"} == set()
    assert not any(name.startswith("lightseq_fairseq.plugin") for name in runs[0]["modules"])
    assert not runs[0]["cuda"]
    assert min(run["ours"] for run in runs) < 0.2 * min(run["torch"] for run in runs)
