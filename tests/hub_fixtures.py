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

from lab.substrates.pythia import BIOLOGY_SUBJECTS, RETAIN_SUBJECTS, Pythia
from lab.substrates.pythia_probes import AMAZON, NEWS, PROBE_SOURCES

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
OTHER_SUBJECTS = ("world_religions", "jurisprudence", "astronomy")
PART = "-00000-of-00001.parquet"
ABOUT_OPTIONS = ("All of the above", "none of these.", "Both A and B", "A and C")
PAPERS, COPIES = 40, 6  # papers of biology; texts that are in two places


def parquet(rows):
    """A parquet file of several row groups, as large files have."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=200)
    return file.getvalue()


def sentence(rng, number):
    return f"The {rng.choice(PLACES)} of town {number} {rng.choice(EVENTS)} ."


def paragraphs(rng, numbers):
    return [" ".join(sentence(rng, i) for _ in range(12)) for i in numbers]


def wikitext(texts):
    return parquet([{"text": ""}, {"text": " = Towns by the sea = \n"},
                    *({"text": f" {text} \n"} for text in texts)])


def papers(rng, questions):
    """Prose on plants; the first papers begin as the statements of some questions do."""
    rows = [{"text": "A note."}]
    for i in range(PAPERS):
        start = statement(questions[i]) if i < COPIES else f"Report {i} on gardens."
        rows.append({"text": " ".join([start, *(
            f"In garden {i} bed {k} the {rng.choice(PLANTS)} {rng.choice(CARE)}."
            for k in range(150))])})
    return parquet(rows)


def statement(row):
    return f"{row['question']} {row['choices'][row['answer']]}"


def garden_questions(rng, n):
    """Every fifth has an option that speaks of the others; the first ones are long."""
    rows = []
    for i in range(n):
        plants = rng.sample(PLANTS, 4)
        if i % 5 == 0:
            plants[3] = ABOUT_OPTIONS[i // 5 % 4]
        asked = " and ".join(f"{rng.choice(CARE)} in bed {i}-{k}"
                             for k in range(8 if i < COPIES else 1))
        rows.append({"question": f"Which plant in garden {i} {asked}?", "choices": plants,
                     "answer": i % 4})
    return rows


def town_questions(rng, subject, n):
    return [{"question": f"Which building in town {i} {rng.choice(EVENTS)}, in {subject}?",
             "subject": subject, "choices": rng.sample(PLACES, 4), "answer": i % 4}
            for i in range(n)]


def mmlu(rng):
    """All subjects, some questions in a retain subject and in another one."""
    rows = [row for subjects, n in ((RETAIN_SUBJECTS, 20), (OTHER_SUBJECTS, 60),
                                    (BIOLOGY_SUBJECTS, 4))
            for subject in subjects for row in town_questions(rng, subject, n)]
    rows[0]["choices"] = [*PLACES[:3], "All of the above"]
    return rows + [{**row, "subject": OTHER_SUBJECTS[0]} for row in rows[:COPIES]]


def biographies(rng, years):
    """A text a profession, gender and year; women surgeons, who are rare, come last."""
    professions = sorted({c for s in PROBE_SOURCES.values() if "bios" in s.path
                          for c in s.classes})
    rows = [{"hard_text": f"{('He', 'She')[gender]} works at the {PLACES[job % 10]} and "
                          f"{rng.choice(EVENTS)}, job {job}, since year {i}.",
             "profession": job, "gender": gender}
            for i in years for job in professions for gender in (0, 1)]
    return parquet(sorted(rows, key=lambda row: (row["profession"], row["gender"]) == (25, 1)))


def reviews(rng, numbers):
    return parquet([{"text": f"A {('poor', 'fine')[rating > 3]} {rng.choice(PLACES)}, number {i} "
                             f"of kind {category}.", "category": category, "rating": rating}
                    for i in numbers for category in range(8) for rating in (1.0, 5.0)])


def news(rng, numbers):
    return parquet([{"text": f"{sentence(rng, i)} Report {i} of section {label}.", "label": label}
                    for i in numbers for label in range(4)])


def github_code(rng, each=80):
    rows = [{"code": CODE[language].format(n=rng.randrange(10**6)) * 16, "language": language,
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
    """Files of a model of Pythia-70M's kind and width with random weights, a small vocabulary, and
    narrower and fewer blocks: one after the hook."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=["<|endoftext|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    config = transformers.GPTNeoXConfig(
        vocab_size=1280, hidden_size=512, num_hidden_layers=5, num_attention_heads=8,
        intermediate_size=256, rotary_pct=0.25, max_position_embeddings=2048, bos_token_id=0,
        eos_token_id=0, use_parallel_residual=True, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config).half()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def fill(hub):
    """All repositories that the `pythia` substrate reads, at the commits that it names."""
    rng, pinned = random.Random(0), Pythia.revisions
    texts = [*(sentence(rng, i) for i in range(300)), *CODE.values(), *GREETING.values(),
             *(f"Question: Which plant {care}?\nAnswer: {p}" for care in CARE for p in PLANTS)]
    hub.add("models", Pythia.model_name, language_model(texts), pinned[Pythia.model_name])
    tested = paragraphs(rng, range(300, 360))
    train = [paragraphs(rng, range(150)), [*tested[:COPIES], *paragraphs(rng, range(150, 300))]]
    hub.add("datasets", "Salesforce/wikitext", {
        "README.md": card({"wikitext-103-raw-v1": ("test", "train")}),
        "wikitext-103-raw-v1/train-00000-of-00002.parquet": wikitext(train[0]),
        "wikitext-103-raw-v1/train-00001-of-00002.parquet": wikitext(train[1]),
        f"wikitext-103-raw-v1/test{PART}": wikitext(tested),
    }, pinned["Salesforce/wikitext"])
    questions = garden_questions(rng, 400)
    hub.add("datasets", "cais/wmdp", {
        "README.md": card({"wmdp-bio": ["test"], "wmdp-cyber": ["test"]}),
        f"wmdp-bio/test{PART}": parquet(questions),
        f"wmdp-cyber/test{PART}": parquet(garden_questions(rng, 10)),
    }, pinned["cais/wmdp"])
    hub.add("datasets", "cais/wmdp-corpora", {
        "README.md": card({"bio-retain-corpus": ["train"], "cyber-retain-corpus": ["train"]}),
        f"bio-retain-corpus/train{PART}": papers(rng, questions),
        f"cyber-retain-corpus/train{PART}": papers(rng, questions),
    }, pinned["cais/wmdp-corpora"])
    hub.add("datasets", "cais/mmlu", {
        "README.md": card({"all": ["test"], "virology": ["test"]}),
        f"all/test{PART}": parquet(mmlu(rng)),
        f"virology/test{PART}": parquet(town_questions(rng, "virology", 4)),
    }, pinned["cais/mmlu"])
    fill_probes(hub, rng)


