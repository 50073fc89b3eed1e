"""From text to a trained SAE: tokens a second, ours against SAELens and dictionary_learning.

    bash bench/peers.sh
    python bench/pipeline.py rounds.jsonl [variant ...]     # one more round, then the table

A round measures every variant (or those named) once; the table is over all rounds in the file.

Pythia-70M's architecture with random weights, hook at layer 3, D = 512, F = 4096, batches of 2048
tokens, contexts of 128: every program gets the same news articles, tokenizer, weights and number of
tokens, in turn, alone, each in a process of its own. The clock starts with text and language model
in memory and stops with the SAE: tokenizing, language model, buffer, training. Ours also writes its
activations to the cache and a checkpoint within that time, as a run does. *Streamed* holds a third
of the activations in memory and reads the rest back while it trains. The regrouping, every 250
steps, is timed by itself.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from exchange import answer, ask, ask_peer

from experiment import ActivationBuffer, CustomSAEConfig, CustomTrainer, train_sae
from lab.distributed import Interrupts, Processes, keep_freed_memory
from lab.language_model import faster_dtype
from lab.storage import Cache
from lab.substrates import Substrate, quiet_libraries, standin_texts
from lab.substrates.standin import Standin
from lab.substrates.texts import Sizes, pack_contexts, shuffled

D_IN, D_SAE, LAYER, BATCH, CONTEXT, ROWS = 512, 4096, 3, 2048, 128, 32
TOKENS = 300 * BATCH
SPECIAL = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>",
           "pad_token": "<|endoftext|>", "model_input_names": ["input_ids", "attention_mask"]}
VARIANTS = {  # name: (who, options)
    "ours, off": ("ours", {"mode": "off"}),
    "ours, adaptive": ("ours", {"mode": "adaptive"}),
    "ours, adaptive, streamed": ("ours", {"mode": "adaptive", "gigabytes": 0.2}),
    "SAELens, float32": ("sae_lens", {"bfloat16": False}),
    "SAELens, bfloat16 autocast": ("sae_lens", {"bfloat16": True}),
    "dictionary_learning": ("dictionary_learning", {}),
}
OURS = ("ours, off", "ours, adaptive", "ours, adaptive, streamed")
LEFT_OUT = """Not measured: real Pythia weights, text of WikiText, GPUs, torch.compile, SAELens on
HookedTransformer (it gets the plain Hugging Face model here), quality of the SAEs (see the study),
start-up and loading. The peers' buffers hold 64 contexts, so that few activations are computed and
left unused; they are shuffled less for it. dictionary_learning has no bfloat16 on a CPU: its
autocast is for GPUs only."""


class LocalPythia:
    """A substrate's source: the benchmark's model and text, one half to each domain."""

    name, layer, d_in, fingerprint, unnamed = "bench", LAYER, D_IN, "random weights", ()

    def __init__(self, folder: Path, texts: list[str]):
        self.folder, self.texts = folder, texts

    def load_model(self, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype)
        return model, load_tokenizer(self.folder)

    def corpus(self, _sizes: Sizes) -> dict[str, Any]:
        return {"learn": {"forget": self.texts[::2], "retain": self.texts[1::2]}}


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"),
                                                **SPECIAL)


def news() -> list[str]:
    """The stand-in's news articles, about twice the tokens that are trained on."""
    cache = Cache(Path(os.environ.get("SAE_CACHE_DIR") or ".cache"))
    texts = shuffled([text for _, text in standin_texts.news(Standin(cache).read)], "bench")
    total, wanted = 0, 10 * TOKENS  # characters
    for n, text in enumerate(texts):
        total += len(text)
        if total > wanted:
            return texts[:n]
    return texts


def make_inputs(folder: Path) -> None:
    """What every variant reads: text, the same cut into contexts (dictionary_learning cuts off
    what is longer than one), a byte-level BPE tokenizer of it, and Pythia-70M's shape with random
    weights."""
    texts = news()
    torch.manual_seed(0)
    shape = dict(vocab_size=50304, hidden_size=D_IN, num_hidden_layers=6, num_attention_heads=8,
                 intermediate_size=4 * D_IN)
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape)).save_pretrained(folder)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=8000, special_tokens=[SPECIAL["eos_token"]],
                                  show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    reader = load_tokenizer(folder)
    documents = reader(texts, add_special_tokens=False)["input_ids"]
    pieces = reader.batch_decode(pack_contexts(documents, reader.eos_token_id, CONTEXT))
    (folder / "texts.json").write_text(json.dumps({"texts": texts, "pieces": pieces}))


