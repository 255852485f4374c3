"""What each static merging method does, in words that need no formula and no paper: for a card's reader.

A method that is not listed, such as one of a user's own file, is described by its formula alone.
"""

from __future__ import annotations

_SIGNS = "where experts disagree on the sign of an entry, only entries of the sign with more weight count"

PLAIN = {
    "linear": "Each weight is the average of the experts' weights.",
    "task_arithmetic": "The task vectors are added up, scaled, and added to the base.",
    "expo": "The base's weights are moved where training moved them, but further than training did.",
    "emr": "The task vectors are joined to one, from which a mask and a scale restore that of one task approximately; "
    "this is the model of that task.",
    "fisher": "Each weight is an average in which an expert counts the more, the more its predictions depend on it.",
    "regmean": "Each linear layer is the one whose outputs are closest to those of all experts on their own inputs.",
    "lora": "The adapters' updates are added up and stored as one adapter.",
    "model_stock": "The experts' average is moved towards the base, the more so the less their task vectors agree.",
    "arcee_fusion": "Only the values that training changed most are taken from the expert; the others are the base's.",
    "moe": "The experts' feed-forward layers lie side by side and each token is sent to some of them; all else is the "
    "base's.",
    "passthrough": "Layers are taken from the models as they are and stacked.",
    "recombination": "Each layer is taken from one of the experts, drawn at random.",
    "ties": "Only the largest entries of each task vector are kept; "
    f"{_SIGNS}, and what is left is combined and added to the base.",
    "magnitude": "Only the largest entries of each task vector are kept; they are added up, scaled, and added to the "
    "base.",
    "dare_linear": "Entries of each task vector are dropped at random; what is left is added up, scaled, and added to "
    "the base.",
    "dare_ties": f"Entries of each task vector are dropped at random; {_SIGNS}, and what is left is combined and added "
    "to the base.",
    "della": "Entries of each task vector are dropped at random, small ones more often than large ones; "
    f"{_SIGNS}, and what is left is combined and added to the base.",
    "della_linear": "Entries of each task vector are dropped at random, small ones more often than large ones; what is "
    "left is added up, scaled, and added to the base.",
    "breadcrumbs": "The smallest and the largest entries of each task vector are dropped; what is left is added up, "
    "scaled, and added to the base.",
    "breadcrumbs_ties": "The smallest and the largest entries of each task vector are dropped; "
    f"{_SIGNS}, and what is left is combined and added to the base.",
    "sce": "Only entries in which the experts differ most are kept; an expert counts more the larger its entries are, "
    "and entries of the minority's sign are dropped.",
    "tsv_m": "Of each task vector only the strongest directions are kept, and those of different experts are made "
    "perpendicular to each other before they are added to the base.",
    "iso_c": "The task vectors are added up, and all directions of the sum are made equally strong.",
    "iso_cts": "Directions that the task vectors share and directions of single tasks are collected, and all of them "
    "are made equally strong.",
    "wudi": "One task vector is searched for that disturbs each expert's layers least, step by step from the sum of "
    "all.",
    "slerp": "The weights lie on the arc between the two models, not on the straight line.",
    "nuslerp": "The weights lie on the arc between the two models, or between their task vectors if there is a base.",
    "multislerp": "The weights have the experts' weighted mean direction, with their weighted mean length.",
    "karcher": "The weights have the direction that is nearest to those of all experts, with their mean length.",
    "nearswap": "Each weight of the base moves towards the expert's, by at most a fixed amount.",
}
"""Method → a sentence; "task vector" is explained where it is shown."""
