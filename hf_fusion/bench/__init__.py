"""FusionBench: every fusion technique on every suite, cell by cell, with reports from what was measured (2406.03280).

`suite` declares what is measured on what, `run` measures, `cells` is what one measurement leaves on the disk, `report`
makes tables and pictures of them. A suite is one YAML file in `suites/`.
"""
