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
# # 6. Re-use and repair
#
# Two questions about one model that does four tasks.
#
# 1. **Re-use.** Does it do them with the same parts? If every task has parts of its own, each circuit has to be found
#    anew. If parts are shared, what we learn from one task helps with the next.
# 2. **Repair.** Here is a prompt that it gets wrong. Can we put it right by telling a few heads where to look, and what
#    did that show?
#
# Both follow Merullo, Eickhoff and Pavlick ([2024](https://arxiv.org/abs/2310.08744)), who asked them of GPT-2 medium.

# %%
# %matplotlib inline
import json
import random
import tempfile
from pathlib import Path

import pandas as pd
import torch
from IPython.display import Markdown

import mechinterp as mi
from circuits import (
    compare_tasks,
    draw_repair,
    draw_reuse,
    fitness,
    measure_signatures,
    propose,
    repair,
    same_role,
    score_tasks,
)
from mechinterp.tasks import colored_objects, docstring, greater_than, ioi

pd.set_option("display.max_colwidth", None)
model = mi.load("builtin")
makers = (ioi, greater_than, colored_objects, docstring)
searched = [make(model, n_prompts=24, seed=0) for make in makers]
fresh = [make(model, n_prompts=24, seed=1) for make in makers]
pd.DataFrame([(task.name, task.text(0), task.metric_name) for task in searched], columns=["task", "a prompt", "metric"])

# %% [markdown]
# ## What the circuits of four tasks share
#
# `compare_tasks` scores every edge of the model on every task in the same way, cuts all rankings at the same sizes, and
# counts common edges. Then it runs each task's circuit on the other tasks' *fresh* prompts.

# %%
reuse = compare_tasks(model, searched, "eap-ig", on=fresh, sizes=(0.05, 0.1))
title, columns, rows = reuse.tables()[0]
print(title)
pd.DataFrame([row for row in rows if row[0] == "5 %"], columns=columns)

# %% [markdown]
# Read the columns from left to right, because two of them would mislead you.
#
# * *shared* of 75 edges sounds like a lot, and *by chance* (any 75 edges) makes all of it look miraculous. But circuits
#   have hubs: the input and the first MLP are in all of them, and any two graphs with such hubs overlap.
# * *same degrees* is the honest comparison: random circuits in which each part keeps as many edges as it has. What is
#   left beyond that is sharing that hubs do not explain. IOI and docstring have it clearly, greater-than with each of
#   them a little. The pairs of colored objects have about what their hubs give them.
#
# ## Shared parts are not shared function
#
# Each row is a circuit, each column the task it was run on. 1 is the whole model, 0 is no edge at all.

# %%
title, columns, rows = reuse.tables()[-2]
print(title)
pd.DataFrame(rows, columns=columns).set_index(columns[0])

# %%
draw_reuse(reuse, dpi=80)

# %% [markdown]
# In the table a twentieth of the edges carries nearly all of its own task (the diagonal), but for docstring, which needs
# more. Off the diagonal there is less, and often nothing: greater-than and colored objects have thirty edges in common,
# and the circuit of the one does not do the other's task at all. In circuits twice as large, as the picture shows them,
# more carries over, most of all between IOI and docstring, who share most. So report overlap and faithfulness together,
# and the size.
#
# ## Do shared heads play the same role?
#
# `measure_signatures` describes each head by what it does on a task: where it looks by named position, whether what it
# writes speaks for or against the word it looks at, and so on. `same_role` finds for each head of one circuit the most
# alike of the other. We take the six strongest heads of each task by exact patching.

# %%
patched = score_tasks(model, searched, "patching")
strongest = {}
for name, found in patched.items():
    strongest[name] = [part for part, _ in found.strongest(len(found)) if part.startswith("a")][:6]
signatures = measure_signatures(model, searched)
Markdown(str(same_role(signatures, "ioi", "docstring", strongest["ioi"], strongest["docstring"])))

# %%
Markdown(str(same_role(signatures, "ioi", "colored-objects", strongest["ioi"], strongest["colored-objects"])))

# %% [markdown]
# *Itself there* is the test of a role: 1 means that no head of the model is, on the other task, more like this head than
# the head itself. One head, `a2.h5`, is among the strongest of both IOI and docstring and is itself on both. What does it
# do?

# %%
lines = {task: signatures.signature("a2.h5", task) for task in ("ioi", "docstring")}
seen = {"ioi": "attention: END -> S2", "docstring": "attention: END -> B_doc"}
print(*(f"{task}, {feature}: {lines[task][feature]:.2f}" for task, feature in seen.items()), sep="\n")
pd.DataFrame(lines).loc[["writes: what it attends to", "writes: the answer", "logits: what it attends to"]].round(1)

