"""``hf-fusion export``: its output, and what it refuses before anything is loaded."""

from __future__ import annotations

import json

import pytest
from tiny import TEXTS
from tiny_exports import ROWS, router, saved

from hf_fusion import FusionError
from hf_fusion.cli.errors import UsageError


def test_on_the_command_line(here, tmp_path):
    saved(router(), tmp_path / "router")
    ROWS.to_parquet(tmp_path / "rows.parquet")
    shown = here("export", "router", "--to", "dense", "--input", "rows.parquet")
    assert "✓ Exported" in shown
    assert f"weighted by their use on {len(TEXTS)} rows" in shown
    assert (tmp_path / "router-dense" / "model.safetensors").exists()
    told = json.loads(here("export", "router", "--to", "adapter", "--task", "lora-0", "--format", "json"))
    assert told["facts"]["weights"] == {"me/lora-0": 1.0}
    with pytest.raises(FusionError, match="router-adapter already contains a model"):
        here("export", "router", "--to", "adapter")
    with pytest.raises(UsageError, match="--rank goes with --to adapter"):
        here("export", "router", "--to", "dense", "--rank", "3")
    with pytest.raises(FusionError, match="no folder nowhere"):
        here("export", "nowhere", "--to", "dense")
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FusionError, match="no prompt or text or image"):
        here("export", "router", "--to", "dense", "--input", "odd.csv", "-o", "x")
