"""wandb: training curves and results, where it works."""

import contextlib
import os
from typing import Any

import requests
import wandb

from lab.console import LEADER, say
from lab.results.notes import summary_table
from lab.storage import Cache, digest, write_text


class Logger:
    """wandb if it works, one line if it does not: logging never costs a run.

    Each line of the history has a wandb step of its own, so that a repeated run, which has the same
    id, logs none twice: online wandb refuses old steps, offline a file in the cache knows them.
    """

    def __init__(self, run: str, config: dict[str, Any], substrate: str, cache: Cache):
        self.run, self.config, self.next = None, config, 0
        if not LEADER:
            return
        signed_in = os.environ.get("WANDB_API_KEY") or requests.utils.get_netrc_auth(
            os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
        mode = os.environ.get("WANDB_MODE") or ("online" if signed_in else "offline")
        try:
            self.run = wandb.init(
                project="adaptive-orthogonal-sae", name=run, group=substrate, config=config,
                id=digest(run, config, substrate), resume="allow", mode=mode, dir=str(cache.root),
                settings=wandb.Settings(silent=True, console="off", disable_git=True,
                                        login_timeout=20, init_timeout=20, finish_timeout=20),
            )
            self.run.define_metric("*", step_metric="tokens")
            self.mark = cache.root / "wandb" / f"offline-{self.run.id}.step"
            if self.run.offline and self.mark.exists():
                self.next = int(self.mark.read_text())
        except Exception as error:  # noqa: BLE001 - whatever it is, the run matters more
            say(f"wandb is off: {type(error).__name__}: {' '.join(str(error).split())[:120]}")

    def log(self, line: dict[str, Any]) -> None:
        place = 2 * self.config["seeds"].index(line["seed"]) + ("loss" not in line)  # see caller
        step = place * (self.config["steps"] + 1) + line["step"]
        if self.run is not None and step >= self.next:
            with contextlib.suppress(Exception):
                curves = line.keys() - {"seed", "tokens"}
                values = {f"seed_{line['seed']}/{key}": line[key] for key in curves}
                self.run.log({"tokens": line["tokens"], **values}, step=step)
                self.next = step + 1
                if self.run.offline:
                    write_text(self.mark, str(self.next))

    def finish(self, info: dict[str, Any]) -> None:
        if self.run is not None:
            with contextlib.suppress(Exception):
                self.run.summary.update(info["means"])
                self.run.log({"results": wandb.Html(f"<pre>{summary_table(info)}</pre>")})
                self.run.finish()