# %% [markdown]
# On both tasks all of its attention is on the word that would be wrong next: the giver's second mention (`S2`), and the
# argument that was documented last (`B_doc`). And what it writes speaks *against* the word that it looks at. One could
# call that suppression; the toolkit gives the numbers and leaves the name to you.
#
# Colored objects is the other way round. Its circuit shares no more *edges* with IOI's than chance, but some of the
# strongest *heads* are the same, with a role more alike than heads drawn at random. Which level you compare on decides
# what you find. And 6 heads of 32 are few: look at the p-values.

# %% [markdown]
# ## Repair: a prompt that the model fails
#
# The model names the colour of a thing almost without error. Mention one more thing *after* the question, and it breaks.
# The prompts go through a file, as yours would (notebook 7). In the corrupted prompt another thing is asked for, so
# `CHANGED`, the first token that differs, is the thing in question.

# %%
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "brown", "black"]
THINGS = ["pencil", "pen", "cup", "plate", "jug", "mug", "puzzle", "leash", "bottle", "ball", "bowl", "hat", "book", "box"]


def disturbed(n, seed):
    """Pairs of prompts with a fourth thing mentioned after the question."""
    rng = random.Random(seed)
    for _ in range(n):
        things, colours, (asked, other) = rng.sample(THINGS, 4), rng.sample(COLOURS, 4), rng.sample(range(3), 2)
        a, b, c, d = (f"a {colour} {thing}" for colour, thing in zip(colours, things, strict=True))
        text = f"Q: Here on the table lie {a}, {b}, and {c}. What is the color of the {{}}? Next to me is {d}.\nA:"
        wrong = [f" {colour.title()}" for number, colour in enumerate(colours) if number != asked]
        yield {
            "clean": text.format(things[asked]),
            "corrupted": text.format(things[other]),
            "answers": [f" {colours[asked].title()}"],
            "foils": wrong,
        }


def as_task(name, n, seed):
    """The prompts by way of a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in disturbed(n, seed)))
        return mi.from_file(model, path)


to_search, to_measure = as_task("disturbed", 64, seed=0), as_task("disturbed-fresh", 192, seed=1)
as_trained = colored_objects(model, n_prompts=64, seed=2)
print(to_measure.text(0))
print()
right, disturbed_right = fitness(model, as_trained), fitness(model, to_measure, allow_unsolved=True)
print(f"right as trained: {right.accuracy:.0%}, disturbed: {disturbed_right.accuracy:.0%}")

# %% [markdown]
# `propose` makes each head in turn look at the question from the last token, keeps the one that helps most, and adds
# others for as long as they help. We say nothing of the answer: only *look at what is asked for*. Then `repair` measures
# the edit on prompts that the search has not seen, and puts as many **random heads** in their place, twenty times.

# %%
proposal = propose(model, to_search, attention={"question": ["CHANGED"]}, n=3, progress=False)
repaired = repair(model, to_measure, **proposal.edit, n_random=20, seed=0, progress=False)
Markdown(str(repaired))

# %%
draw_repair(repaired, dpi=80)

# %% [markdown]
# Three heads, told to look at the question, and every prompt is right; random heads that are told the same do nothing.
# So everything behind these heads was in order. What went wrong was where they looked.
#
# Here is the same edit as an intervention, which works wherever a model runs, on the first six prompts:

# %%
first = to_measure.prompts[torch.arange(6)]
edit = mi.attend_to(proposal.edit["heads"]["question"], at=first.end, to=first.positions["CHANGED"][:, None])
said = {"answer": first.answer[:, None]}
for name, patch in (("unedited", None), ("edited", edit)):
    said[name] = mi.generate(model, first.clean, 1, ends=first.end, patch=patch)
pd.DataFrame({name: model.tokenizer.strings(tokens[:, 0].tolist()) for name, tokens in said.items()})

# %% [markdown]
# ## What does the edit break?
#
# An edit that fixes what was broken may break what worked. The same heads, made to look at the question (`query`) in the
# task as the model was trained on it:

# %%
unharmed = repair(model, as_trained, proposal.groups, {"question": ["query"]}, n_random=5, progress=False)
pd.DataFrame(
    [(one.name, f"{one.accuracy.value:.0%}", one.fixed, one.broken) for one in unharmed.conditions],
    columns=["edited", "accuracy", "fixed", "broken"],
).set_index("edited")

# %% [markdown]
# None of these. Where nothing stands after the question, the heads may as well look at it.
#
# ## What one may conclude, and what not
#
# * **May:** that the failure lies in the attention of these heads at the last token, and that the rest of the mechanism
#   is intact. Fresh prompts and random heads stand behind it.
# * **Not:** that the model is now better. The edit is told which token is the question. A model that could find it would
#   not have failed.
# * **Not:** that repair always works, or works as fully as here. Of twelve ways to break this model's tasks two resisted,
#   and others were mended by half; `benchmarks/results/repair.md` has them all, beside what was tried and did not even
#   break it.
# * On re-use: give overlap *beside* same-degree chance and *beside* faithfulness across tasks, say at which level (edges,
#   nodes, heads), and at which size. `benchmarks/results/reuse.md` has all of them, and a control with random weights.
