"""The main job on the `pythia` substrate, against a Hub on this machine that may fail."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hub_fixtures
import pytest
from forked import Forked
from hub import Fault, Hub

from lab.substrates.pythia import BIOLOGY_SUBJECTS, RETAIN_SUBJECTS, Pythia
from lab.substrates.pythia_probes import AMAZON, NEWS, PROBE_SOURCES
from lab.substrates.standin import Standin
from lab.substrates.texts import SIZES, is_about_options

ROOT = Path(__file__).resolve().parent.parent
NAME = Pythia.model_name
ABSENT, BROKEN = "Helsinki-NLP/europarl", AMAZON
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there
FETCH = """
import os, pathlib
from lab.storage import Cache, to_json
from lab.substrates import Pythia, choose_source, quiet_libraries
from lab.substrates.texts import SIZES
quiet_libraries()
cache = Cache(pathlib.Path(os.environ["SAE_CACHE_DIR"]))
Pythia(cache).fetch()
"""
CORPUS = FETCH + """
places, rows = [], Pythia.rows
Pythia.rows = lambda self, *place: (places.append(place), rows(self, *place))[1]
print(to_json({"corpus": Pythia(cache).corpus(SIZES["smoke"]), "places": places}))
"""
SHORT = """
import sys, experiment
experiment.BUDGETS["smoke"] |= dict(steps=40, ramp_fraction=0.5, n_seeds=1)
sys.exit(experiment.main(sys.argv[1:]))
"""  # as far as training goes: tests/test_main.py has the whole of it
CHOOSE = FETCH.replace("Pythia(cache).fetch()", "print(choose_source('auto', cache).name)")


def surroundings(endpoint, folder, **environment):
    """What a process finds whose Hub is `endpoint`, with caches of its own in `folder`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**inherited, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"),
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
            "SAE_CACHE_DIR": str(folder / "cache"), "SAE_SUBSTRATE": "pythia",
            "SAE_BUDGET": "smoke", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",  # beside the main job of the session
            **environment}


def run(endpoint, folder, *arguments, **environment):
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
                          env=surroundings(endpoint, folder, **environment))


def short(endpoint, folder, out_dir="run_2", **environment):
    return run(endpoint, folder, "-c", SHORT, f"--out_dir={out_dir}", **environment)


def one_line_error(done):
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert done.returncode == 1, done.stderr[-1500:]
    assert errors == lines[-1:], done.stderr[-1500:]
    assert "Traceback" not in done.stderr
    return errors[0]


@pytest.fixture(scope="module")
def running_hub():
    with Hub() as hub:
        hub_fixtures.fill(hub)
        yield hub


@pytest.fixture(scope="module")
def study(running_hub, tmp_path_factory):
    """A folder in which run_2 has run on what the Hub gave, all but two data sets of probing texts;
    its requests."""
    folder = tmp_path_factory.mktemp("pythia")
    running_hub.requests.clear()
    running_hub.faults += [Fault(f"/datasets/{ABSENT}", "absent"),
                           Fault(f"{BROKEN}.*parquet", "broken")]
    done = short(running_hub.endpoint, folder)
    running_hub.faults.clear()
    assert done.returncode == 0, done.stderr[-1500:]
    return folder, done, list(running_hub.requests)


@pytest.fixture
def hub(running_hub):
    yield running_hub
    running_hub.faults.clear()


