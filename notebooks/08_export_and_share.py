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
# # 8. Export and share
#
# You have a circuit. Somebody wants to look at it without installing anything, somebody else to load it into Gephi, a
# third to compare it with theirs from EAP-IG, and a page of your paper needs a picture. One call does each, and what can
# be read back is read back equal. This notebook saves one circuit in every way there is and checks that.

# %%
# %matplotlib inline
import json
import os
import tempfile
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd

import mechinterp as mi
from circuits import Circuit, attribution_graph, discover, evaluate, load_eap_ig, save_eap_ig, view
from circuits.export import FORMATS
from mechinterp.tasks import ioi

folder = tempfile.TemporaryDirectory()  # the last cell removes it
os.chdir(folder.name)

pd.set_option("display.max_colwidth", None)
model = mi.load("builtin")
task = ioi(model, n_prompts=32, seed=0)
scores = discover(model, task, "eap-ig")
circuit = scores.top(100)
report = evaluate(model, ioi(model, n_prompts=32, seed=1), circuit)
circuit.graph.update(report.facts)  # every file and picture says how faithful it is
circuit

# %% [markdown]
# ## In words
#
# Made by rules from the numbers, with nothing in it that was not measured, and with what is *not* known:

# %%
print(circuit.describe(report))

# %% [markdown]
# ## Every format
#
# The suffix chooses. A file is written whole or not at all.


# %%
def weights(graph):
    """The score of each edge."""
    return {edge: graph.edges[edge].get("weight") for edge in graph.edges_kept}


rows = []
for name, format in FORMATS.items():
    path = Path(f"ioi{format.suffix}")
    circuit.save(path)
    equal = "no, it is to look at"
    if format.read is not None:
        back = Circuit.load(path)
        equal = ", ".join(
            ["edges and scores equal"] * (weights(back) == weights(circuit)) + ["facts equal"] * (back.graph == circuit.graph)
        )
    rows.append((name, path.name, f"{path.stat().st_size / 1000:.0f} kB", format.what, equal))
pd.DataFrame(rows, columns=["format", "file", "size", "for", "read back"]).set_index("format")

# %% [markdown]
# Ours (`.json`) is the one to keep: it holds everything. The others hold what their formats can. `mechinterp export
# ioi.json ioi.graphml` does the same on the command line, without loading a model or torch.
#
# Since a circuit *is* a networkx graph, there is often no need for a file. For other tools, with names for nodes and
# plain attributes:

# %%
graph = circuit.to_networkx()
print(graph)
print(graph.nodes["a2.h5"])
print("all that feeds a2.h5:", *sorted(nx.ancestors(graph, "a2.h5")))

# %% [markdown]
# ## A page to look around in
#
# `view` writes one HTML file. It needs no server and no network, so it can be mailed. Layers go up from the input
# to the logits; filter by score, sign, path and position, click a part to leave what leads to it and from it, hover for
# where a head looks. With the model and the task its cards show attention on real
# prompts:

# %%
page = view(circuit, model, task, path="ioi.html")
print(f"{page.name}: {page.stat().st_size / 1000:.0f} kB")

# %% [markdown]
# Open `ioi.html` in a browser; there is no more to it. Without a path, `view(circuit)` opens a temporary one.
#
# ## For Markdown pages: Mermaid
#
# GitHub and many wikis draw this text as a picture. Small circuits only: here the twelve strongest edges.

# %%
small = scores.top(12)
small.save("small.mmd")
print(Path("small.mmd").read_text())

# %% [markdown]
# ## Attribution graphs: circuit-tracer's and Neuronpedia's viewers
#
# Those pages show a graph *on one prompt*, with a column for each token. So there are two ways.
# `circuit.save("x.attribution-graph.json")` keeps the circuit as it is. `attribution_graph` puts it on a prompt of your
# task, where each edge has what it carries there:

# %%
found = attribution_graph(model, task, circuit, prompt=0)
found.save_in("served")
metadata = found.document["metadata"]
print("".join(metadata["prompt_tokens"]))
print(f"{len(found.document['nodes'])} nodes, {len(found.document['links'])} links")
print(sorted(path.name for path in Path("served").iterdir()))

# %%
pd.DataFrame(found.document["nodes"])[["node_id", "clerp", "feature_type", "layer", "ctx_idx"]].tail(6)

# %% [markdown]
# The folder is what such viewers serve: `circuit-tracer start-server --graph_file_dir served`.
#
# ## EAP-IG and MIB
#
# EAP-IG's JSON holds *every* edge with its score, and MIB's benchmark ranks such files. Both ways:

# %%
save_eap_ig(scores, "ioi-scores.json")
again = load_eap_ig("ioi-scores.json")
edges = json.loads(Path("ioi-scores.json").read_text())["edges"]
print(f"{len(edges):,} edges; scores read back equal: {np.array_equal(again.values, scores.values)}")

# %% [markdown]
# One trap: a sign. Here, and in EAP-IG run with a *loss*, positive means that the edge helps. EAP-IG run with a *metric*,
# as in MIB's own example file, means the opposite. A file that we did not write does not say, so you are asked:

# %%
document = json.loads(Path("ioi-scores.json").read_text())
del document["mechinterp"]  # as another program would have written it
Path("theirs.json").write_text(json.dumps(document))
try:
    load_eap_ig("theirs.json")
except mi.MechinterpError as problem:
    print(f"{type(problem).__name__}: {problem}")

# %% [markdown]
# ## The report
#
# A picture of a circuit does not say how far to trust it; the report does.

# %%
report.save("report.json")
report

# %%
os.chdir(Path(folder.name).parent)
folder.cleanup()

# %% [markdown]
# ## What to send along
#
# * To look at: `view(...)`, one HTML file. For print: `circuit.save("ioi.pdf")`.
# * To go on with: `circuit.save("ioi.json")` and `scores.save("scores.json")`.
# * With either: the report, or at least its line on faithfulness with the ablation, the method and the number of prompts.
#   The `.json` carries these as facts, and the viewer shows them.
