"""A Hub on this machine: push experts and repos that do not fit, find them by their tag, and see why.

    python examples/02_discover.py

It prints:

    accepted  me/mobilenet-digits-odd
    accepted  me/regnet-lookalikes-nan
    accepted  me/vit-mnist-low
    rejected  me/convnextv2-digits-wide  shapes: classifier.weight is [5, 96], not [5, 128]
    rejected  me/regnet-closed-loops     labels: has other labels: no loop, closed loop
    rejected  me/swin-scans-gated        gated: me/swin-scans-gated is gated (401 Client Error).
    rejected  me/vit-tiny-pickle         pickle: has only pickle weights
    rejected  me/vit-tiny-voting         custom code: needs its own code to run (config.json: auto_map.AutoConfig is 'modeling_voting_vit.VotingViTConfig')

Weights are not read to judge. The NaN in me/regnet-lookalikes-nan is found, and refused, when it is loaded.
"""  # noqa: E501

import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from hf_fusion import check_compatibility, discover
from hf_fusion.demo.digits import DIGITS, LABEL_MAPS, digit_expert, misfits
from hf_fusion.server import HubServer

labels = {*DIGITS, *(label for mapping in LABEL_MAPS.values() for label in mapping)}

with tempfile.TemporaryDirectory() as folder, HubServer(Path(folder, "hub")) as hub:
    me = HfApi(endpoint=hub.endpoint, token=hub.token("me"))  # any client of the Hub works: this one is unmodified
    for name in ("vit-mnist-low", "mobilenet-digits-odd"):
        me.create_repo(f"me/{name}")
        me.upload_folder(repo_id=f"me/{name}", folder_path=digit_expert(name))
    for misfit in misfits(Path(folder, "misfits")):
        me.create_repo(f"me/{misfit.name}")
        me.upload_folder(repo_id=f"me/{misfit.name}", folder_path=misfit.folder)
        if misfit.settings:
            me.update_repo_settings(f"me/{misfit.name}", **misfit.settings)

    anyone = HfApi(endpoint=hub.endpoint, token=False)
    verdict = check_compatibility(discover(author="me", api=anyone), "image-classification", labels=labels, api=anyone)

for info in sorted(verdict.accepted, key=lambda info: info.id):
    print("accepted ", info.id)
for entry in sorted(verdict.rejected, key=lambda entry: entry.info.id):
    print(f"rejected  {entry.info.id:26} {str(entry.reasons[0]).partition(';')[0]}")
