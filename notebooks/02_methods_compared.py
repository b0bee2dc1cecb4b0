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
# # 2. Greater-than and colored objects: methods compared
#
# A dozen methods promise to find the edges that matter. They differ in cost by orders of magnitude, and each paper
# shows a task on which its method does well. Which of them should you believe on *your* task?
#
# The built-in model is small enough for a yardstick: we can cut each of its 1,519 edges, one at a time, and **measure** what
# is lost. We ask on two tasks, one with a metric that saturates and one with a metric that does not.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

import mechinterp as mi
from circuits import compare, discover, draw_comparison, ranking
from mechinterp.tasks import colored_objects, greater_than

model = mi.load("builtin")

# %% [markdown]
# ## Greater-than
#
# *The tradition went on from the year 1225 until the year 12* … must end with something above 25 (Hanna et al. 2023,
# arXiv:2305.00586). The metric is a **difference of probabilities**: of all years above, minus all years below. The
# corrupted prompts begin in year 01, after which nearly every year is right.

# %%
years = greater_than(model, n_prompts=24, seed=0)
years

# %% [markdown]
# The yardstick: `exact` cuts one edge, measures, and puts it back.

# %%
exact = discover(model, years, "exact")
exact.strongest(6)

# %% [markdown]
# Now four estimates, from cheap to less cheap:
#
# * `eap`: one gradient, at the clean prompt (Syed et al. 2023);
# * `eap-ig`: the same, averaged on the way from corrupted to clean (Hanna et al. 2024);
# * `relp`: relevance propagated by rules in place of the gradient (Jafari et al. 2025);
# * `acdc`: cuts edges one after the other and *leaves them out* if little is lost (Conmy et al. 2023).

# %%
found = {method: discover(model, years, method) for method in ("eap", "eap-ig", "relp", "acdc")}
for name, value in exact.strongest(6):
    estimates = "   ".join(f"{method} {dict(zip(s.names, s.values, strict=True))[name]:+.3f}" for method, s in found.items())
    print(f"{name:14} measured {value:+.3f}   {estimates}")

# %% [markdown]
# ### Where methods disagree, and why
#
# Cutting `input->m0` costs the better part of a probability difference near 1. `eap` estimates less than a tenth of that.
# The reason is the metric: at the clean prompt the model is almost certain, softmax is **saturated**, and there its
# gradient is nearly flat. A tangent at the flat end of a curve knows nothing of the cliff. `eap-ig` walks from the
# corrupted prompt to the clean one and sees the slope on the way, so its values come near the measured ones for the largest
# edges (and are several times too large for others, where several edges share what is to be lost).
#
# ### Does it matter? Values, ranks, circuits
#
# A wrong value is harmless if the *order* is right, since circuits take the best edges. `ranking` asks how well the order of
# a method finds the hundred edges that measure largest: area under the ROC curve, 0.5 is chance.

# %%
yardstick = exact.top(100)
figure, axes = plt.subplots(figsize=(5, 4.2), dpi=110)
for (method, s), dashes in zip(found.items(), ("-", "--", ":", "-."), strict=True):
    judged = ranking(s, yardstick)
    axes.plot(*judged.roc, dashes, label=f"{method}: AUROC {judged.auroc:.2f}, AP {judged.average_precision:.2f}")
axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
axes.set(xlabel="share of the other edges taken", ylabel="share of the 100 measured edges found", title="greater-than")
axes.legend(frameon=False)
plt.close(figure)
figure

# %% [markdown]
# Three methods rank nearly perfectly, `eap` with its tiny values too. `acdc` comes last here: what one edge is worth *after*
# others have been cut is another question than what it is worth alone. The straight piece of its curve is a tie: edges into
# parts that nobody reads any more score zero.
#
# Rank agreement is still not what we are after. What counts is whether the circuits **work**: `compare` measures every
# method's circuits of all sizes on prompts that no search has seen, between the same two ends, with random circuits beside
# them.

# %%
fresh = greater_than(model, n_prompts=24, seed=1)
on_years = compare(
    model,
    years,
    ["information-flow", *found, "exact"],
    on=fresh,
    known={"exact 100": yardstick},
    n_random=3,
)
on_years

# %%
draw_comparison(on_years, dpi=90)

# %% [markdown]
# * **CMD** is the area between a curve and 1 (smaller is better), **CPR** the area under the curve of the largest *values*
#   (larger is better), as in the MIB benchmark. *edges for 0.9* is the smallest circuit found that restores nine tenths.
# * `eap`, `eap-ig` and `exact` need about forty edges. Measuring each edge took many times as long as `eap` and found no
#   smaller circuit to speak of.
# * `relp` has a fair CMD and a bad CPR: it finds the important edges and gives some of them the **wrong sign**, which ranking
#   by value punishes and ranking by magnitude does not see.
# * `acdc` is drawn by its scores like all others. Its own circuit is `scores.above(threshold)`, one point and no ranking.
# * `information-flow` never looks at the task, only at where activations flow. It beats random circuits and no other method.
# * The grey band, random circuits of the same size: with half of the model's edges they still restore next to nothing.

# %% [markdown]
# ## Colored objects
#
# *… there is a brown brush, a purple pen, and a blue bowl. Which color has the brush?* (Merullo et al. 2024,
# arXiv:2310.08744). The metric is a difference of logits, which do not saturate; the corrupted prompt asks for another thing.

# %%
colors = colored_objects(model, n_prompts=24, seed=0)
colors

# %%
measured = discover(model, colors, "exact")
on_colors = compare(
    model,
    colors,
    ["information-flow", "eap", "eap-ig", "relp", "acdc", "exact"],
    on=colored_objects(model, n_prompts=24, seed=1),
    known={"exact 100": measured.top(100)},
    n_random=3,
)
on_colors

# %%
draw_comparison(on_colors, dpi=90)

# %% [markdown]
# Three or four dozen edges of 1,519 answer nearly as well as the whole model, whichever of four methods chose them. `relp`
# has no trouble with signs here, and `eap-ig` comes as close to 1 as the yardstick.
#
# Whole heads can be compared as well. For parts the exact measurement is `patching`, and `atp` its first-order estimate:

# %%
for task in (years, colors):
    truth, estimate = discover(model, task, "patching"), dict(discover(model, task, "atp").strongest(37))
    print(f"{task.name} ({task.metric_name})")
    for name, value in truth.strongest(6):
        print(f"   {name:6} measured {value:+7.3f}   first-order estimate {estimate[name]:+7.3f}")

# %% [markdown]
# On greater-than the estimate is an order of magnitude too small for the parts that carry most (saturation again). On
# colored objects it misses `a0.h7` and `m0` by about ten times *and puts others first*: at the clean prompt the gradient
# cannot see that without them the question itself is lost.
#
# ## What may be concluded
#
# * Compare methods by **rank** and by what their circuits **restore**, never by value.
# * Where the metric is a probability, or one part carries almost everything, distrust a single gradient; take `eap-ig`, and
#   re-measure the top (`hybrid` does both).
# * Agreement between methods is weak evidence: those that use the same gradient share its blind spots. Here a measurement
#   was affordable. On a large model, measure the few edges that your claim rests on.
#
# What may not: that the order of methods here holds on your task. Two tasks of one small model disagree already. The command
# line does all this at once: `mechinterp compare greater-than --methods eap,eap-ig,relp,acdc,exact`.
