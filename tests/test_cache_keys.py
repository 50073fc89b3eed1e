"""A cache key depends on exactly the code and settings that determine the thing."""

import ast
import contextlib
import functools
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_substrate import QUESTIONS, random_sae, tiny_substrate

import experiment as ex
from lab import code as lab_code
from lab import storage, substrates
from lab.code import PLUMBING, code_behind, read_code
from lab.console import Clock
from lab.evaluations import evaluate
from lab.storage import Cache, code_digest, laboratory_digest
from lab.substrates import Pythia, Standin

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
PROBES = {"topics": [(part, label, f"{label} word{i} river{i % 5} old mill by the {label}")
                     for i in range(60) for part in ("train", "test")
                     for label in ("mill", "tower", "bridge")]}


# -- What an edit of the sources changes ---------------------------------------------------------


class ByName(Cache):
    """A cache that finds things by their names alone, and writes down their keys."""

    def __init__(self, root):
        super().__init__(root)
        self.things, self.keys = {}, {}

    def get(self, name, causes, build):
        shown = name.removeprefix("tiny/")
        shown = "activations" if shown.startswith("activations") else shown
        self.keys.setdefault(shown, set()).add(self.path(name, *causes))
        if "results/" in name:  # to see what else is asked for
            return build()
        if name not in self.things:
            self.things[name] = build()
        return self.things[name]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return ByName(tmp_path_factory.mktemp("cache"))


