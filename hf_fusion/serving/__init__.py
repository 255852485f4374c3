"""Serves one model by OpenAI's API, which its clients use unchanged.

In Python, for tests and notebooks::

    with ModelServer(load_served("fused")) as server:
        client = openai.OpenAI(base_url=f"{server.endpoint}/v1", api_key="none")
"""

from __future__ import annotations

from hf_fusion.errors import FusionError

try:
    from hf_fusion.serving.app import Limits
    from hf_fusion.serving.served import ServedModel, load_served
    from hf_fusion.serving.service import ModelServer
except ModuleNotFoundError as error:
    raise FusionError(
        f"serving models needs {error.name}, which is not installed", "pip install 'hf_fusion[serve]'"
    ) from error

__all__ = ["Limits", "ModelServer", "ServedModel", "load_served"]