@pytest.fixture(scope="module")
def forked(running_hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forked")
    return folder, Forked(**surroundings(running_hub.endpoint, folder))


@pytest.fixture(scope="module")
def read_once(running_hub, forked):
    """What a corpus is read to be from a sound Hub: corpus, the places it was read from, what was
    said, requests."""
    folder, processes = forked
    running_hub.requests.clear()
    done = processes.run(CORPUS, folder, surroundings(running_hub.endpoint, folder))
    assert done.returncode == 0, done.stderr[-1500:]
    return {**json.loads(done.stdout), "stderr": done.stderr,
            "requests": list(running_hub.requests)}


@pytest.fixture
def corpus(read_once):
    return read_once["corpus"]


@pytest.fixture
def attempt(hub, forked):
    """run_2 from the beginning, with the faults that the Hub has now."""
    folder, processes = forked

    def attempt(**environment):
        for name in ("hf", "cache", "run_2"):
            shutil.rmtree(folder / name, ignore_errors=True)
        done = processes.run("sys.exit(experiment.main(['--out_dir=run_2']))", folder,
                             surroundings(hub.endpoint, folder, **environment))
        assert not (folder / "run_2" / "final_info.json").exists()
        return one_line_error(done)

    return attempt


def read(folder, run):
    text = (folder / run / "final_info.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    return json.loads(text)


# -- A sound Hub ---------------------------------------------------------------------------------


def test_the_main_job_runs_on_what_the_hub_serves(study):
    folder, done, _ = study
    info = read(folder, "run_2")
    assert "run_2 on pythia (smoke)" in done.stdout
    assert (info["substrate"], info["config"]["model_name"]) == ("pythia", NAME)
    assert (info["config"]["d_in"], info["config"]["d_sae"]) == (512, 1024)
    assert info["config"]["hook_name"] == "blocks.3.hook_resid_post"
    assert info["means"]["explained_variance"] > 0.3
    assert info["means"]["llm_test_accuracy"] > 0.75
    unlearning = info["unlearning"]["per_seed"][0]
    assert unlearning["counts"]["forget"]["asked"] == 16
    assert unlearning["contexts"] == dict.fromkeys(("forget", "retain", "news", "mmlu"), 4)
    assert {name for one in unlearning["sets"] for name in one["rise"]} == {*unlearning["contexts"]}
    exported = json.loads((folder / "run_2" / "seed_0" / "sae_lens" / "cfg.json").read_text())
    assert exported["d_in"] == 512
    assert exported["metadata"]["model_name"] == NAME


def test_every_probing_set_is_either_used_or_skipped_with_a_reason(study):
    folder, done, _ = study
    info = read(folder, "run_2")
    used = {name.removesuffix("_results") for name in info["eval_config"]["dataset_names"]}
    skipped = {name: info["skipped"][name] for name in PROBE_SOURCES if name in info["skipped"]}
    assert sorted([*used, *skipped]) == sorted(PROBE_SOURCES)
    assert set(skipped) == {ABSENT, BROKEN, f"{BROKEN}_sentiment"}
    assert "Repository Not Found" in skipped[ABSENT]
    assert "corrupted" in skipped[BROKEN]
    for name, reason in skipped.items():
        assert f"{name} is skipped" in done.stderr
        assert reason in done.stderr


def test_correlations_with_gender_are_removed_where_texts_have_one(study):
    """SCR needs the second attribute, which the biographies alone have here."""
    separation = read(study[0], "run_2")["separation"]["per_seed"][0]
    pairs = [row["dataset_name"] for row in separation["details"] if "_scr_" in row["dataset_name"]]
    assert len(pairs) == 6
    assert all(name.startswith("LabHC/bias_in_bios") for name in pairs)


def test_half_of_the_training_text_is_forget_text_and_the_rest_retain_text(study):
    text = read(study[0], "run_2")["environment"]["text"]
    learn, most = text["tokens"]["learn"], SIZES["smoke"].learn_tokens
    assert learn["forget"] == most // 128 // 2 * 128
    assert sum(learn.values()) == most // 128 * 128
    assert learn.keys() == {"forget", "WikiText train", "WikiText test", "other MMLU subjects"}
    assert learn["WikiText test"] == 0 < min(learn["WikiText train"], learn["other MMLU subjects"])
    assert min(text["tokens"]["ask"].values()) > 0


def test_results_name_the_commit_of_every_repository_and_count_the_documents(running_hub, study):
    text = read(study[0], "run_2")["environment"]["text"]
    for name, source in text["sources"].items():
        kind = "models" if name == NAME else "datasets"
        commits = [one.commit for one in running_hub.repositories[kind, name]]
        assert source["revision"] in commits or name == ABSENT
    assert set(text["sources"]) == set(Pythia.revisions)
    for half in ("learn", "ask"):
        assert text["documents"][half]["WMDP-bio"] > 100
    assert text["documents"]["ask"]["biology prose"] == 0


def test_repositories_are_read_at_their_pinned_commit(running_hub, study, read_once):
    files = [request.split("/resolve/") for request in (*study[2], *read_once["requests"])
             if "/resolve/" in request]
    for name, revision in Pythia.revisions.items():
        kind = "models" if name == NAME else "datasets"
        pinned = [repository.commit for repository in running_hub.repositories[kind, name]
                  if revision in (repository.commit, repository.branch)]
        asked = [path for start, path in files if start.endswith(f" /{name}")
                 or start.endswith(f" /datasets/{name}")]
        assert asked, name
        assert all(path.startswith(tuple(pinned)) for path in asked if name != NAME), name
        assert all(path.startswith((revision, *pinned)) for path in asked), name


def test_no_request_asks_for_data_at_a_branch(read_once):
    """What is not pinned is looked up once, and read at the commit that it then has."""
    data = [request for request in read_once["requests"] if "parquet" in request]
    assert data
    assert not [request for request in data if "/resolve/main/" in request]


def test_another_row_runs_offline_from_the_cache(hub, study):
    """`auto` takes Pythia from the cache, and no request is made."""
    folder, _, requests = study
    hub.faults.append(Fault("", "hang up"))
    before = len(hub.requests)
    done = short(hub.endpoint, folder, "run_8", HF_HUB_OFFLINE="1", SAE_SUBSTRATE="auto")
    assert done.returncode == 0, done.stderr[-1500:]
    assert len(hub.requests) == before
    first, second = read(folder, "run_2"), read(folder, "run_8")
    assert second["config"]["orthogonality"] == "off"
    for key in ("substrate", "skipped"):
        assert second[key] == first[key]
    assert second["means"]["llm_test_accuracy"] == first["means"]["llm_test_accuracy"]


# -- Texts, questions and probing sets -------------------------------------------------------------


def numbers_in(texts, pattern):
    return {int(found) for text in texts for found in re.findall(pattern, text)}


def test_every_split_of_a_data_set_is_read_once_for_all_that_is_made_of_it(read_once):
    places = [tuple(place) for place in read_once["places"]]
    assert len(set(places)) == len(places)
    assert {place for place in places if place[0] not in Pythia.revisions} == set()
    for path in ("LabHC/bias_in_bios", AMAZON, NEWS):
        assert {place[2] for place in places if place[0] == path} == {"train", "test"}
    assert ("cais/mmlu", "all", "test") in places
    assert len({place[0] for place in places}) == len(Pythia.revisions) - 1


def test_a_download_is_announced_in_a_line_with_its_size_and_time(read_once):
    lines = [line for line in read_once["stderr"].splitlines() if "fetching" in line]
    assert len(lines) == 2
    form = r"fetching {} from the Hugging Face Hub: about \d+ MB, which takes about \d.* at 5 MB/s"
    for line, what in zip(lines, (NAME, "texts and questions")):
        assert re.fullmatch(form.format(what), line), line


def test_biology_prose_is_trained_on_and_never_asked(corpus):
    garden = r"In garden (\d+) bed"
    learnt = numbers_in(corpus["learn"]["forget"], garden)
    assert 10 < len(learnt) < hub_fixtures.PAPERS  # as much as is needed, not all there is
    assert corpus["documents"]["learn"]["biology prose"] == len(learnt)
    assert max(map(len, corpus["learn"]["forget"])) <= 6000
    learnt_retain = [corpus["learn"][kind] for kind in list(corpus["learn"])[1:]]
    for texts in (*corpus["ask"].values(), *learnt_retain):
        assert not numbers_in(texts, garden)


def test_a_paper_in_which_an_asked_question_is_found_is_left_out(corpus):
    learnt = numbers_in(corpus["learn"]["forget"], r"In garden (\d+) bed")
    asked = numbers_in(corpus["ask"]["forget"], r"plant in garden (\d+)")
    copied = set(range(hub_fixtures.COPIES))
    assert asked & copied
    assert learnt & copied
    assert not learnt & asked & copied


def test_forget_questions_are_of_the_ask_half(corpus):
    asked = set(corpus["ask"]["forget"])
    for prompt, empty, options, answer in corpus["questions"]["forget"]:
        assert empty == "Answer:"
        question = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        assert f"{question} {options[answer]}" in asked
    learnt, rest = ({text for text in corpus[half]["forget"] if "Which plant" in text[:20]}
                    for half in ("learn", "ask"))
    assert rest == asked
    assert 0.35 < len(rest) / len(rest | learnt) < 0.65


def test_questions_with_an_option_that_speaks_of_the_others_are_dropped(corpus):
    for name, kind in (("forget", "WMDP-bio"), ("retain", "MMLU retain subjects")):
        questions = corpus["questions"][name]
        assert 0 < len(questions) < corpus["documents"]["ask"][kind]
        assert not [option for _, _, options, _ in questions for option in options
                    if is_about_options(option)]
    statements = corpus["learn"]["forget"] + corpus["ask"]["forget"]
    assert any(is_about_options(text.split("? ")[-1]) for text in statements)  # as text they stay


def test_wikitext_keeps_its_own_split_without_copies(corpus):
    town = r"of town (\d+) "
    learn, ask = (numbers_in(corpus[half][domain], town)
                  for half, domain in (("learn", "WikiText train"), ("ask", "retain")))
    assert ask >= set(range(300, 360))
    assert not learn & set(range(300, 360))
    assert corpus["documents"]["ask"]["WikiText train"] == 0
    assert corpus["documents"]["learn"]["WikiText test"] == 0


def test_other_mmlu_subjects_are_retain_text_and_those_of_biology_no_text_at_all(corpus):
    everything = [text for half in ("learn", "ask") for texts in corpus[half].values()
                  for text in texts]
    assert not [text for text in everything if re.search("|".join(BIOLOGY_SUBJECTS), text)]
    other = "|".join(hub_fixtures.OTHER_SUBJECTS)
    learn, ask = (sum(bool(re.search(other, text)) for text in corpus[half][domain])
                  for half, domain in (("learn", "other MMLU subjects"), ("ask", "retain")))
    assert 0.6 < learn / (learn + ask) < 0.9


def test_unnamed_texts_are_only_asked(corpus):
    assert not corpus["learn"].keys() & {"news", "mmlu"}
    assert len(corpus["ask"]["news"]) == 160
    assert len(corpus["ask"]["mmlu"]) == 80  # those that are in another subject too among them
    assert all(re.search("|".join(RETAIN_SUBJECTS), text) for text in corpus["ask"]["mmlu"])


def test_no_text_or_near_copy_of_it_is_in_both_halves(corpus):
    openings = [{" ".join(re.findall(r"\w+", text.lower()))[:200] for texts in corpus[half].values()
                 for text in texts} for half in ("learn", "ask")]
    assert not openings[0] & openings[1]


def test_probing_sets_come_in_the_splits_of_their_data_sets_with_the_second_attribute(corpus):
    """Rare classes included: women surgeons are at the end of both splits."""
    probes = corpus["probes"]
    assert set(probes) == set(PROBE_SOURCES)
    assert corpus["skipped"] == {}
    for name, source in PROBE_SOURCES.items():
        counts = {}
        for part, label, text, *attribute in probes[name]["rows"]:
            counts.setdefault((part, label, *attribute), set()).add(text)
        values = [str(value) for value in source.attributes if value is not None]
        for part, most in (("train", 40), ("test", 20)):
            for label in map(str, source.classes):
                cells = [len(counts[part, label, *value])
                         for value in ([[value] for value in values] or [[]])]
                assert len(set(cells)) == 1
                assert sum(cells) == most if len(source.splits) == 2 else 5 < sum(cells) <= most


# -- The choice of a substrate -------------------------------------------------------------------


def test_auto_takes_pythia_where_the_hub_serves_it_and_where_nobody_answers_the_standin(
        hub, tmp_path):
    done = run(hub.endpoint, tmp_path, "-c", CHOOSE)
    assert (done.stdout, done.stderr) == ("pythia\n", "")
    done = run(NOWHERE, tmp_path, "-c", CHOOSE)
    assert done.stdout == "standin\n"
    assert len(done.stderr.splitlines()) == 1
    assert f"substrate: standin ({Standin.model_name}); {NAME} cannot be had" in done.stderr
    assert "Connection refused" in done.stderr


@pytest.mark.parametrize("substrate", ["auto", "pythia"])
@pytest.mark.parametrize(("pattern", "kind", "name", "status"), [
    ("/api/", "401", NAME, 401),
    ("/api/datasets/cais/wmdp", "403", "cais/wmdp", 403),
    (f"/api/models/{NAME}", "gated", NAME, 403),
    ("wmdp.*parquet", "gated", "cais/wmdp", 403),
    ("safetensors", "401", NAME, 401),
])
def test_a_hub_that_refuses_names_the_token_and_no_other_substrate_is_taken(
        hub, attempt, substrate, pattern, kind, name, status):
    hub.faults.append(Fault(pattern, kind))
    error = attempt(SAE_SUBSTRATE=substrate)
    assert f"the Hugging Face Hub refuses {name} (status {status}); set HF_TOKEN" in error
    assert "network" not in error


# -- Faults --------------------------------------------------------------------------------------


def test_pythia_with_nobody_there_is_one_line(tmp_path):
    error = one_line_error(run(NOWHERE, tmp_path, ROOT / "experiment.py", "--out_dir=run_2"))
    assert NAME in error
    assert "Connection refused" in error
    assert not (tmp_path / "run_2" / "final_info.json").exists()


@pytest.mark.parametrize(
    ("pattern", "kind", "names", "reason"),
    [
        (f"/api/models/{NAME}", "404", NAME, "404"),
        ("/api/datasets/cais/wmdp", "429", "cais/wmdp", "429"),
        ("/api/", "500", NAME, "500"),
        ("/api/", "stall", NAME, "timed out"),
        ("GET .*safetensors", "404", NAME, "404"),
        ("GET .*safetensors", "429", NAME, "429"),
        ("GET .*safetensors", "500", NAME, "500"),
        ("GET .*safetensors", "hang up", NAME, "disconnected"),
        ("safetensors", "short", NAME, "damaged"),
        ("wmdp.*parquet", "500", "cais/wmdp", "500"),
        ("wmdp.*parquet", "short", "cais/wmdp", ""),
    ],
)
def test_a_hub_that_keeps_failing_is_one_line(hub, attempt, pattern, kind, names, reason):
    hub.faults.append(Fault(pattern, kind))
    error = attempt()
    assert names in error
    assert reason in error


def test_passing_faults_change_nothing(hub, read_once, tmp_path):
    """What is cut, slow or refused once is asked for again, and the whole of it is got."""
    hub.faults += [Fault("GET .*safetensors", "cut", 1), Fault("GET .*tokenizer.json", "stall", 1),
                   Fault("wikitext-103-raw-v1/train.*parquet", "cut", 1),
                   Fault("wikitext-103-raw-v1/test.*parquet", "stall", 1),
                   Fault("wmdp.*parquet", "500", 1), Fault("mmlu.*parquet", "429", 2),
                   Fault("github-code.*0000.parquet", "hang up", 1)]
    done = run(hub.endpoint, tmp_path, "-c", CORPUS, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert done.returncode == 0, done.stderr[-1500:]
    assert [fault.kind for fault in hub.faults if fault.times] == []
    assert json.loads(done.stdout)["corpus"] == read_once["corpus"]
    (weights,) = (tmp_path / "hf").rglob("model.safetensors")
    served = hub.repositories["models", NAME][0].files["model.safetensors"]
    assert weights.read_bytes() == served

    weights.write_bytes(served[:-9] + b"!" + served[-8:])
    done = run(hub.endpoint, tmp_path, "-c", FETCH)
    assert "does not match its hash" in done.stderr
    assert weights.read_bytes() == served