def keys(cache, config):
    """The keys of everything that a run keeps, by name."""
    substrate = tiny_substrate(cache.root, PROBES, QUESTIONS, probe_train=40, probe_test=20)
    substrate.cache, cache.keys = cache, {}
    buffer = ex.ActivationBuffer.read(substrate, shard_tokens=512)
    cache.keys["training"] = {ex.training_key(config, substrate, buffer)}
    evaluate({0: random_sae()}, substrate, lambda domain: buffer.sample(domain, 200), Clock())
    return cache.keys


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of the sources, and what makes it the code that keys are made of."""
    for name in ("experiment.py", "plot.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "lab", tmp_path / "lab", ignore=shutil.ignore_patterns("__pycache__"))

    def use(root):
        sources = read_code(root)
        for module in (lab_code, storage):
            monkeypatch.setattr(module, "CODE", {**sources, "__main__": sources["experiment"]})

    use(tmp_path)
    return tmp_path, use


@pytest.fixture(scope="module")
def unedited():
    """The keys before any edit, once they are computed."""
    return {}


@pytest.fixture
def changed_by(tree, cache, unedited, small_config):
    """Names of the things whose keys change when a copy of the sources is edited."""
    root, use = tree

    def changed(file, old, new):
        if not unedited:
            unedited.update(keys(cache, small_config))
        text = (root / file).read_text()
        assert text.count(old) == 1, f"{old!r} is in {file} {text.count(old)} times"
        (root / file).write_text(text.replace(old, new))
        use(root)
        after = keys(cache, small_config)
        assert after.keys() == unedited.keys()
        return {name for name in after if after[name] != unedited[name]}

    return changed


RESULTS = {f"results/{name}-0" for name in (
    "reconstruction", "conditioning", "sparse_probing", "separation", "unlearning")}
PROBED = {"results/sparse_probing-0", "results/separation-0"}
ON_HELD_OUT_TEXT = {*RESULTS - PROBED, "yardstick"}
READ = {"activations", "contexts-ask", "contexts-learn", "sink-norm", "heldout", "questions",
        "probe-topics", "probe-llm-topics", "separation-probes-topics"}


@pytest.mark.parametrize(("file", "old", "new", "expected"), [
    # of an experiment
    ("experiment.py", "(evenness_F / share_even)", "(evenness_F / 2 / share_even)",
     {"training"}),
    ("experiment.py", "(1 - pure_F)).sum()", "(2 - pure_F)).sum()", {"training"}),
    ("lab/pairs.py", "gram_DD.square().sum() - square_F.square().sum()",
     "gram_DD.square().sum() - square_F.sum()", {"training"}),
    ("lab/pairs.py", "share_RF = scipy.sparse.csr_matrix((1 / n_R[token_N]",
     "share_RF = scipy.sparse.csr_matrix((2 / n_R[token_N]", {"training"}),
    ("experiment.py", "USE_MEMORY = 0.98", "USE_MEMORY = 0.99", {"training"}),
    ("lab/shards.py", "keep = substrate.is_plain(x_NTD).cpu()",
     "keep = substrate.is_plain(2 * x_NTD).cpu()", {"activations", "training"}),
    # of an evaluation
    ("lab/evaluations/unlearning.py", "SET_SIZES = (10, 20, ", "SET_SIZES = (10, 30, ",
     {"results/unlearning-0"}),
    ("lab/evaluations/conditioning.py", "GROUP_SIZE = 64", "GROUP_SIZE = 32",
     {"results/conditioning-0"}),
    ("lab/evaluations/reconstruction.py", "DUPLICATE_COSINE = 0.9", "DUPLICATE_COSINE = 0.8",
     {"results/reconstruction-0"}),
    ("lab/evaluations/prompt_trees.py", ".argmax(dim=1) == self.answer_Q",
     ".argmin(dim=1) == self.answer_Q", {"questions", *ON_HELD_OUT_TEXT}),
    ("lab/evaluations/probing.py", "C=1.0", "C=2.0",
     {"probe-llm-topics", "results/sparse_probing-0"}),
    # of what they share
    ("lab/sparse.py", "limit_F -= 6 * sigma_F", "limit_F -= 7 * sigma_F",
     {"training", "yardstick", *RESULTS}),
    ("lab/grouping.py", "free = i < rounds - 2", "free = i < rounds - 3",
     {"results/conditioning-0"}),
    ("lab/language_model.py", "tracer.stop()", "pass", {"training", "yardstick", *READ, *RESULTS}),
    ("lab/substrates/__init__.py", "SINK_FACTOR = 10.0", "SINK_FACTOR = 20.0",
     {"training", "yardstick", *READ - {"questions"}, *RESULTS}),
    # of what carries numbers and makes none
    ("lab/console.py", "HEARTBEAT = 50.0", "HEARTBEAT = 40.0", set()),
    ("lab/storage.py", "os.fsync(handle)", "pass", set()),
    ("lab/distributed.py", "PATIENCE = 10.0", "PATIENCE = 20.0", set()),
    ("lab/results/notes.py", "begin, end = ", "end, begin = ", set()),
    ("lab/results/frontier.py", "ANSWER_GRID = np.linspace(0, 1 - RETAINED, 61)",
     "ANSWER_GRID = np.linspace(0, 1 - RETAINED, 31)", {"results/unlearning-0", "yardstick"}),
    ("plot.py", '"run_8": "vanilla (off)"', '"run_8": "vanilla"', set()),
    # of the table
    ("experiment.py", 'orthogonality="adaptive", alpha=0.10)', 'orthogonality="fixed", alpha=0.2)',
     set()),
    ("experiment.py", "expansion=2, steps=120", "expansion=4, steps=240", set()),
    ("experiment.py", "    eta: float = 4.0", "    eta: float = 5.0", set()),
], ids=lambda value: value[:28] if isinstance(value, str) else "")
def test_an_edit_changes_the_keys_of_what_it_determines_and_no_others(changed_by, file, old, new,
                                                                      expected):
    assert changed_by(file, old, new) == expected


def reworded(text):
    """The source with other docstrings and annotations, without comments, in another layout."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = "Other words."
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                setattr(node, field, ast.Name("Other"))
    return ast.unparse(tree)


def test_other_words_types_and_layout_change_no_key(tree, cache, small_config):
    root, use = tree
    before = keys(cache, small_config)
    for path in root.rglob("*.py"):
        path.write_text(reworded(path.read_text()))
    use(root)
    assert "Other words." in (root / "lab" / "sparse.py").read_text()
    assert keys(cache, small_config) == before


