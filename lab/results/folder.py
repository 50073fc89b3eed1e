"""A run's folder: who may write to it, and what becomes of results of another configuration."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import Timeout

from lab.console import IS_LEADER, UserError, report
from lab.results.exports import export_sae
from lab.results.notes import update_notes
from lab.sparse import ExportedSAE
from lab.storage import Cache, digest, to_json, write_text
from lab.substrates import Pythia, Standin


class RunFolder:
    """The folder that --out_dir names; its last part is the run, its parent holds the study.

    Both are taken from the path as it was given: a link to a folder elsewhere keeps its own name
    and neighbours.
    """

    def __init__(self, out_dir: Path):
        self.path = Path(os.path.abspath(out_dir))
        self.run, self.study = self.path.name, self.path.parent

    @contextlib.contextmanager
    def held(self, cache: Cache) -> Iterator[None]:
        """The folder, made if it is missing, while no other process works on it."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out_dir {self.path} is a file; name a folder that is new or a "
                            "run's own")
        self.path.resolve().mkdir(parents=True, exist_ok=True)
        if links := [path for path in self.path.rglob("*") if path.is_symlink()]:
            raise UserError(f"{links[0]} is a link and may lead out of the run folder; remove it")
        lock = cache.lock(f"run-{digest(str(self.path.resolve()))}", timeout=0)
        try:
            with lock if IS_LEADER else contextlib.nullcontext():
                yield
        except Timeout:
            raise UserError(f"another process works on {self.path}; wait for it, or stop it"
                            ) from None

    def set_aside_other(self, config: Mapping[str, Any]) -> None:
        """Move the folder away whole, under a number, if it holds another configuration's results.

        A link stays where it is; what it leads to is moved.
        """
        before = self.configuration()
        if before is None or before == json.loads(to_json(config)):
            return
        place = self.path.resolve()
        number = 1
        while (aside := place.with_name(f"{place.name}_old_{number}")).exists():
            number += 1
        os.rename(place, aside)
        place.mkdir()
        report(f"{self.path} held another configuration's results; they are in {aside} now")

    def configuration(self) -> dict[str, Any] | None:
        """What the folder's results were made with; None where it holds none."""
        for name, inside in (("config.json", ()), ("final_info.json", ("config",))):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
                content = json.loads((self.path / name).read_bytes())
                for key in inside:
                    content = content[key]
                return content if isinstance(content, dict) else {}
        return None

    def write_saes(self, source: Standin | Pythia, config: Mapping[str, Any],
                   saes: Mapping[int, ExportedSAE]) -> None:
        """config.json and the weights of every seed, after another configuration's are out of the
        way."""
        self.set_aside_other(config)
        write_text(self.path / "config.json", to_json(config, 2))
        for seed, sae in saes.items():
            export_sae(sae, self.path / f"seed_{seed}", source, {**config, "seed": seed})

    def write_results(self, info: Mapping[str, Any], histories: Mapping[int, list],
                      cache: Cache) -> None:
        """Training curves, the run's section of the notes, and last final_info.json."""
        lines = [to_json(line) + "\n" for history in histories.values() for line in history]
        write_text(self.path / "history.jsonl", "".join(lines))
        update_notes(self.study / "notes.txt", info, cache)
        write_text(self.path / "final_info.json", to_json(info, 1))
