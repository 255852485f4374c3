"""The embedded Hub: a small Hugging Face Hub on one folder, spoken to by the unmodified clients.

For air-gapped work, tests and the demo::

    with HubServer(Path("hub")) as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token("alice"))
        api.create_repo("alice/model")
"""

from __future__ import annotations

from importlib.util import find_spec

from hf_fusion.errors import FusionError

_missing = [name for name in ("fastapi", "uvicorn", "dulwich", "markdown_it", "nh3") if find_spec(name) is None]
if _missing:
    raise FusionError(
        f"the embedded Hub needs {', '.join(_missing)}, which is not installed", hint="pip install 'hf_fusion[hub]'"
    )

from .service import HubServer, add_user, serve  # noqa: E402 - only importable once the check above passed

__all__ = ["HubServer", "add_user", "serve"]
