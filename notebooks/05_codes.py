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
# # 5. Discrete codes: what does a head tell apart?
#
# Gradients and ablations say *how much* a head matters. They do not say *what it distinguishes*. Here is a cheap way to
# look: turn what a head writes into one integer, its **code**, and see which prompts share a code. It takes ten prompts,
# one forward pass and a few seconds; nothing is cut and nothing is differentiated. The idea is O'Neill and Bui's
# ([2024](https://arxiv.org/abs/2405.12522)).
#
# It also tempts one to read a circuit off the codes. In the second half we check whether one may.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

import mechinterp as mi
from circuits import discover, explain_codes
from mechinterp.tasks import greater_than, ioi

model = mi.load("builtin")
task = greater_than(model, n_prompts=100, seed=0)
task

# %% [markdown]
# The task is *greater-than*: a war that began in 1732 ends in 17.., and the model should say a year after 32. The
# corrupted prompt has the start year 1701 instead, after which nearly every year is right. So a head that carries the
# start year has to write something else on the corrupted prompt than on the clean one.
#
# ## Codes that change with the prompt
#
# For each head and MLP a tiny sparse autoencoder (16 latents, of which one may be active) is trained on what ten prompts
# made it write at the last token. Its active latent is the code. `codes-change` counts, on all *other* prompts, in which
# share of the pairs the code of the clean prompt differs from that of its corrupted partner: 0 says that the part never
# noticed, 1 that it always did.

# %%
scores = discover(model, task, "codes-change", n_train=10, seed=0)
scores

# %% [markdown]
# Layers 2 and 3 lead. `settings["selected"]` names the parts that stand out from the rest, and asks no answer key for it:

# %%
print(*scores.settings["selected"])

# %% [markdown]
# ## What the codes of one head stand for
#
# A code is a number and says nothing by itself. `explain_codes` puts beside each code of a part the prompts that have it,
# where the head looks on them, and which tokens it writes towards. The codes of the part that changed most:

# %%
meanings = explain_codes(model, task, scores, n_examples=4)
print(meanings.text(n_parts=1, n_codes=3))

# %% [markdown]
# One can read this. The head looks at `YY`, the start year, on all of these prompts. It has codes that hardly any but
# corrupted prompts get, where the year it looks at is `01`, and others for the years of clean prompts.
#
# The line *writes towards* is mostly noise: names and other words, hardly a year. What the latent adds to the stream is
# read by the MLPs behind it, and its direct effect on the output says little. Codes show what a head hears; they do not
# show what is done with it.

# %% [markdown]
# ## The control: autoencoders that learned nothing
#
# Did training find these kinds of prompts, or would any cut through the head's outputs do? The same score is always
# measured with **untrained** autoencoders as well, whose directions are random. It is the number to beat.

# %%
control = scores.settings["untrained"]
rows = [(name, value, control["values"][name]) for name, value in scores.strongest(10)]
print(f"rank correlation of trained and untrained, over all parts: {control['rank_correlation']:.2f}")
pd.DataFrame(rows, columns=["part", "trained", "untrained"]).set_index("part").round(2)

# %% [markdown]
# It is not beaten. Random directions put the parts into nearly the same order. So the *ranking* comes from how far a
# head's outputs lie apart on the two kinds of prompts, and not from anything that the autoencoder learned.
#
# ## Is this the circuit?
#
# For that we ask the model: *patch* each head, that is, give it the output that it has on the corrupted prompt, and
# measure how far the metric falls. On other prompts, and for heads alone (codes of MLPs and of heads are not of one
# size).

# %%
measured = discover(model, greater_than(model, n_prompts=48, seed=1), "patching")
probe = discover(model, task, "probe", seed=0)
heads = [name for name in scores.names if name.startswith("a")]


def of_heads(values):
    """Magnitudes of the heads, in one order."""
    return np.array([abs(values[name]) for name in heads])


by_name = {
    "codes-change": of_heads(dict(zip(scores.names, scores.values, strict=True))),
    "the same, untrained": of_heads(control["values"]),
    "a linear probe": of_heads(dict(zip(probe.names, probe.values, strict=True))),
}
effect = of_heads(dict(zip(measured.names, measured.values, strict=True)))

figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
for panel, (name, values) in zip(panels, by_name.items(), strict=True):
    panel.scatter(values, effect, s=28, facecolor="none", edgecolor="#0072B2")
    panel.set_title(f"{name}: Spearman {spearmanr(values, effect).statistic:.2f}", fontsize=10)
    panel.set_xlabel("score of a head")
_ = panels[0].set_ylabel("change of the metric if patched")

# %% [markdown]
# On greater-than the order is good: most heads that matter are on the right of each panel. But there are heads on the
# right that hardly matter, the untrained control does about as well, and so does a linear probe, which is simpler still.
# A head that *hears* of the year need not *act* on it.
#
# ## And where the label is not in one prompt
#
# Another score, `codes`, asks whether the code of a single prompt tells if that prompt is clean or corrupted, beyond
# chance. On greater-than it can: corrupted years end in 01. In indirect object identification it cannot, because clean
# and corrupted prompts are drawn from the same names. There is nothing to see in one prompt alone, and the score should
# say so.

# %%
names = ioi(model, n_prompts=100, seed=0)
rows = []
for one in (task, names):
    for method in ("codes", "codes-change"):
        found = discover(model, one, method, seed=0)
        (best, value), *_ = found.strongest(1)
        rows.append((one.name, method, len(found.settings["selected"]), best, value))
columns = ["task", "method", "parts that stand out", "strongest", "its score"]
pd.DataFrame(rows, columns=columns).set_index(["task", "method"]).round(2)

# %% [markdown]
# On IOI `codes` selects nothing, which is right, and is an answer to another question than "what is the
# circuit?". `codes-change` compares a prompt with its own partner and selects most of the model, since nearly every part
# hears that names changed.
#
# ## What one may conclude, and what not
#
# * **May:** use codes to *look*. `explain_codes` sorts a head's prompts into kinds, with where it looks on each, in
#   seconds and without a gradient. That is often the fastest first idea of what a head does.
# * **Not:** take a ranking by codes for a circuit. Over the built-in model's four tasks trained codes rank heads no
#   better than untrained ones or than the plain distance between clean and corrupted outputs. The tables, with 20 seeds,
#   are in `benchmarks/results/codes.md`.
# * **Not:** call a code a concept because its examples look alike. Cut the head, or edit where it looks (notebook 6), and
#   see what the model then says.
