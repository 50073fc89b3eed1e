"""The laboratory: what must stay the same between two runs that are compared."""

import os

import lab.code  # noqa: F401 - before what takes seconds: it keeps the text that is loaded


def find_home() -> None:
    """Give libraries, which keep caches at home, a place where the system knows no home.

    So it is in a container that runs under a number for which it has no name.
    """
    if os.path.expanduser("~") == "~":
        cache = os.environ.get("SAE_CACHE_DIR") or ".cache"
        os.environ["HOME"] = os.path.abspath(
            os.path.join(".cache" if cache.startswith("~") else cache, "home"))
        os.environ.setdefault("USER", f"user{os.getuid()}")


find_home()
