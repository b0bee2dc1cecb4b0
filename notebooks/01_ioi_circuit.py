# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. Discover the IOI circuit
#
# > *Then, Mary and John met at the park. John handed a ring to* …
#
# A transformer that has learned English says **Mary**: the one of the two who is not giving. This is *indirect object
# identification* (IOI; Wang et al. 2022, arXiv:2211.00593). Which attention heads and MLPs does the model need for it, and
# how do we know?
#
# We ask the small model that ships with the toolkit: 4 layers of 8 heads, trained on this and three other tasks. It runs on
# a laptop without a network. The same lines work with `mi.load("gpt2")`, where other heads will turn up.

# %%
# %matplotlib inline
import mechinterp as mi
from circuits import attention_roles, discover, draw, evaluate
from mechinterp.tasks import ioi

model = mi.load("builtin")

# %% [markdown]
# ## The task: pairs of prompts
#
# A circuit is always a circuit *of something, against something*. Each clean prompt has a corrupted partner, equal token
# by token except for the names: three others, so that nobody is mentioned twice and there is no right answer left. The
# metric is the difference of two logits, the indirect object's (IO) minus the subject's (S).

# %%
task = ioi(model, n_prompts=32, seed=0)
task

# %% [markdown]
# ## Score every edge
#
# The parts of a transformer talk through the residual stream: every head and MLP adds to it, and every later one reads the
# sum. So each pair (earlier writer, later reader) is an **edge**, and a head reads three times, as query, key and value. The
# edge `m0->a2.h5.v` is what the MLP of layer 0 wrote, as the value of head 5 in layer 2 reads it. There are 1,519.
#
# A **score** says how much the metric falls if this one edge carries the corrupted prompt's value instead. Measuring that
# edge by edge is exact and slow; EAP-IG (Hanna et al. 2024, arXiv:2403.17806) estimates all of them from a few gradients.

# %%
scores = discover(model, task, "eap-ig")
scores

# %% [markdown]
# The map sums each part's scores over all that it writes; beside it stand the strongest edges. Much of the effect runs along
# one chain: a head of layer 0 feeds the MLP of layer 0, which a head of layer 2 reads as value, and that head writes to
# the logits.

# %% [markdown]
# ## Cut a circuit out
#
# The 100 edges of largest magnitude. `pruned()` drops those that lie on no path from the input to the logits: under
# this ablation they change no number. The result is a networkx graph.

# %%
circuit = scores.top(100).pruned()
circuit

# %% [markdown]
# The same in words, made by rules from the numbers, and nothing that is not in them:

# %%
print(circuit.describe())

# %% [markdown]
# ## What do these heads look at?
#
# Positions have names in a task: S1 and S2 are the two mentions of the subject, IO the indirect object, END the last
# token, where the answer is due. `attention_roles` says for each head which look between named positions tells most.

# %%
looks = attention_roles(model, task, ["a0.h7", "a2.h5", "a3.h2", "a3.h6", "a3.h7"], n=2)
for head, gazes in looks.items():
    print(head, *gazes, sep="   ")

# %%
mi.draw_patterns(model, "Then, Mary and John met at the park. John handed a ring to", ["a0.h7", "a2.h5", "a3.h2"], dpi=90)

# %% [markdown]
# Two different habits. `a0.h7` and `a2.h5` look from END at **S2**, the name to be avoided. The heads of layer 3 look from
# END more at **IO** than at anything else, the name to be said. Attention shows what a head reads and not what it does with
# it, so this is a hypothesis: the first two say *not this one*, the others *this one, or its like*. (Notebook 3 asks what
# of it arrives in their output.)
#
# ## Test it: switch heads off
#
# If the circuit is right, switching off a head that it ranks high must hurt, and one that it leaves out must not. This is
# an experiment on the model itself, on prompts that the search has not seen. We scale a head's output by zero, a cruder cut
# than putting the corrupted prompt's value in its place.

