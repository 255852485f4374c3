# %% [markdown]
# # Merge fine-tunes per input (WEMoE)
#
# Four fine-tunes of one small vision transformer answer different questions about pictures of digits: which digit it
# is, how far it is turned, what happened to it, how many there are. One merge of their weights forgets much of it.
# WEMoE merges the MLPs for every input, with coefficients of small routers that learn from pictures without labels.
# Two minutes on a CPU; nothing comes from the internet but packages.
#
# In a clone of hf_fusion:
#
#     pip install ./demo_weights '.[demo]'

# %%
from PIL import Image

from hf_fusion import adapt_routers, evaluate, fuse, load_experts
from hf_fusion.assets.weights import demo_weights
from hf_fusion.demo.digit_tasks import TASKS, task_rows

base = demo_weights("vit_experts/vit-digits")
experts = load_experts([demo_weights(f"vit_experts/vit-digits-{task}") for task in TASKS])
owners = {task: f"vit-digits-{task}" for task in TASKS}  # whose task it is
experts

# %%
tests = {task: task_rows(task, "test", 400) for task in TASKS}  # pictures that nothing was trained on
sheet = Image.new("RGB", (8 * 32, len(TASKS) * 32), "gray")
for y, task in enumerate(TASKS):
    for x, picture in enumerate(tests[task][:8]["image"]):
        sheet.paste(picture, (32 * x + 2, 32 * y + 2))
for task, about in TASKS.items():
    print(f"{task:12} {about.question}")
sheet.resize((2 * sheet.width, 2 * sheet.height))

# %% [markdown]
# ## Fuse
#
# Everything but the MLPs is merged once. Each linear layer of an MLP keeps the base's weights and the difference of
# each expert.

# %%
model = fuse("wemoe", experts, base)
model.summary()

# %% [markdown]
# ## Adapt the routers, without labels
#
# The routers learn to imitate each task's own expert on pictures of its task.

# %%
unlabelled = {owners[task]: task_rows(task, "adapt", 600).remove_columns("label") for task in TASKS}
adaptation = adapt_routers(model, unlabelled, experts=experts, base=base)
adaptation

# %% [markdown]
# ## Measure
#
# Beside the base, two static merges, and each task's own expert, which nobody has to choose here but for the head
# that answers.

# %%
results = evaluate(model, tests, experts=experts, base=base, owners=owners)
results

# %% [markdown]
# ## Look at the coefficients
#
# Two pictures of each task, in the order of the table above: inputs 0 and 1 ask for the digit, 2 and 3 for the turn,
# and so on. The routers see the pictures alone.

# %%
pictures = [picture for task in TASKS for picture in tests[task][:2]["image"]]
model.record_routing = True
model(**model.processor(pictures, return_tensors="pt"), task=owners["digit"])
model.routing_trace()

# %% [markdown]
# ## Next
#
# - The guide [Merge per input](../docs/guides/wemoe.md): losses, the guard, low rank, language models
# - [Publish](../docs/guides/publish.md) the model, so that transformers alone loads it
# - Models with other labels and architectures: [04_foe](04_foe.ipynb)
