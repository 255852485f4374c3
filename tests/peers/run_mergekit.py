"""Runs recipes with mergekit: run_mergekit.py JOBS.json, in its environment (make peers)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.moe.config import MoEMergeConfig
from mergekit.options import MergeOptions
from mergekit.scripts.moe import build

done = {}
for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
    began = time.perf_counter()
    try:
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
        if "experts" in job["recipe"]:
            build(MoEMergeConfig.model_validate(job["recipe"]), job["out"], options, device="cpu")
        else:
            run_merge(MergeConfiguration.model_validate(job["recipe"]), job["out"], options)
        done[name] = {"seconds": time.perf_counter() - began}
    except Exception as error:  # whatever the peer says is part of the result
        done[name] = {"error": f"{type(error).__name__}: {error}"}
Path(sys.argv[2]).write_text(json.dumps(done))
