"""The embedded Hub: a small Hugging Face Hub on one folder, spoken to by the unmodified clients.

For air-gapped work, tests and the demo::

    with HubServer(Path("hub")) as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token("alice"))
        api.create_repo("alice/model")
"""

from __future__ import annotations

from hf_fusion.extras import need

need("hub", "the embedded Hub")

from hf_fusion.server.service import HubServer, add_user, serve  # noqa: E402 - importable once that is known to be installed

__all__ = ["HubServer", "add_user", "serve"]
