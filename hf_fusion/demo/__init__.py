"""What `hf-fusion demo` is made of: real experts and real data from PyPI."""

from typing import NamedTuple


class Demo(NamedTuple):
    """A demo: its module, which has run(place, out), and what it shows."""

    module: str
    shows: str
    one_thread: bool = False  # models so small that a second thread only gets in the way of other programs


# one more family is one more row
DEMOS = {
    "foe": Demo("hf_fusion.demo.foe", "eight classifiers of digits that answer together", one_thread=True),
    "phatgoose": Demo("hf_fusion.demo.phatgoose", "adapters of SmolLM2, every token routed among them"),
    "wemoe": Demo("hf_fusion.demo.wemoe", "fine-tunes of a ViT, merged anew for every picture", one_thread=True),
}
