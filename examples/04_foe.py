# %% [markdown]
# # From a Hub to one model: Fusion of Experts
#
# Classifiers of seven architectures each know a part of the digits, under labels of their own. They are found on a
# Hub, checked, and fused: a small network learns from their outputs which expert to trust on which picture. The Hub
# runs inside this notebook; without `api=`, the same calls use huggingface.co. Two minutes on a CPU; nothing comes
# from the internet but packages.
#
# In a clone of hf_fusion:
#
#     pip install ./demo_weights '.[demo]'

# %%
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from hf_fusion import check_compatibility, discover, evaluate, fit_fuser, fuse
from hf_fusion.demo.digits import DIGITS, EXPERTS, LABEL_MAPS, digit_expert, digits, misfits
from hf_fusion.server import HubServer

folder = Path(tempfile.mkdtemp())
hub = HubServer(folder / "hub").start()
me = HfApi(endpoint=hub.endpoint, token=hub.token("me"))
for name in EXPERTS:
    me.create_repo(f"me/{name}")
    me.upload_folder(repo_id=f"me/{name}", folder_path=digit_expert(name))
for misfit in misfits(folder / "misfits"):  # real models with one thing wrong
    me.create_repo(f"me/{misfit.name}")
    me.upload_folder(repo_id=f"me/{misfit.name}", folder_path=misfit.folder)
    if misfit.settings:
        me.update_repo_settings(f"me/{misfit.name}", **misfit.settings)

# %% [markdown]
# ## Find experts, and see why others do not fit
#
# Only configurations and the headers of weight files are read.

# %%
anyone = HfApi(endpoint=hub.endpoint, token=False)
labels = {*DIGITS, *(label for mapping in LABEL_MAPS.values() for label in mapping)}
found = sorted(discover(author="me", api=anyone), key=lambda info: info.id)
verdict = check_compatibility(found, "image-classification", labels=labels, api=anyone)
verdict

# %% [markdown]
# ## Fuse
#
# `label_maps` translates labels that are not the fused ones: `eins` of one expert is `one`. Weights are read only
# now: a model with a NaN is refused by name, so leave it out.

# %%
from hf_fusion import FusionError

maps = {f"me/{name}": mapping for name, mapping in LABEL_MAPS.items()}
try:
    fuse("foe", verdict.accepted, labels=DIGITS, label_maps=maps, api=anyone)
except FusionError as error:
    print(error)
experts = [info for info in verdict.accepted if info.id != "me/regnet-lookalikes-nan"]
model = fuse("foe", experts, labels=DIGITS, label_maps=maps, api=anyone)
model.summary()

# %% [markdown]
# ## Fit, and measure
#
# The fuser learns from pictures that no expert was trained on. `frugal=True` also learns which experts can be
# skipped.

# %%
rows = digits()  # real handwritten digits, from PyPI
fit_fuser(model, rows["fit"], frugal=True)

# %%
results = evaluate(model, rows["test"])
results

# %%
from IPython.display import Image

from hf_fusion.evaluation.plots import plot_accuracy_cost

Image(plot_accuracy_cost(results, folder / "accuracy-cost.png").read_bytes(), width=640)

# %% [markdown]
# ## Use it as anybody does
#
# The saved folder loads with transformers alone, or from the Hub by its id. With a budget, experts are queried one
# after the other until the prediction is safe enough; the trace shows which.

# %%
import torch
from transformers import AutoModelForImageClassification, AutoProcessor

model.save_pretrained(folder / "fused")
loaded = AutoModelForImageClassification.from_pretrained(folder / "fused", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder / "fused", trust_remote_code=True)
loaded.record_routing = True
with torch.no_grad():
    loaded(**processor(images=rows["test"][:8]["image"]), budget=0.5)
print("right:", *(DIGITS[label] for label in rows["test"][:8]["label"]))
loaded.routing_trace()

# %%
hub.stop()

# %% [markdown]
# ## Next
#
# - The guide [Fusion of Experts](../docs/guides/foe.md): selection, language models, ensembles, costs
# - [Find experts](../docs/guides/find.md) on huggingface.co, and [publish](../docs/guides/publish.md) what you made
# - [Which method?](../docs/choose.md)