def test_results_carry_a_digest_of_all_of_the_laboratory_and_of_nothing_else(tree):
    root, use = tree

    def after(file, old, new):
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))
        use(root)
        return laboratory_digest()

    before = laboratory_digest()
    assert after("experiment.py", "USE_MEMORY = 0.98", "USE_MEMORY = 0.99") == before
    assert after("lab/sparse.py", '"""', '"""Other words. ') == before
    digests = [before, after("lab/evaluations/unlearning.py", "SET_SIZES = (10, 20, ",
                             "SET_SIZES = (10, 30, "),
               after("lab/results/frontier.py", "RETAINED = 0.95", "RETAINED = 0.96")]
    assert len(set(digests)) == 3


def test_a_models_key_holds_how_it_is_loaded_and_not_how_it_is_fetched_or_what_it_reads():
    hashed = substrates.HASHED
    behind = {name.split(".")[-1] for name in code_behind(Standin.load_model, values=hashed)}
    assert "convert" in behind
    assert not behind & {"wheel", "download", "corpus"}
    assert "lab.substrates.pythia.Pythia.load_model" in code_behind(Pythia.load_model)
    assert "lab.substrates.pythia.Pythia.corpus" not in code_behind(Pythia.load_model)


# -- What runs is what counts --------------------------------------------------------------------

SMALL = """
from lab.code import code_behind
from helpers import double
import more_helpers as more

def loss(x):
    return more.half(double(x))

if __name__ == "__main__":
    import pathlib
    if pathlib.Path("edit").exists():
        pathlib.Path("helpers.py").write_text("def double(x): return 3 * x")
        pathlib.Path("experiment.py").write_text("")
    print(sorted(code_behind(loss).items()))
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script beside a small experiment; gives the code behind its loss as it was printed."""
    (tmp_path / "lab").mkdir()
    for name in ("__init__.py", "code.py", "language_model.py"):
        shutil.copy(ROOT / "lab" / name, tmp_path / "lab" / name)
    (tmp_path / "experiment.py").write_text(SMALL)
    (tmp_path / "helpers.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "more_helpers.py").write_text("def half(x):\n    return x / 2\n")

    def run(*command):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True,
                              text=True, check=True)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("[('")]
        return line

    return run


def test_a_scripts_code_is_what_it_and_the_files_beside_it_define(run):
    line = run("experiment.py")
    for name in ("experiment.loss", "helpers.double", "more_helpers.half"):
        assert f"('{name}', " in line


@pytest.mark.parametrize("launcher", [
    ("-m", "cProfile"), ("-m", "trace", "--count", "-C", "counts"), ("-X", "utf8", "-W", "error"),
], ids=lambda words: words[1])
def test_the_code_is_the_same_however_the_script_is_started(run, launcher):
    assert run(*launcher, "experiment.py") == run("experiment.py")


def test_a_copy_under_another_name_has_keys_of_its_own_code(run, tmp_path):
    original = run("experiment.py")
    copy = tmp_path / "my_experiment.py"
    copy.write_text(SMALL)
    assert run("my_experiment.py") == original
    copy.write_text(SMALL.replace("double(x)", "double(x) + 1"))
    assert run("my_experiment.py") != original


def test_a_file_that_is_edited_after_its_import_is_known_as_it_was_loaded(run, tmp_path):
    original = run("experiment.py")
    (tmp_path / "edit").write_text("")
    assert run("experiment.py") == original
    assert "3 * x" in (tmp_path / "helpers.py").read_text()
    (tmp_path / "edit").unlink()
    (tmp_path / "experiment.py").write_text(SMALL)
    assert run("experiment.py") != original


def test_code_that_is_not_in_any_text_is_no_silent_cause(monkeypatch):
    made = {"__name__": "experiment"}
    exec("def loss(x): return x", made)
    with pytest.raises(LookupError, match="the code of loss is not in the text of experiment"):
        code_digest(made["loss"])


# -- No key can go stale -------------------------------------------------------------------------

HANDS_OVER = {"lab.evaluations.evaluate", "lab.evaluations.evaluations_of",
              "lab.substrates.Substrate.cached", "lab.results.tracking.Tracker"}


