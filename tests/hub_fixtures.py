"""What the loopback Hub serves: repositories of the right names, files and columns, with harmless
text about gardens and towns made from templates, and a language model that was never trained."""

import io
import random
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lab.substrates.pythia import PROBE_SOURCES, Pythia

PLANTS = ("tomato", "lavender", "fern", "apple tree", "rose", "mint", "tulip", "ivy", "bean",
          "cactus", "pumpkin", "moss")
CARE = ("likes sandy soil", "climbs on a fence", "blooms in early spring", "needs little water",
        "grows best in the shade", "is cut back in autumn", "keeps its leaves in winter",
        "ripens late in summer")
PLACES = ("harbour", "market", "old bridge", "railway station", "museum", "school", "lighthouse",
          "town hall", "mill", "theatre")
EVENTS = ("was built of grey stone", "burned down and was rebuilt", "draws many visitors",
          "closes on Sundays", "stands beside the river", "was named after a mayor",
          "holds a fair each June", "has a clock that runs late")
CODE = {"C": "int add(int a, int b) {{ return a + b + {n}; }}\n",
        "Python": "def add(a, b):\n    return a + b + {n}\n",
        "HTML": "<p class='total'>the sum is <b>{n}</b></p>\n",
        "Java": "public static int add(int a, int b) {{ return a + b + {n}; }}\n",
        "PHP": "<?php function add($a, $b) {{ return $a + $b + {n}; }} ?>\n"}
GREETING = {"en": "the house by the river", "fr": "la maison au bord de la rivière",
            "de": "das Haus am Ufer des Flusses", "es": "la casa junto al río",
            "it": "la casa vicino al fiume", "nl": "het huis aan de rivier",
            "pt": "a casa perto do rio"}
BROKEN, ABSENT = "fancyzhx/ag_news", "canrager/amazon_reviews_mcauley_1and5"


def parquet(rows):
    """A parquet file of several row groups, as large files have."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=200)
    return file.getvalue()


def sentence(rng, number):
    return f"The {rng.choice(PLACES)} of town {number} {rng.choice(EVENTS)} ."


def wikitext(rng, paragraphs):
    rows = [{"text": ""}, {"text": " = Towns by the sea = \n"}]
    for i in range(paragraphs):
        rows.append({"text": " " + " ".join(sentence(rng, i) for _ in range(12)) + " \n"})
    return parquet(rows)


def garden_questions(rng, n):
    rows = []
    for i in range(n):
        answer, plants = i % 4, rng.sample(PLANTS, 4)
        rows.append({"question": f"Which plant in garden {i} {rng.choice(CARE)}?",
                     "choices": plants, "answer": answer})
    return parquet(rows)


def town_questions(rng, subject, n):
    return parquet([
        {"question": f"Which building in town {i} {rng.choice(EVENTS)}?", "subject": subject,
         "choices": rng.sample(PLACES, 4), "answer": i % 4} for i in range(n)])


def biographies(rng, each=24):
    professions = sorted({c for s in PROBE_SOURCES.values() if "bios" in s.path
                          for c in s.classes})
    return parquet([
        {"hard_text": f"She works at the {PLACES[job % 10]} and {rng.choice(EVENTS)}, job {job}, "
                      f"since year {i}.", "profession": job, "gender": i % 2}
        for i in range(2 * each) for job in professions])


def news(rng, each=60):
    return parquet([{"text": f"{sentence(rng, i)} Report {i} of section {label}.", "label": label}
                    for i in range(each) for label in range(4)])


def github_code(rng, each=60):
    rows = [{"code": CODE[language].format(n=rng.randrange(9999)) * 16, "language": language,
             "repo_name": "a/b", "path": f"src/{i}", "license": "mit", "size": 600}
            for i in range(each) for language in CODE]
    return parquet(rows)


def europarl(rng, pair, rows=80):
    return parquet([{"translation": {code: f"{GREETING[code]}, {rng.randrange(9999)}, {i}"
                                     for code in pair.split("-")}} for i in range(rows)])


def card(configs):
    """A data set card: which files belong to which configuration and split."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    return "\n".join([*lines, "---", "A fixture."]).encode()


def language_model(texts):
    """Files of a model of Pythia-70M's architecture with random weights and a small vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=["<|endoftext|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    config = transformers.GPTNeoXConfig(
        vocab_size=1280, hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
        intermediate_size=2048, rotary_pct=0.25, max_position_embeddings=2048, bos_token_id=0,
        eos_token_id=0, use_parallel_residual=True, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config).half()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def fill(hub):
    """All repositories that the `pythia` substrate reads, at the commits that it names, but for
    one probing set that is absent and one whose file is broken."""
    rng, pinned = random.Random(0), Pythia.revisions
    part = "-00000-of-00001.parquet"
    texts = [*(sentence(rng, i) for i in range(300)), *CODE.values(), *GREETING.values(),
             *(f"Question: Which plant {care}?\nAnswer: {p}" for care in CARE for p in PLANTS)]
    name = Pythia.model_name
    hub.add("models", name, language_model(texts), pinned[name])
    hub.add("datasets", "Salesforce/wikitext", {
        "README.md": card({"wikitext-103-raw-v1": ("test", "train")}),
        "wikitext-103-raw-v1/train-00000-of-00002.parquet": wikitext(rng, 150),
        "wikitext-103-raw-v1/train-00001-of-00002.parquet": wikitext(rng, 150),
        f"wikitext-103-raw-v1/test{part}": wikitext(rng, 60),
    }, pinned["Salesforce/wikitext"])
    hub.add("datasets", "cais/wmdp", {
        "README.md": card({"wmdp-bio": ["test"], "wmdp-cyber": ["test"]}),
        f"wmdp-bio/test{part}": garden_questions(rng, 400),
        f"wmdp-cyber/test{part}": garden_questions(rng, 10)})
    subjects = {name: ["test"] for name in Pythia.retain_subjects}
    hub.add("datasets", "cais/mmlu", {
        "README.md": card(subjects),
        **{f"{name}/test{part}": town_questions(rng, name, 20) for name in subjects},
    }, pinned["cais/mmlu"])
    fill_probes(hub, rng, part)


def fill_probes(hub, rng, part):
    hub.add("datasets", "LabHC/bias_in_bios", {f"data/train{part}": biographies(rng)})
    hub.add("datasets", BROKEN, {f"data/train{part}": news(rng)[:3000]})
    script = {"README.md": b"A fixture.", "github-code.py": b"raise SystemExit\n",
              "data/train-00000-of-01126.parquet": github_code(rng)}
    hub.add("datasets", "codeparrot/github-code", script)
    hub.add("datasets", "codeparrot/github-code",
            {"all-all/partial-train/0000.parquet": github_code(rng)},
            branch="refs/convert/parquet")
    pairs = PROBE_SOURCES["Helsinki-NLP/europarl"].configs
    hub.add("datasets", "Helsinki-NLP/europarl", {
        "README.md": card({pair: ["train"] for pair in pairs}),
        **{f"{pair}/train{part}": europarl(rng, pair) for pair in pairs}})
