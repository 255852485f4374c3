"""FusionBench: every fusion technique on every suite, cell by cell, with reports from what was measured (2406.03280).

A suite (`suite`, one YAML file in `suites/`) says what is fused and tested; `rows` reads its tasks' rows. `setups` load
its experts, `methods` fuse them into `candidates`, and `not_applicable` says where a method has none. `run` measures
candidates through `hf_fusion.evaluation` and leaves a file for each of the `cells`; `report` makes a `summary` of them,
`suite_tables`, `plots` and `pages` show it, `publish` brings it to the Hub.
"""