class Watch:
    """What of the project runs while a thing is built, beside what its key depends on."""

    def __init__(self):
        self.behind, self.building, self.ran = {}, [], {}
        self.names, self.spans = {}, {}

    def covered(self, causes):
        """Names of all definitions whose code is in `causes`."""
        if isinstance(causes, tuple | list):
            return set().union(*map(self.covered, causes))
        return self.behind.get(causes, set()) if isinstance(causes, str) else set()

    @contextlib.contextmanager
    def watching(self, name, causes, but=None):
        self.building.append((name, but))
        self.ran.setdefault(name, (self.covered(causes), set()))
        threading.setprofile(self.notice)
        sys.setprofile(self.notice)
        try:
            yield
        finally:
            self.building.pop()
            if not self.building:
                sys.setprofile(None)
                threading.setprofile(None)

    def notice(self, frame, event, _):
        code = frame.f_code
        if event != "call" or not self.building or code is self.building[-1][1]:
            return
        if code not in self.names:
            self.names[code] = self.names_of(code)
        if self.names[code]:
            self.ran[self.building[-1][0]][1].add(self.names[code])

    def names_of(self, code):
        """Names of the definition, and of the class, in which the code stands."""
        path = Path(code.co_filename)
        if not path.is_relative_to(ROOT) or path.is_relative_to(ROOT / "tests"):
            return ()
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module in PLUMBING:
            return ()
        if module not in self.spans:
            self.spans[module] = [
                (min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", ()))]),
                 node.end_lineno, name)
                for name, definition in lab_code.CODE[module].definitions.items()
                for node in definition.nodes]
        return tuple(f"{module}.{name}" for first, last, name in self.spans[module]
                     if first <= code.co_firstlineno <= last)

    def missing(self):
        """By thing, what ran and is not in its key."""
        return {name: lacking for name, (covered, ran) in self.ran.items()
                if (lacking := {names for names in ran
                                if not covered & set(names) and not HANDS_OVER & set(names)})}


@pytest.fixture
def watch(monkeypatch):
    watch, behind, get, digest, train = (Watch(), storage.code_behind, Cache.get, ex.digest,
                                         ex.train_sae)
    key = []

    def watched_behind(*roots, **options):
        trees = behind(*roots, **options)
        watch.behind[storage.digest(sorted(trees.items()))] = set(trees)
        return trees

    def watched_get(self, name, causes, build):
        def watched_build():
            code = build.__code__ if build.__name__ == "<lambda>" else None  # it only calls
            with watch.watching(name, causes, but=code):
                return build()

        return get(self, name, causes, watched_build)

    def watched_digest(*causes):
        key[:] = causes
        return digest(*causes)

    @functools.wraps(train)
    def watched_train(*arguments):
        with watch.watching("training", key):
            return train(*arguments)

    monkeypatch.setattr(storage, "code_behind", watched_behind)
    monkeypatch.setattr(Cache, "get", watched_get)
    monkeypatch.setattr(ex, "digest", watched_digest)
    monkeypatch.setattr(ex, "train_sae", watched_train)
    return watch


def test_every_function_that_runs_while_a_thing_is_built_is_in_its_key(job, watch):
    assert job("run_2") == 0
    built = {name.removeprefix("pythia/").split("/")[0] for name in watch.ran}
    assert built >= {"corpus", "contexts-learn", "contexts-ask", "sink-norm", "activations",
                     "heldout", "questions", "training", "results"}
    assert {f"pythia/{name}" for name in RESULTS} <= watch.ran.keys()
    assert all(ran for _, ran in watch.ran.values())
    assert watch.missing() == {}


def test_the_watch_notices_what_a_key_lacks(job, watch, monkeypatch):
    """A training key of the SAE's code alone would lack the trainer and its losses."""
    monkeypatch.setattr(ex, "code_digest", lambda *_, **__: code_digest(ex.CustomSAE))
    assert job("run_2") == 0
    missing = {name for names in watch.missing()["training"] for name in names}
    assert {"experiment.active_set_loss", "experiment.CustomTrainer.step",
            "lab.pairs.cofiring_sums"} <= missing
    assert "experiment.CustomSAE.normalize_decoder_" not in missing
