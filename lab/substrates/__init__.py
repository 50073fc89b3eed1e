"""The two substrates, and the choice between them."""

from lab.console import UserError, say
from lab.storage import Cache
from lab.substrates.pythia import Pythia
from lab.substrates.standin import Standin


def choose_substrate(choice: str, cache: Cache) -> Standin | Pythia:
    """`auto` prefers Pythia and falls back to the stand-in, saying so in one line."""
    if choice not in ("auto", "pythia", "standin"):
        raise UserError(f"SAE_SUBSTRATE={choice!r} is unknown; use auto, pythia or standin")
    if choice == "standin":
        return Standin(cache)
    pythia = Pythia(cache)
    try:
        pythia.check()
        return pythia
    except UserError as reason:
        if choice == "pythia":
            raise
        say(f"substrate: standin ({Standin.model_name}); {reason}")
    return Standin(cache)
