"""wandb: training curves and results, where it works."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import requests
import wandb

from lab.console import IS_LEADER, report
from lab.results.notes import summary
from lab.storage import Cache, digest, write_text


class Tracker:
    """wandb if it works, one line if it does not: logging never costs a run.

    Each line of the history has a wandb step of its own, so that a repeated run, which has the same
    id, logs none twice: online wandb refuses old steps, offline a file in the cache knows them.
    """

    def __init__(self, run: str, config: Mapping[str, Any], group: str, cache: Cache):
        self.run, self.config, self.next = None, config, 0
        if not IS_LEADER:
            return
        signed_in = os.environ.get("WANDB_API_KEY") or requests.utils.get_netrc_auth(
            os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
        defaults = {"WANDB_PROJECT": ("project", "adaptive-orthogonal-sae"),
                    "WANDB_NAME": ("name", run), "WANDB_RUN_GROUP": ("group", group),
                    "WANDB_RUN_ID": ("id", digest(run, config, group)),
                    "WANDB_RESUME": ("resume", "allow"),
                    "WANDB_MODE": ("mode", "online" if signed_in else "offline"),
                    "WANDB_DIR": ("dir", str(cache.root))}
        settings = {key: os.environ.get(name) or default
                    for name, (key, default) in defaults.items()}
        try:
            self.run = wandb.init(
                config=dict(config), **settings,
                settings=wandb.Settings(silent=True, console="off", disable_git=True,
                                        login_timeout=20, init_timeout=20, finish_timeout=20),
            )
            self.run.define_metric("*", step_metric="tokens")
            self.mark = cache.root / "wandb" / f"offline-{self.run.id}.step"
            if self.run.offline and self.mark.exists():
                self.next = int(self.mark.read_text())
        except Exception as error:  # noqa: BLE001 - whatever it is, the run matters more
            report(f"wandb is off: {type(error).__name__}: {' '.join(str(error).split())[:120]}")

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of the training curves; those of a seed first, then its groupings."""
        place = 2 * self.config["seeds"].index(line["seed"]) + ("loss" not in line)
        step = place * (self.config["steps"] + 1) + line["step"]
        if self.run is not None and step >= self.next:
            with contextlib.suppress(Exception):
                curves = line.keys() - {"seed", "tokens"}
                values = {f"seed_{line['seed']}/{key}": line[key] for key in curves}
                self.run.log({"tokens": line["tokens"], **values}, step=step)
                self.next = step + 1
                if self.run.offline:
                    write_text(self.mark, str(self.next))

    def log_rest(self, history: list[Mapping[str, Any]]) -> None:
        """Of a trained seed, what an earlier process logged nowhere, and the groupings."""
        for line in sorted(history, key=lambda line: "loss" not in line):
            self.log(line)

    def finish(self, info: Mapping[str, Any]) -> None:
        """Results, and the configuration as it trained."""
        if self.run is not None:
            with contextlib.suppress(Exception):
                self.run.config.update(dict(info["config"]), allow_val_change=True)
                self.run.summary.update(info["means"])
                text = "\n".join(summary(info))
                self.run.log({"results": wandb.Html(f"<pre>{text}</pre>")})
                self.run.finish()
