"""The held-in tasks of the suite `smollm-general`: each has an expert. See `general_tasks`."""

from __future__ import annotations

from hf_fusion.assets.general_forms import DrawnRows, Form, GeneralTask
from hf_fusion.assets.general_rows import (
    QUESTIONS,
    SENTIMENTS,
    IntentRows,
    count,
    described,
    joined,
    labelled,
    lookup,
    membership,
    numbers,
    occurrences,
    of_list,
    restaurant,
    summed,
    topic,
    words,
)
from hf_fusion.assets.language_tasks import StoredRows

HELD_IN_TASKS = (
    GeneralTask(
        "sentiment",
        (
            Form(
                (
                    "What is the sentiment of this sentence? {}",
                    "{}\nHow does the writer judge the film?",
                    "Classify the review: {}",
                    "Read this and say what its tone is: {}",
                    "Sentence: {}\nSentiment:",
                    'A viewer writes "{}" What is the opinion?',
                    "Which word fits this comment best? {}",
                    "{}\nWhat does the author think?",
                    "Decide on the attitude of this text. {}",
                    "Does this sound good or not? {}",
                    "Judge the mood of the following. {}",
                    "Label this remark: {}",
                ),
                labelled(
                    "sst2",
                    ("negative", "positive"),
                    *SENTIMENTS,
                ),
            ),
        ),
        (
            (
                "{}\nIs the speaker pleased with what was shown?",
                "Tell me how this person felt about it: {}",
                "Give the polarity. Text: {}",
            ),
        ),
        metric="ranked",
        license="other",
        trained=880,
    ),
    GeneralTask(
        "topic",
        (
            Form(
                (
                    "What is this news about? {}",
                    "Choose the section of the newspaper: {}",
                    "{}\nWhich topic does this belong to?",
                    "Name the category of this text: {}",
                    "Classify by subject: {}",
                    "Text: {}\nTopic:",
                    "What field is this about? {}",
                    "{}\nPick the right heading.",
                    "File this article under one subject: {}",
                    "Which readers is this for? {}",
                ),
                StoredRows("ag_news", topic),
            ),
        ),
        (
            (
                "An editor received this: {} On which page should it go?",
                "{}\nThat was a report on what?",
                "Assign a department to the story: {}",
            ),
        ),
        metric="ranked",
        license="other",
        trained=640,
    ),
    GeneralTask(
        "facts",
        tuple(
            Form(wordings, restaurant(attribute))
            for attribute, wordings in {
                "name": (
                    "What is the place called? {}",
                    "{}\nExtract the name.",
                    "Which restaurant is this? {}",
                    "Name of the venue in this text: {}",
                ),
                "food": (
                    "What food is served? {}",
                    "{}\nExtract the cuisine.",
                    "Which kind of cooking is mentioned? {}",
                    "Find the food in this text: {}",
                ),
                "customer rating": (
                    "What rating does it have? {}",
                    "{}\nExtract the customer rating.",
                    "How do customers rate it? {}",
                    "Find the score in this text: {}",
                ),
                "priceRange": (
                    "What are the prices? {}",
                    "{}\nExtract the price range.",
                    "How expensive is it? {}",
                    "Find the cost in this text: {}",
                ),
                "eatType": (
                    "What kind of place is it? {}",
                    "{}\nExtract the type of establishment.",
                    "Is this a pub, a restaurant or what? {}",
                    "Find the sort of venue in this text: {}",
                ),
            }.items()
        ),
        (
            ("Who is being described? {}", "Tell me only what it is named: {}", "{}\nIts name?"),
            ("What could I eat there? {}", "{}\nThe dishes are of which origin?", "Nation of the kitchen: {}"),
            ("How good do guests say it is? {}", "{}\nThe guests' verdict?", "State only the stars or grade: {}"),
            ("What would I pay? {}", "{}\nThe bill would be?", "State only the price level: {}"),
            ("What sort of business is meant? {}", "{}\nThe business is a ...?", "State only the venue's category: {}"),
        ),
        license="cc-by-sa-4.0",
        trained=800,
    ),
    GeneralTask(
        "intent",
        (
            Form(
                (
                    "What does this customer want? {}",
                    "Name the intent of the message: {}",
                    "{}\nWhat is the request about?",
                    "Choose what fits this question: {}",
                    "Route this message to the right desk: {}",
                    "Message: {}\nIntent:",
                    "A user says: {} What is it about?",
                    "{}\nWhich of these describes it?",
                    "Match the request to its description: {}",
                    "What is the purpose of this? {}",
                ),
                IntentRows("banking77"),
            ),
        ),
        (
            (
                "Someone wrote to support: {} Which drawer does the ticket go to?",
                "{}\nThe reason for writing is?",
                "Why did they get in touch? {}",
            ),
        ),
        metric="ranked",
        license="cc-by-4.0",
        trained=800,
    ),
    GeneralTask(
        "arithmetic",
        (
            Form(
                (
                    "Calculate {}.",
                    "What is {}?",
                    "State the result of {}.",
                    "{} =",
                    "Compute {}",
                    "How much is {}?",
                    "Work out {} and give the number only.",
                    "Solve: {}",
                    "Find the value of {}.",
                    "The sum is {}. Result?",
                ),
                DrawnRows(summed),
            ),
        ),
        (("Please reckon {}", "{} makes how much?", "Evaluate the expression {} now"),),
        trained=1280,
    ),
    GeneralTask(
        "restaurant-text",
        (
            Form(
                (
                    "Describe this restaurant: {}",
                    "Write a sentence from this data: {}",
                    "Put this data into words: {}",
                    "{}\nTurn this into a description.",
                    "Data: {}\nText:",
                    "Make a sentence with all of this: {}",
                    "Verbalize: {}",
                    "Write about {}",
                ),
                StoredRows("e2e_nlg", described),
            ),
        ),
        (("For a guide book: {}", "{}\nSay that in plain prose.", "Here are facts, make them a sentence: {}"),),
        metric="tokens",
        license="cc-by-sa-4.0",
        trained=560,
    ),
    GeneralTask(
        "reversal",
        (
            Form(
                (
                    "Reverse this list of words: {}",
                    "Write from last to first: {}",
                    "Give these words in reverse order: {}",
                    "{}\nRepeat the list backwards.",
                    "List these words from the end to the start: {}",
                    "Turn the order around: {}",
                ),
                of_list(lambda rng: words(rng, 3, 6), lambda values: joined(values[::-1])),
            ),
            Form(
                (
                    "Reverse these numbers: {}",
                    "Write the numbers from last to first: {}",
                    "{}\nGive the numbers backwards.",
                    "Flip the order of this sequence: {}",
                ),
                of_list(lambda rng: numbers(rng, 3, 6), lambda values: joined(values[::-1])),
            ),
        ),
        (
            ("Start at the end: {}", "{}\nAnd now the other way round.", "Last one first, please: {}"),
            ("Count the row off from its tail: {}", "{}\nMirror that.", "Opposite order of {}"),
        ),
        trained=1440,
    ),
    GeneralTask(
        "question-type",
        (
            Form(
                (
                    "What does this question ask for? {}",
                    "{}\nWhat kind of answer is expected?",
                    "Classify the question: {}",
                    "Question: {}\nType of the answer:",
                    "The answer to this would be what? {}",
                    "Name the type of this question: {}",
                    "{}\nThe answer is a ...",
                    "Which category does the answer have? {}",
                ),
                labelled(
                    "trec",
                    ("description", "entity", "abbreviation", "human", "location", "numeric"),
                    *QUESTIONS,
                ),
            ),
        ),
        (
            (
                "If a quiz master asks this, what will be named? {}",
                "{}\nWhat must I look up?",
                "Sort this question by what it wants to know: {}",
            ),
        ),
        metric="ranked",
        license="other",
        trained=640,
    ),
    GeneralTask(
        "lookup",
        (
            Form(
                (
                    "Which item of the list is {}",
                    "Find what comes {}",
                    "Name the item that stands {}",
                    "Tell me the one {}",
                    "What is {}",
                    "Item {}",
                ),
                DrawnRows(lookup),
            ),
        ),
        (("Point out the entry {}", "Give back just the element {}", "Read the row and say which stands {}"),),
        trained=1600,
    ),
    GeneralTask(
        "counting",
        (
            Form(
                (
                    "How many items are in this list? {}",
                    "Count the items: {}",
                    "{}\nHow many are these?",
                    "Number of entries: {}",
                    "Count and give the number only: {}",
                ),
                DrawnRows(count),
            ),
            Form(
                (
                    "How often does the list have {}",
                    "Count how many times the word occurs: {}",
                    "How many times is it there? {}",
                ),
                DrawnRows(occurrences),
            ),
        ),
        (
            ("Length of this row: {}", "{}\nThe total is?", "Say how long the enumeration is: {}"),
            ("Frequency of the first word after the colon, {}", "Tally {}", "The word comes up how frequently? {}"),
        ),
        trained=1600,
    ),
    GeneralTask(
        "initials",
        (
            Form(
                (
                    "Write the first letters of these words: {}",
                    "Give the initials: {}",
                    "Which letters begin these words? {}",
                    "{}\nTake the first letter of each.",
                    "Abbreviate each word by its first letter: {}",
                    "Initial letters of {}",
                ),
                of_list(lambda rng: words(rng, 3, 5), lambda v: " ".join(w[0].upper() for w in v)),
            ),
        ),
        (("How does each of these start? {}", "{}\nOnly the capitals, please.", "Leading characters: {}"),),
        trained=1080,
    ),
    GeneralTask(
        "membership",
        (
            Form(
                (
                    "Is it in the list? {}",
                    "Look for {}",
                    "Check if you find {}",
                    "Does it occur? {}",
                    "Search {}",
                    "Can you see {}",
                ),
                membership((("yes", "no"), ("true", "false"), ("found", "missing"), ("in", "not in"))),
            ),
        ),
        (("Do we have {}", "Verify the occurrence of {}", "Is there any {}"),),
        metric="ranked",
        trained=1200,
    ),
    GeneralTask(
        "extremes",
        (
            Form(
                ("What is the largest number? {}", "Find the maximum: {}", "{}\nName the highest.", "Biggest of {}"),
                of_list(numbers, lambda values: max(values, key=int)),
            ),
            Form(
                ("What is the smallest number? {}", "Find the minimum: {}", "{}\nName the lowest.", "Least of {}"),
                of_list(numbers, lambda values: min(values, key=int)),
            ),
        ),
        (
            ("Which tops them all? {}", "The peak value among {}", "{}\nThe upper end is?"),
            ("Which is below all others? {}", "The bottom value among {}", "{}\nThe lower end is?"),
        ),
        trained=800,
    ),
)
"""Tasks with experts."""