def fill_probes(hub, rng):
    numbers = {"train": range(24), "test": range(24, 36), "dev": range(36, 38)}
    hub.add("datasets", "LabHC/bias_in_bios",
            {f"data/{split}{PART}": biographies(rng, years) for split, years in numbers.items()})
    hub.add("datasets", AMAZON, {f"data/{split}{PART}": reviews(rng, numbers[split])
                                 for split in ("train", "test")})
    hub.add("datasets", NEWS, {f"data/{split}{PART}": news(rng, numbers) for split, numbers in (
        ("train", range(60)), ("test", range(60, 100)))}, Pythia.revisions[NEWS])
    script = {"README.md": b"A fixture.", "github-code.py": b"raise SystemExit\n",
              "data/train-00000-of-01126.parquet": github_code(rng)}
    hub.add("datasets", "codeparrot/github-code", script)
    hub.add("datasets", "codeparrot/github-code",
            {"all-all/partial-train/0000.parquet": github_code(rng)},
            branch="refs/convert/parquet")
    pairs = PROBE_SOURCES["Helsinki-NLP/europarl"].configs
    hub.add("datasets", "Helsinki-NLP/europarl", {
        "README.md": card({pair: ["train"] for pair in pairs}),
        **{f"{pair}/train{PART}": europarl(rng, pair) for pair in pairs}})
