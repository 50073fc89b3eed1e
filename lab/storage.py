"""Whole-or-nothing files, checked tensors, the cache, digests, seeded randomness."""

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lab.code import CODE, code_behind
from lab.console import UserError, report

PATIENCE = 10.0  # seconds for which a lock is waited for in silence


def write_atomically(path: Path, data: bytes) -> None:
    """Fill a temporary file, make it durable, then give it its name.

    A file that is there keeps its mode, owner and group, a link its target; a new file gets the
    mode that the umask gives. Raises PermissionError where a person made the file read-only. Takes
    bytes, since libraries that write files themselves report a full disk each in its own way.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_parts(path)
    before = path.stat() if path.exists() else None
    if before and not (before.st_mode & stat.S_IWUSR and os.access(path, os.W_OK)):
        raise PermissionError(errno.EACCES, "is read-only", str(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        mode = 0o600 if before else 0o666  # nobody may look in while it is written
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            if before:
                take_over(handle, before)
            os.fsync(handle)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = path  # of a full disk the system names none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def take_over(handle: int, before: os.stat_result) -> None:
    """Owner and group, as far as this user may give them away, then the mode."""
    for owner, group in ((-1, before.st_gid), (before.st_uid, -1)):
        with contextlib.suppress(OSError):
            os.fchown(handle, owner, group)
    os.fchmod(handle, stat.S_IMODE(before.st_mode))


def remove_stale_parts(path: Path) -> None:
    """What processes that were killed while they wrote `path` have left beside it."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError):
            if part.stat().st_mtime < time.time() - 3600:
                part.unlink()


def write_text(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities become null, which every reader understands."""

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(key): clean(part) for key, part in item.items()}
        if isinstance(item, list | tuple):
            return [clean(part) for part in item]
        if isinstance(item, np.generic):
            item = item.item()
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(clean(value), indent=indent, ensure_ascii=False, allow_nan=False)


def digest(*parts: Any) -> str:
    """A short name for what determines a cached thing."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def checksum(tensors: dict[str, Tensor], label: str) -> str:
    state = hashlib.sha256(label.encode())
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous()
        state.update(f"{name}{flat.dtype}{tuple(flat.shape)}".encode())
        if flat.numel():  # the strides of nothing may be anything
            state.update(memoryview(flat.view(-1).view(torch.uint8).numpy()))
    return state.hexdigest()


def non_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity; both end up in the extremes."""
    return [name for name, part in tensors.items()
            if part.numel() and not all(math.isfinite(end) for end in part.aminmax())]


def write_tensors(path: Path, tensors: dict[str, Tensor], note: Any = None) -> None:
    """A safetensors file of tensors and a JSON note, with a checksum over them and its name.

    The note is a tensor too, because a header may have no more than 100 MB and a corpus may.
    """
    tensors = {name: part.detach().cpu().contiguous() for name, part in tensors.items()}
    tensors["note"] = torch.frombuffer(bytearray(to_json(note).encode()), dtype=torch.uint8)
    sha256 = checksum(tensors, path.name)
    write_atomically(path, safetensors.torch.save(tensors, {"sha256": sha256}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any] | None:
    """What `write_tensors` wrote; None, after one line that says so, if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if checksum(tensors, path.name) == metadata["sha256"]:
            return tensors, json.loads(bytes(tensors.pop("note").numpy()))
    except FileNotFoundError:
        return None
    except OSError as error:
        error.filename = path  # the library names none
        raise
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        report(f"{path} is damaged ({type(error).__name__}); it is made anew")
        return None
    report(f"{path} does not match its checksum; it is made anew")
    return None


class Cache:
    """Everything that outlives a run folder: each thing under a name and a key of its causes.

    Several processes may use it at once: what is missing is built under a lock, by one of them.
    Locks are the operating system's and end with their process. Raises UserError where the folder
    cannot be written or locked.
    """

    def __init__(self, root: Path):
        cure = "set SAE_CACHE_DIR to a folder that can"
        try:
            self.root = root.expanduser()
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user who is not there
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"the cache {root} cannot be written ({reason}); {cure}") from error
        try:
            with self.lock(f"trial-{uuid.uuid4().hex}", timeout=PATIENCE) as trial:
                Path(trial.lock_file).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"the cache {root} cannot be locked ({error.strerror or error}): its "
                            f"file system may have no file locks; {cure}") from error

    def lock(self, name: str, timeout: float = -1) -> FileLock:
        path = self.root / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path, timeout=timeout, fallback_to_soft=False)

    @contextlib.contextmanager
    def turn(self, lock_name: str, name: str) -> Iterator[None]:
        """Alone in making a thing; a longer wait for another process is told."""
        lock = self.lock(lock_name)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            report(f"{name} is being made by another process; this one waits for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def path(self, name: str, *causes: Any) -> Path:
        return self.root / f"{name}-{digest(*causes)}.safetensors"

    def get(
        self, name: str, causes: tuple, build: Callable[[], tuple[dict[str, Tensor], Any]]
    ) -> tuple[dict[str, Tensor], Any]:
        """Tensors and note of `name`, read if they are there and sound, else built and kept.

        Raises UserError where what was built is not finite: that is never kept.
        """
        path = self.path(name, *causes)
        if (kept := read_tensors(path)) is not None:
            return kept
        with self.turn(path.stem, name):
            if (kept := read_tensors(path)) is not None:
                return kept
            tensors, note = build()
            if odd := non_finite(tensors):
                raise UserError(f"{', '.join(odd)} of {name}: not finite numbers")
            write_tensors(path, tensors, note)
            return tensors, json.loads(to_json(note))


def randomness(*causes: Any) -> torch.Generator:
    """A generator that depends on `causes` alone, so that no random state has to be saved."""
    return torch.Generator().manual_seed(int(digest(*causes), 16) % 2**63)


def code_digest(*roots: Any, values: tuple[Any, ...] = ()) -> str:
    """Of the code of `roots` and all that lies behind it, see `code_behind`."""
    return digest(sorted(code_behind(*roots, values=values).items()))


def laboratory_digest() -> str:
    """Of all code in lab/: two results that differ in it were not measured alike."""
    return digest([(where, name, definition.code) for where, module in sorted(CODE.items())
                   if where.startswith("lab") for name, definition in module.definitions.items()
                   if "." not in name])


# Files and folders that libraries write


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SEAL = "sha256.json"  # in a folder: the checksums of all its other files, and what made them


def checksums(folder: Path, made_by: str) -> dict[str, str]:
    return {"made by": made_by, **{path.name: sha256_of(path) for path in sorted(folder.iterdir())
                                   if path.name != SEAL}}


def seal(folder: Path, made_by: str) -> None:
    """Finish a folder: it holds what the code whose digest is `made_by` wrote."""
    write_text(folder / SEAL, to_json(checksums(folder, made_by)))


def is_sealed(folder: Path, made_by: str) -> bool:
    """Whether the folder holds what was written there by this code, and nothing else; if not, it
    is said."""
    if not folder.exists():
        return False
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if json.loads((folder / SEAL).read_bytes()) == checksums(folder, made_by):
            return True
    report(f"{folder} does not match its checksums; it is made anew")
    return False


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder for a while, under a lock; what a killed process left there goes first."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
