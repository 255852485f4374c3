"""The held-out tasks of the suite `smollm-general`: candidates, of which the suite lists those that were accepted.

Each shares a skill with an expert, but no row, no wording and no set of labels. Lists are of other things than those of
the held-in tasks, and written in another way. See `general_tasks`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_fusion.assets.general_forms import DrawnRows, Example, Form, GeneralTask, ReviewRows, Source
from hf_fusion.assets.general_rows import TEXT, BalancedRows, HalvedRows, IntentRows, KindRows, joined, restaurant
from hf_fusion.assets.language_tasks import Split, StoredRows


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _split(
    "Anna Boris Clara Dmitri Elena Farid Greta Hugo Irene Jonas Karim Laura Miguel Nadia Oscar Paula Quentin "
    "Rosa Stefan Tamara Ursula Victor Wanda Xavier Yusuf Zoe Albert Bianca Carlos Denise Emil Fiona Gustav "
    "Helga Ivan Julia"
)
CITIES = _split(
    "Athens Berlin Cairo Dublin Edinburgh Florence Geneva Havana Istanbul Jakarta Kyoto Lisbon Madrid Nairobi "
    "Oslo Paris Quito Rome Seoul Tokyo Utrecht Vienna Warsaw Zagreb Amman Bogota Casablanca Delhi Lima Manila"
)
GOODS = _split(
    "apples bread butter candles carrots cheese coffee cups eggs flour forks grapes honey jam juice lamps "
    "lemons milk mugs nuts olives onions paper pears pens plates rice salt soap socks spoons sugar tea towels "
    "water"
)
NUMBER_WORDS = _split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)


def _task(
    name: str,
    wordings: Sequence[str],
    source: Source,
    metric: Literal["exact", "tokens", "ranked"] = "exact",
    license: str = "apache-2.0",
) -> GeneralTask:
    return GeneralTask(name, (Form(tuple(wordings), source),), metric=metric, license=license, held_in=False)


def _relabelled(folder: str, answers: Mapping[str, str], *, longest: int = TEXT) -> BalancedRows:
    """A classified data set whose labels have new names; several may have the same."""
    choices = tuple(dict.fromkeys(answers.values()))

    def row(item: Mapping[str, Any]) -> Example | None:
        text = item["text"].strip()
        answer = answers.get(item["label"])
        return None if answer is None or len(text) > longest else Example(text, answer, choices)

    return BalancedRows(StoredRows(folder, row))


def _pair(folder: str, answers: Mapping[str, str], layout: str) -> BalancedRows:
    def row(item: Mapping[str, Any]) -> Example | None:
        if len(item["text"]) + len(item["text_pair"]) > 240:
            return None
        return Example(
            layout.format(item["text"], item["text_pair"]),
            answers[item["label"]],
            tuple(dict.fromkeys(answers.values())),
        )

    return BalancedRows(StoredRows(folder, row))


def _drawn(
    things: Sequence[str], least: int, most: int, layout: Callable[[list[str]], str], answer: Callable[[list[str]], str]
) -> DrawnRows:
    def make(rng: random.Random) -> Example:
        values = rng.sample(things, rng.randint(least, most))
        return Example(layout(values), answer(values))

    return DrawnRows(make)


def _listed(values: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"


def _years(rng: random.Random) -> Example:
    years = rng.sample(range(1500, 2020), rng.randint(3, 4))
    return Example(" and ".join(map(str, years)), joined(sorted(years)))


def _word_problem(rng: random.Random) -> Example:
    a, b, who, what = rng.randint(2, 60), rng.randint(2, 40), rng.choice(NAMES), rng.choice(GOODS)
    if rng.random() < 0.5 or b > a:
        return Example(f"{who} has {a} {what} and gets {b} more.", str(a + b))
    return Example(f"{who} has {a} {what} and gives away {b}.", str(a - b))


def _spelled_sum(rng: random.Random) -> Example:
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    if rng.random() < 0.4 and b <= a:
        return Example(f"{NUMBER_WORDS[a]} minus {NUMBER_WORDS[b]}", str(a - b))
    both = rng.choice(("{} plus {}", "{} and {} together", "{} added to {}"))
    return Example(both.format(NUMBER_WORDS[a], NUMBER_WORDS[b]), str(a + b))


def _money(rng: random.Random) -> Example:
    a, b, c = (rng.randint(1, 30) for _ in range(3))
    first, second, third = rng.sample(GOODS, 3)
    return Example(f"{first} ${a}, {second} ${b}, {third} ${c}", str(a + b + c))


def _objects(item: Mapping[str, Any]) -> Example | None:
    return Example(item["prompt"], item["target"]) if len(item["prompt"]) < 200 else None


def _route(rng: random.Random) -> Example:
    stops = rng.sample(CITIES, rng.randint(4, 6))
    place = rng.randrange(len(stops) - 1)
    return Example(f"{' -> '.join(stops)}. Next stop behind {stops[place]}", stops[place + 1])


def _queue(rng: random.Random) -> Example:
    people = rng.sample(NAMES, rng.randint(3, 6))
    return rng.choice(
        [
            Example(f"{' | '.join(people)} - whose turn comes at the very start", people[0]),
            Example(f"{' | '.join(people)} - whose turn comes at the very end", people[-1]),
        ]
    )


def _guests(rng: random.Random) -> Example:
    people = rng.sample(NAMES, rng.randint(4, 7))
    came = people[1:]
    is_there = rng.random() < 0.5
    who = rng.choice(came) if is_there else people[0]
    return Example(
        f"{' and '.join(came)} came to the party. {who} was", "present" if is_there else "absent", ("present", "absent")
    )


def _prices(rng: random.Random) -> Example:
    goods = rng.sample(GOODS, rng.randint(3, 4))
    prices = rng.sample(range(2, 99), len(goods))
    return Example(
        " | ".join(f"{good} ${price}" for good, price in zip(goods, prices, strict=True)),
        goods[prices.index(max(prices))],
    )


def _temperatures(rng: random.Random) -> Example:
    cities = rng.sample(CITIES, rng.randint(3, 5))
    degrees = rng.sample(range(1, 40), len(cities))
    said = " and ".join(f"{degree} degrees in {city}" for city, degree in zip(cities, degrees, strict=True))
    return Example(said, str(max(degrees)))


def _caption(item: Mapping[str, Any]) -> tuple[str, str] | None:
    return item["prompt"], item["target"]


@dataclass(frozen=True)
class GermanFrenchRows:
    """Captions in German and in French, of pictures that no expert's training rows have."""

    def draw(self, split: Split, data_dir: Path | None) -> Iterator[Example | None]:
        """An iterator over the captions."""
        german, french = (
            dict(row for row in StoredRows(f"multi30k_en_{code}", _caption).draw("test", data_dir) if row)
            for code in ("de", "fr")
        )
        both = [english for english in german if english in french]
        for english in both[split == "test" :: 2]:
            text, target = german[english], french[english]
            yield None if len(text) + len(target) > TEXT else Example(text, target)