# %%
fresh = ioi(model, n_prompts=32, seed=1)
prompts = fresh.prompts
switched_off = {
    "nothing": [],
    "a0.h7": ["a0.h7"],
    "a2.h5": ["a2.h5"],
    "a3.h2": ["a3.h2"],
    "a0.h3": ["a0.h3"],
    "a1.h1": ["a1.h1"],
}
for name, heads in switched_off.items():
    edit = mi.scale_heads(dict.fromkeys(heads, 0.0)) if heads else {}
    logits, _ = model.run(prompts.clean, patch=edit, logits_at=prompts.end)
    metric = fresh.metric(logits, prompts)
    print(f"{name:8} off: logit difference {metric.mean():5.2f}, right on {(metric > 0).float().mean():4.0%} of prompts")

# %% [markdown]
# Without `a0.h7` or `a2.h5` about half of the logit difference is gone. `a0.h3` and `a1.h1`, which the circuit leaves out,
# matter little or not at all. But without `a3.h2`, to which the map gives the third place among heads, nothing is lost
# either. Is the estimate wrong? `patching` measures the same thing exactly, head by head. We ask it on three draws of
# prompts, with twice the standard error over prompts:

# %%
for seed in (0, 1, 2):
    measured = discover(model, ioi(model, n_prompts=32, seed=seed), "patching")
    print(f"prompts of seed {seed}:", end="")
    for name in ("a0.h7", "a2.h5", "a3.h2"):
        effects = measured.per_prompt[:, measured.names.index(name)]
        print(f"   {name} {effects.mean():+.2f} ± {2 * effects.std() / len(effects) ** 0.5:.2f}", end="")
    print()

# %% [markdown]
# The estimate is right for *its* prompts (seed 0), and the effect is gone on others: on a single prompt `a3.h2` may help or
# hurt, and on average it does neither. Only the two large effects are the same everywhere. A small score from 32 prompts is
# a remark about 32 prompts, so test on fresh ones and keep the intervals in view.
#
# ## Is the circuit faithful?
#
# `evaluate` keeps the circuit's edges and lets every other edge carry the corrupted value. **Faithfulness** is the share of
# the gap between corrupted and clean that the circuit alone restores: 0 for no edges, 1 for the whole model.

# %%
report = evaluate(model, fresh, circuit, scores)
report

# %% [markdown]
# How to read it:
#
# * **The interval** is a bootstrap over prompts. With 32 of them it is wide. A faithfulness without an interval would have
#   looked more certain than it is.
# * **Random circuits** of the same size, all their edges on paths from input to logits, reach next to nothing on average,
#   and the best of twenty less than half as much. A circuit that did not beat them would have found nothing.
# * **The other edges**, more than nine tenths of the model, restore nothing by themselves.
# * **Accuracy**: the circuit alone gets some prompts wrong that the whole model gets right. It does most of the work, not all.
# * **Stability**: had we drawn other prompts, about that share of the edges would have been found again. A list of 100 edges
#   is not a list of 100 facts.
#
# How many edges does it take? The report holds a curve over sizes.

# %%
for n_edges, faithfulness in zip(report.curve.n_edges, report.curve.faithfulness, strict=True):
    print(f"{n_edges:5} edges: {faithfulness:5.2f}")

# %% [markdown]
# Seven edges restore more than half of the behaviour. The rest is a long tail.
#
# ## The picture
#
# The layers go up from the input to the logits. Colours say whether an edge is read as query, key, value or by an MLP;
# width is the score, and dashes are edges that hurt. The circuit carries the report's facts into its picture.

# %%
circuit.graph.update(report.facts)
draw(circuit, max_edges=40)

# %% [markdown]
# `circuit.save("ioi.json")` keeps it, `circuit.save("ioi.svg")` draws it, and `circuits.view(circuit, model, task)` opens a
# page in which it can be explored; notebook 8 is about sharing.
#
# ## What may be concluded
#
# *On this model, on prompts of these templates, against three random names, measured by logit difference:* a hundred edges
# carry most of the behaviour, much more than chance; two heads that look at the repeated name carry the largest part.
#
# What may **not** be concluded: that this is the only such circuit, that other corruptions or metrics would give the same
# one (notebook 2 tries methods, and `ioi(model, corruption=...)` others), that GPT-2 does it this way (there, heads that
# look at IO carry far more), or that `a2.h5` "is" a name inhibitor. Where it looks and what cutting it costs is measured. The
# name is an interpretation; notebook 4 looks into what the head writes.
