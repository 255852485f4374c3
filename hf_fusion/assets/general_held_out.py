"""The held-out tasks of the suite `smollm-general`: candidates, of which the suite lists those that were accepted.

Each shares a skill with an expert, but no row, no wording and no set of labels; lists are of other things than those of
the held-in tasks. See `general_tasks`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from hf_fusion.assets.general_forms import DrawnRows, Example, Form, GeneralTask, ReviewRows, Source
from hf_fusion.assets.general_rows import (
    CITIES,
    GOODS,
    NAMES,
    NUMBER_WORDS,
    TEXT,
    BalancedRows,
    HalvedRows,
    IntentRows,
    KindRows,
    joined,
    restaurant,
    split_words,
)
from hf_fusion.assets.language_tasks import StoredRows


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


def _drawn(
    things: Sequence[str], least: int, most: int, layout: Callable[[list[str]], str], answer: Callable[[list[str]], str]
) -> DrawnRows:
    def make(rng: random.Random) -> Example:
        values = rng.sample(things, rng.randint(least, most))
        return Example(layout(values), answer(values))

    return DrawnRows(make)


def _listed(values: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"


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
    return Example(f"{stops[place]}: {joined(stops)}", stops[place + 1])


def _queue(rng: random.Random) -> Example:
    people = rng.sample(NAMES, rng.randint(3, 6))
    place, end = rng.choice((("front", 0), ("end", -1)))
    return Example(f"the {place}: {joined(people)}", people[end])


def _guests(rng: random.Random) -> Example:
    people = rng.sample(NAMES, rng.randint(4, 7))
    came = people[1:]
    is_there = rng.random() < 0.5
    who = rng.choice(came) if is_there else people[0]
    return Example(
        f"{' and '.join(came)} came to the party. {who} was", "present" if is_there else "absent", ("present", "absent")
    )


def _hotel(asked: int) -> Callable[[random.Random], Example]:
    """An advertisement of a hotel; its name or its rating is asked for."""

    def make(rng: random.Random) -> Example:
        kind, city, other = rng.choice(("Hotel", "Hostel", "Villa")), *rng.sample(CITIES, 2)
        name, rooms, stars = f"{kind} {city}", rng.randint(5, 90), f"{rng.randint(1, 10)} out of 10"
        layouts = (
            f"{name} in {other} has {rooms} rooms and is rated {stars}.",
            f"In {other}, {name} offers {rooms} beds, with a rating of {stars}.",
            f"With {rooms} rooms and a score of {stars}, {name} welcomes you to {other}.",
        )
        return Example(rng.choice(layouts), (name, stars)[asked])

    return make


def _person(item: Mapping[str, Any]) -> Example | None:
    """A short word problem that begins with a person's name, which it repeats."""
    text = item["prompt"]
    name = text.split(" ", 1)[0]
    is_name = name.isalpha() and name.istitle() and len(re.findall(rf"\b{name}\b", text)) > 1
    return Example(text, name) if is_name and name not in _NO_NAMES and len(text) < 190 else None


_NO_NAMES = split_words("A An At By Every Each For From He How If In It On One She The There They This To Two")


def _athlete(item: Mapping[str, Any]) -> Example | None:
    """A sentence about an athlete, who is named by two words."""
    found = re.search(r'"((?:[A-Z][\w.\'-]+ ){2})(?=[a-z]).*"', item["prompt"])
    return None if found is None else Example(found[0].strip('"'), found[1].strip())


def _acrostic(item: Mapping[str, Any]) -> Example | None:
    """A short command."""
    words = item["text"].split()
    if not 3 <= len(words) <= 6 or not all(map(str.isalpha, words)):
        return None
    return Example(" ".join(words), " ".join(word[0].upper() for word in words))


def _letters(rng: random.Random) -> Example:
    letters = rng.sample("abcdefghiklmnoprstuw", rng.randint(3, 5))
    return Example(joined(letters), joined(letters[::-1]))


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
            "tweet_emotion", {"joy": "good mood", "optimism": "good mood", "anger": "bad mood", "sadness": "bad mood"}
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
            ReviewRows(
                lambda text, good: Example(
                    text, "great film" if good else "terrible film", ("great film", "terrible film")
                )
            )
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
        "route-back",
        (
            "We came by these cities and return the same way: {}",
            "{}\nThe way home is",
            "Outbound cities, now inbound: {}",
        ),
        _drawn(CITIES, 3, 5, ", ".join, lambda values: joined(values[::-1])),
    ),
    _task(
        "queue-backwards",
        ("The queue turns round: {}", "{}\nSeen from behind, the people are", "Call the people in from the back: {}"),
        _drawn(NAMES, 3, 5, "; ".join, lambda values: joined(values[::-1])),
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
            "Things to carry home, in total: {}",
            "{}\nHow long is my shopping list?",
            "The basket holds this number of goods: {}",
        ),
        _drawn(GOODS, 2, 8, ", ".join, lambda values: str(len(values))),
    ),
    _task(
        "acronym",
        ("Short form of the society: {}", "{}\nIts badge has these letters:", "Monogram: {}"),
        _drawn([*CITIES, *NAMES], 3, 4, " ".join, lambda values: " ".join(value[0] for value in values)),
    ),
    _task(
        "next-stop",
        (
            "Train timetable, the stop following {}",
            "Line map, on the journey I see next to {}",
            "Get off one stop behind {}",
        ),
        DrawnRows(_route),
    ),
    _task(
        "queue-ends",
        ("At the doctor's, who waits at {}", "The person standing at {}", "In the queue, tell who is at {}"),
        DrawnRows(_queue),
    ),
    _task(
        "guests",
        ("{}", "Party report. {}", "Diary: {}"),
        DrawnRows(_guests),
        "ranked",
    ),
    _task(
        "record-high",
        ("The oldest of these ages: {}", "{}\nThat day's hottest temperature was", "Top score of the game: {}"),
        _drawn([str(number) for number in range(100, 1000)], 3, 5, ", ".join, lambda values: max(values, key=int)),
    ),
    _task(
        "record-low",
        ("The youngest of these ages: {}", "{}\nThat day's coldest temperature was", "Cheapest price in the shop: {}"),
        _drawn([str(number) for number in range(100, 1000)], 3, 5, ", ".join, lambda values: min(values, key=int)),
    ),
    _task(
        "hotel-name",
        ("Where did our group sleep? {}", "{}\nThe sign above the door says", "Who runs this advertisement? {}"),
        DrawnRows(_hotel(0)),
    ),
    _task(
        "hotel-stars",
        ("Do travellers like the house? {}", "{}\nThe mark that it got:", "Travellers' mark: {}"),
        DrawnRows(_hotel(1)),
    ),
    _task(
        "story-person",
        ("Who is the hero of this story? {}", "{}\nThe story tells of", "The protagonist in: {}"),
        StoredRows("gsm8k", _person),
        license="mit",
    ),
    _task(
        "athlete",
        ("The sports desk asks who it was. {}", "{}\nThe player's first and family name:", "Who is mentioned in: {}"),
        StoredRows("bbh/sports_understanding", _athlete),
        license="mit",
    ),
    _task(
        "acrostic",
        ("Acrostic: {}", "{}\nRead downwards, the words begin with", "Cipher key of this sentence: {}"),
        StoredRows("snips", _acrostic),
        license="cc0-1.0",
    ),
    _task(
        "letters-backwards",
        ("Seen in a mirror: {}", "{}\nSpell it from the right.", "Retrograde letters: {}"),
        DrawnRows(_letters),
    ),
)
"""Candidates; those that no expert helps on are listed with the others in the results of the acceptance."""
