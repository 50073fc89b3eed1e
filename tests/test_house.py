"""The house: who may import whom, and how long things may be."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from lab.code import read_sources

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {name: text for name, text in read_sources(ROOT).items()
           if name in ("experiment", "plot") or name.split(".")[0] == "lab"}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
FLOORS = (  # from the top; who stands on one imports what stands lower
    ("experiment",),
    ("lab.evaluations", "lab.results"),
    ("lab.grouping", "lab.pairs", "lab.sparse", "lab.kernels", "lab.language_model",
     "lab.substrates", "lab.shards"),
    ("lab.storage", "lab.distributed", "lab.device", "lab.console", "lab.code",
     "lab.settings", "lab"),
)
TOP_LEVEL = {
    "experiment.py", "plot.py", "notes.txt", "requirements.txt", "run_0", "README.md", "lab",
    "tests", "bench", "docs", "study", ".ci",
    "LICENSE", "CITATION.cff", ".gitignore", "ruff.toml", "requirements-test.txt",
}
PARTS = {"lab.evaluations", "lab.results", "lab.substrates"}  # folders


def imports(name):
    """Modules that a module imports, of the project and others, wherever in the file."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports by dots"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [module for module in inside if module in TREES]
            yield from modules or [node.module]


OWN = {name: {module for module in imports(name) if module in TREES} for name in TREES}


def part(name):
    """The folder that a module is in, or the module itself."""
    return next((part for part in PARTS if name == part or name.startswith(f"{part}.")), name)


def floor(name):
    return next(i for i, parts in enumerate(FLOORS) if part(name) in parts)


def definitions(kind):
    """(module, name, node) of all functions or classes, also of those inside others."""
    return [(name, node.name, node) for name, tree in TREES.items() for node in ast.walk(tree)
            if isinstance(node, kind)]


# -- Who imports whom ----------------------------------------------------------------------------


def test_every_module_has_its_place_in_the_house():
    assert {part(name) for name in TREES} == {"plot", *itertools.chain(*FLOORS)}


def test_imports_run_downward_only():
    upward = {(name, other) for name in TREES if name != "plot" for other in OWN[name]
              if floor(other) < floor(name)}
    assert upward == set()


def test_no_modules_import_each_other_in_a_circle():
    def reached(name, seen):
        for other in OWN[name] - seen:
            seen |= {other} | reached(other, seen | {other})
        return seen

    assert [name for name in TREES if name in reached(name, set())] == []


def test_the_laboratory_never_imports_the_experiment():
    assert not [name for name in TREES if name.startswith("lab") and {
        module.split(".")[0] for module in imports(name)} & {"experiment", "plot", "tests"}]


def test_figures_need_neither_torch_nor_the_experiment_and_of_the_laboratory_three_modules():
    assert OWN["plot"] == {"lab.results.statistics", "lab.results.checksum", "lab.results.reading"}
    assert {module for name in OWN["plot"] for module in imports(name)
            if module not in sys.stdlib_module_names} <= {"numpy", "collections.abc"}
    program = "import sys, plot; print({'torch', 'experiment', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stderr[-1500:]


def test_nnsight_is_imported_in_one_module_only():
    assert [name for name in TREES if "nnsight" in {
        module.split(".")[0] for module in imports(name)}] == ["lab.language_model"]


def test_names_are_imported_from_where_they_are_defined_so_that_keys_can_follow_them():
    """A module by name, its names by `from`; nothing defined inside a branch."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in TREES:
                assert "*" not in {alias.name for alias in node.names}, name
        branches = [node for node in tree.body if isinstance(node, ast.If | ast.Try | ast.With)]
        assert not [node for branch in branches for node in ast.walk(branch) if isinstance(
            node, ast.FunctionDef | ast.ClassDef)], name


# -- How long things may be ----------------------------------------------------------------------


def test_the_experiment_is_read_in_one_sitting():
    assert SOURCES["experiment"].count("\n") <= 1000


def test_the_readme_is_read_in_three_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1300


@pytest.mark.parametrize("notes", ["notes.txt", "study/notes.txt"])
def test_notes_are_short(notes):
    assert (ROOT / notes).read_text().count("\n") <= 150


def test_no_module_of_the_laboratory_is_longer_than_350_lines():
    long = {name: text.count("\n") for name, text in SOURCES.items() if name.startswith("lab")
            and text.count("\n") > 350}
    assert long == {}


def test_no_function_is_longer_than_40_lines():
    long = {f"{module}.{name}": node.end_lineno - node.lineno + 1
            for module, name, node in definitions(ast.FunctionDef)
            if node.end_lineno - node.lineno + 1 > 40}
    assert long == {}


def test_no_line_is_longer_than_100_columns():
    long = [f"{path.relative_to(ROOT)}:{i}" for path in sorted(ROOT.glob("**/*.py"))
            if not {".venv", ".cache"} & set(path.relative_to(ROOT).parts)
            for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert long == []


def test_the_top_level_holds_what_the_plan_of_the_house_lists_and_no_more():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert {path.split("/")[0] for path in done.stdout.splitlines()} == TOP_LEVEL


def test_the_given_baseline_is_the_only_run_at_the_top_level():
    done = subprocess.run(["git", "ls-files", "run_*"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert done.stdout.splitlines() == ["run_0/final_info.json"]


# -- What a reader is told -----------------------------------------------------------------------


def test_every_module_and_every_class_says_what_it_is():
    silent = [name for name, tree in TREES.items() if not ast.get_docstring(tree)]
    silent += [f"{module}.{name}" for module, name, node in definitions(ast.ClassDef)
               if not ast.get_docstring(node)]
    assert silent == []