_SNIPS = {
    "AddToPlaylist": "put a song on a playlist",
    "BookRestaurant": "reserve a table",
    "GetWeather": "hear the forecast",
    "PlayMusic": "listen to music",
    "RateBook": "give points to a book",
    "SearchCreativeWork": "find a work of art",
    "SearchScreeningEvent": "see what the cinema shows",
}


def _as_lines(item: Mapping[str, Any]) -> Example | None:
    text = item["prompt"].replace("], ", "\n").replace("[", " = ").replace("]", "")
    return None if len(item["prompt"]) + len(item["target"]) > 260 else Example(text, item["target"])


def _asks_for(item: Mapping[str, Any]) -> Example | None:
    names = {"human": "who", "location": "where", "numeric": "how many or when", "description": "why or what for"}
    answer = names.get(item["label"])
    return None if answer is None else Example(item["text"].strip(), answer, tuple(names.values()))


HELD_OUT_TASKS = (
    _task(
        "tweet-mood",
        (
            "Somebody tweets: {}\nHow are they doing?",
            "{}\nThe person who tweeted this is",
            "Tweet: {} Guess the state of mind.",
        ),
        _relabelled(
            "tweet_emotion", {"joy": "joyful", "optimism": "joyful", "anger": "miserable", "sadness": "miserable"}
        ),
        "ranked",
        "other",
    ),
    _task(
        "tweet-emotion",
        ("Which feeling does this tweet show? {}", "{}\nThe tweeter feels", "Name the emotion behind: {}"),
        _relabelled("tweet_emotion", {"joy": "joy", "optimism": "hope", "anger": "rage", "sadness": "grief"}),
        "ranked",
        "other",
    ),
    _task(
        "recommendation",
        (
            "From a forum for films: {}\nShould I go?",
            "{}\nAfter this review I would",
            "My friend saw it. {} So what now?",
        ),
        BalancedRows(
            ReviewRows(lambda text, good: Example(text, "watch it" if good else "skip it", ("watch it", "skip it")))
        ),
        "ranked",
        "other",
    ),
    _task(
        "irony",
        ("Is this meant seriously? {}", "{}\nHow is that tweet meant?", "Sarcasm check: {}"),
        _relabelled("tweet_irony", {"irony": "ironic", "non_irony": "serious"}),
        "ranked",
        "other",
    ),
    _task(
        "text-domain",
        ("Where would you find this text? {}", "{}\nThe text comes from", "Guess the origin: {}"),
        KindRows(
            {
                "film reviews": ("sst2", "text"),
                "customer service of a bank": ("banking77", "text"),
                "restaurant guide": ("e2e_nlg", "target"),
                "mathematics homework": ("gsm8k", "prompt"),
                "photo captions": ("multi30k_en_fr", "prompt"),
                "quiz show": ("trec", "text"),
            },
            longest=170,
        ),
        "ranked",
        "other",
    ),
    _task(
        "assistant-command",
        (
            "The user tells a voice assistant: {}\nThe user would like to",
            "{}\nWhat shall the device do?",
            "Interpret this command: {}",
        ),
        IntentRows("snips", others=6, names=_SNIPS),
        "ranked",
        "cc0-1.0",
    ),
    _task(
        "unwanted-messages",
        ("My phone got this: {}\nWho sent it?", "{}\nThat message is from", "Trust this SMS? {}"),
        _relabelled("sms_spam", {"ham": "a friend", "spam": "an advertiser"}),
        "ranked",
        "cc-by-4.0",
    ),
    _task(
        "report-or-review",
        ("Reading this, are you informed or advised? {}", "{}\nThis was written by", "Which desk wrote it? {}"),
        KindRows({"a reporter": ("ag_news", "text"), "a critic": ("sst2", "text")}, others=1, longest=190),
        "ranked",
        "other",
    ),
    _task(
        "caption-or-tweet",
        (
            "{}\nIs that seen or felt?",
            "Is this an observation or an emotion? {}",
            "Words about the world or about oneself? {}",
        ),
        KindRows({"observation": ("multi30k_en_de", "prompt"), "emotion": ("tweet_emotion", "text")}, others=1),
        "ranked",
        "other",
    ),
    _task(
        "question-word",
        ("Which short question is behind this? {}", "{}\nIn brief, the asker wonders", "Reduce to a question word: {}"),
        BalancedRows(HalvedRows(StoredRows("trec", _asks_for))),
        "ranked",
        "other",
    ),
    _task(
        "entailment",
        ("{}\nDoes the claim follow?", "Check the claim.\n{}", "{}\nThe claim is"),
        _pair("rte", {"entailment": "supported", "not_entailment": "unsupported"}, "Text: {}\nClaim: {}"),
        "ranked",
        "other",
    ),
    _task(
        "restaurant-area",
        ("In which part of town is it? {}", "{}\nWhere must I go?", "Just the district: {}"),
        HalvedRows(restaurant("area")),
        "exact",
        "cc-by-sa-4.0",
    ),
    _task(
        "restaurant-neighbour",
        ("What is it close to? {}", "{}\nWhich other place is nearby?", "Next door to which place? {}"),
        HalvedRows(restaurant("near")),
        "exact",
        "cc-by-sa-4.0",
    ),
    _task(
        "restaurant-lines",
        ("Record:\n{}\nSummarise the record.", "{}\nTell a tourist.", "Fields\n{}\nin one line of prose:"),
        HalvedRows(StoredRows("e2e_nlg", _as_lines)),
        "tokens",
        "cc-by-sa-4.0",
    ),
    _task(
        "name-sorting",
        (
            "Class register for these pupils: {}",
            "{}\nBring the people into the order of a phone book.",
            "Roll call by letter: {}",
        ),
        _drawn(NAMES, 3, 5, " and ".join, lambda values: joined(sorted(values))),
    ),
    _task(
        "city-index",
        ("Index of an atlas with {}", "{}\nThe index has them as", "Towns for the index: {}"),
        _drawn(CITIES, 3, 5, _listed, lambda values: joined(sorted(values))),
    ),
    _task(
        "year-sorting",
        ("Timeline of {}", "{}\nEarliest year to latest year:", "Chronology: {}"),
        DrawnRows(_years),
    ),
    _task(
        "route-back",
        ("We travelled {} and return the same way:", "Way home after {}:", "Outbound {}\nInbound:"),
        _drawn(CITIES, 3, 5, " -> ".join, lambda values: joined(values[::-1])),
    ),
    _task(
        "queue-backwards",
        ("In the queue: {}. Now the queue turns round:", "{}\nSeen from behind:", "Name the people from the back, {}"),
        _drawn(NAMES, 3, 5, _listed, lambda values: joined(values[::-1])),
    ),
    _task(
        "word-problem",
        ("{} How many are left or there now?", "{} The stock is now", "{} That makes a total of"),
        DrawnRows(_word_problem),
    ),
    _task(
        "spelled-sum",
        ("In digits, {}", "{} gives which figure?", "Add up in your head: {}"),
        DrawnRows(_spelled_sum),
    ),
    _task(
        "receipt",
        ("Receipt: {}. Total in dollars:", "{}\nAltogether I pay $", "The bill says {} which adds up to"),
        DrawnRows(_money),
    ),
    _task(
        "object-counting",
        ("{}", "{} Only a figure.", "{} Write a number."),
        StoredRows("bbh/object_counting", _objects),
        license="mit",
    ),
    _task(
        "shopping-list",
        (
            "To buy:\n{}\nThe basket will have this many things:",
            "{}\nHow long is my list?",
            "Things to carry home:\n{}\nIn total",
        ),
        _drawn(
            GOODS, 2, 8, lambda values: "\n".join(f"[ ] {value}" for value in values), lambda values: str(len(values))
        ),
    ),
    _task(
        "acronym",
        ("Short form of the society {}", "{}\nIts badge has the letters", "Monogram of {}"),
        _drawn([*CITIES, *NAMES], 3, 4, " ".join, lambda values: " ".join(value[0] for value in values)),
    ),
    _task(
        "next-stop",
        ("The train calls at {}:", "Timetable: {} is", "Line map {}?"),
        DrawnRows(_route),
    ),
    _task(
        "queue-ends",
        ("At the doctor's: {}?", "People waiting, {}?", "Waiting line: {}?"),
        DrawnRows(_queue),
    ),
    _task(
        "guests",
        ("{}", "Party report. {}", "Diary: {}"),
        DrawnRows(_guests),
        "ranked",
    ),
    _task(
        "dearest",
        ("Price tags: {}. The dearest is", "{}\nFor which do I pay the most?", "Most costly of {}"),
        DrawnRows(_prices),
    ),
    _task(
        "temperatures",
        ("Weather: {}. The hottest place has", "{}\nTop reading today:", "Thermometers show {}. The record is"),
        DrawnRows(_temperatures),
    ),
    _task(
        "german-to-french",
        ("Was heißt auf Französisch: {}", "{}\nPour les Français :", "Für Paris: {}"),
        GermanFrenchRows(),
        "tokens",
        "other",
    ),
)
"""Candidates; those that no expert helps on are listed with the others in the results of the acceptance."""
