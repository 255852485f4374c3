"""What `hf-fusion demo` is made of: real experts and real data from PyPI."""

# name of a demo -> its module, which has run(place, out); one more family is one more row
DEMOS = {"foe": "hf_fusion.demo.foe"}
