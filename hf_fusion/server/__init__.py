"""The embedded Hub: a small Hugging Face Hub that stores one folder and serves the unmodified clients.

For offline work, tests and the demo::

    with HubServer(Path("hub")) as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token("alice"))
        api.create_repo("alice/model")
"""

from __future__ import annotations

from hf_fusion.errors import FusionError

try:
    from hf_fusion.server.service import HubServer, add_user, serve
except ModuleNotFoundError as error:
    raise FusionError(
        f"the embedded Hub needs {error.name}, which is not installed", "pip install 'hf_fusion[hub]'"
    ) from error

__all__ = ["HubServer", "add_user", "serve"]
