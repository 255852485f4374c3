"""Combines adapters with PEFT's add_weighted_adapter: run_peft.py JOBS.json DONE.json, in our own environment."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

done = {}
for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
    began = time.perf_counter()
    try:
        model = AutoModelForCausalLM.from_pretrained(job["base"], dtype="float32")
        first, *others = job["adapters"]
        model = PeftModel.from_pretrained(model, first, adapter_name="0")
        for number, folder in enumerate(others, 1):
            model.load_adapter(folder, adapter_name=str(number))
        names = [str(number) for number in range(len(job["adapters"]))]
        model.add_weighted_adapter(names, job["weights"], "combined", **job["arguments"])
        model.set_adapter("combined")
        model.merge_and_unload(adapter_names=["combined"]).save_pretrained(job["out"])
        done[name] = {"seconds": time.perf_counter() - began}
    except Exception as error:  # whatever the peer says is part of the result
        done[name] = {"error": f"{type(error).__name__}: {error}"}
Path(sys.argv[2]).write_text(json.dumps(done))