def ours(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `experiment.py`: in all, for the activations, and of a second run that finds
    them in the cache; and of one regrouping, which a run does every `regroup_every` steps."""
    torch.set_num_threads(request["threads"])
    quiet_libraries()
    keep_freed_memory()
    config = CustomSAEConfig(orthogonality=request["mode"], steps=TOKENS // BATCH,
                             warmup_steps=10, batch_size=BATCH, expansion=D_SAE // D_IN)
    cache, folder = Cache(Path(request["scratch"])), Path(request["folder"])
    source = LocalPythia(folder, json.loads((folder / "texts.json").read_text())["texts"])
    sizes = Sizes(learn_tokens=TOKENS, context_length=CONTEXT)

    def run(name: str) -> tuple[float, float, CustomTrainer]:
        substrate = Substrate(source, sizes, cache, Processes())
        if name == "first":
            assert substrate.lm is not None  # loaded before the clock starts
        start = time.perf_counter()
        buffer = ActivationBuffer.read(substrate, gigabytes=request["gigabytes"])
        read = time.perf_counter() - start
        trainer = train_sae(config, buffer, 0, cache.root / name, Interrupts(), None,
                            substrate.processes)
        return time.perf_counter() - start, read, trainer

    seconds, activations, trainer = run("first")
    again = run("again")[0]
    start = time.perf_counter()
    trainer.regroup_()
    return {"seconds": seconds, "tokens": TOKENS, "activations": activations, "again": again,
            "regroup": time.perf_counter() - start, "l0": float(trainer.state["l0"]),
            "finite": bool(torch.isfinite(trainer.sae.W_dec).all())}


def measure_round(variants: list[str], threads: int = 2) -> dict[str, dict[str, Any]]:
    """Each variant once, one after the other."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        request = {
            "task": "pipeline", "folder": name, "threads": threads, "special": SPECIAL,
            "layer": LAYER, "d_in": D_IN, "d_sae": D_SAE, "batch_size": BATCH, "rows": ROWS,
            "context_length": CONTEXT, "tokens": TOKENS, "buffer_contexts": 64,
            "gigabytes": CustomSAEConfig.buffer_gigabytes}
        for variant in variants:
            who, options = VARIANTS[variant]
            asked = {**request, **options, "scratch": f"{name}/{variant}"}
            if who == "ours":
                results[variant] = ask("pipeline.py", Path(sys.executable), asked)
            else:
                results[variant] = ask_peer(who, asked)
            print(f"{variant}: {results[variant]}", file=sys.stderr, flush=True)
    return results


def middle_and_range(values: list[float], form: str) -> str:
    low, middle, high = (format(f(values), form) for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def ratio(rounds: list[dict[str, dict[str, Any]]], mine: str, other: str) -> str:
    """Tokens a second of `mine` over those of `other`, both from the same round."""
    pairs = [(results[mine], results[other]) for results in rounds if {mine, other} <= set(results)]
    values = [b["seconds"] / b["tokens"] * a["tokens"] / a["seconds"] for a, b in pairs]
    return middle_and_range(values, ".2f") if values else "-"


def table(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """Median tokens a second with their range over rounds, and ours as multiples of each."""
    found = {variant: [results[variant] for results in rounds if variant in results]
             for variant in VARIANTS}
    rates = {variant: [result["tokens"] / result["seconds"] for result in results]
             for variant, results in found.items() if results}
    lines = [f"{TOKENS} tokens, torch {torch.__version__} on 2 threads, our language model in "
             f"{faster_dtype(torch.device('cpu'))}; ratios: median over rounds with both",
             f"{'':28}{'tokens/s, median (range)':>26}{'rounds':>8}{'off / it (range)':>22}"
             f"{'adaptive / it (range)':>24}"]
    for variant, values in rates.items():
        lines.append(f"{variant:28}{middle_and_range(values, ',.0f'):>26}{len(values):>8}"
                     f"{ratio(rounds, OURS[0], variant):>22}{ratio(rounds, OURS[1], variant):>24}")
    lines += [parts(mine, found[mine]) for mine in OURS if found[mine]]
    return "\n".join([*lines, LEFT_OUT])


def parts(name: str, results: list[dict[str, Any]]) -> str:
    """One line on what our time went to (medians, in seconds), and on a second run."""
    median = {key: statistics.median(result[key] for result in results)
              for key in ("seconds", "activations", "again", "regroup", "l0")}
    share = median["regroup"] / (median["seconds"] - median["activations"]) * (TOKENS / BATCH) / 250
    return (f"{name}: {median['activations']:.1f} s of {median['seconds']:.1f} s for activations; "
            f"a second run, activations cached, {median['again']:.1f} s, that is "
            f"{median['seconds'] / median['again']:.1f} times as fast; one regrouping "
            f"{median['regroup']:.2f} s, every 250 steps {share:.1%} of training; L0 at the end "
            f"{median['l0']:.0f}")


def main() -> int:
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(VARIANTS):
        sys.exit(f"usage: python bench/pipeline.py rounds.jsonl [{' | '.join(VARIANTS)} ...]")
    path = Path(sys.argv[1])
    results = measure_round(sys.argv[2:] or list(VARIANTS))
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(results) + "\n")
    print(table([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]))
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        answer({"pipeline": ours})
    else:
        sys.exit(main())
