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
# # 4. Sparse autoencoders on every head, and how to read a latent
#
# Notebook 1 ended with a head, `a2.h5`, that looks at the name of the one who acts, and without which half of the behaviour
# is gone. Where it looks, we know. **What does it write?** 16 numbers at each position, and no single one means anything.
#
# A sparse autoencoder (SAE) rewrites such a vector as a sum of a few out of many learned directions, its *latents*. The
# hope is that one latent is one thing. We train one for each of the 32 heads, all at once, check what they lose, and read a
# single latent from end to end: when it fires, what makes it fire, what it does.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Markdown

import mechinterp as mi
import saes
from mechinterp.tasks import ioi

model = mi.load("builtin")

# %% [markdown]
# ## Train
#
# A corpus of IOI prompts, clean and corrupted; `fresh` is for measuring. `"z.*.h*"` names the output of every head, before
# it is projected into the residual stream. `stream` runs the model once for all of them, and one training loop walks 32
# autoencoders side by side: top-k, 128 latents, 4 of them open at a position.

# %%
corpus = saes.corpus_of_tasks(ioi(model, n_prompts=1000, seed=0))
fresh = saes.corpus_of_tasks(ioi(model, n_prompts=150, seed=1))
activations = saes.stream(model, corpus, ["z.*.h*"])
autoencoder = saes.train(activations, architecture="topk", d_sae=128, k=4, n_rows=60_000, seed=0, progress=False)
print(f"{len(autoencoder.places)} autoencoders, {autoencoder.d_in} to {autoencoder.d_sae} latents each")

# %% [markdown]
# ## What do they lose?
#
# An SAE explains an activation only as far as it reproduces it. Reconstruction error is the lesser test. The better one is to
# **splice** the reconstruction into the model in place of the activation and to see what becomes of its predictions.

# %%
some = slice(0, 60)
report = saes.evaluate(model, autoencoder, fresh.tokens[some], keep=fresh.keep[some], with_cosines=False)
Markdown(str(report))

# %% [markdown]
# * **L0** is 4 by construction, **var. expl.** the share of variance reproduced: somewhat more than half. These are small
#   autoencoders, trained for seconds.
# * **KL rec.** is the share of the damage of mean ablation that the reconstruction avoids: 1 would be as good as the
#   activation, 0 no better than a constant.
# * Shares of cross-entropy are *undefined* for many single heads, where even mean ablation does no harm beyond noise, and may
#   exceed 1. Most of the loss on this text is about words that nobody could know (which gift, which place), so KL from
#   the model's own predictions is the number to trust.
# * The last row puts all 32 in at once. Their errors add up: compare its KL with that of single heads.
#
# ## Does the behaviour survive?

# %%
task = ioi(model, n_prompts=150, seed=1)
prompts = task.prompts
no_bos = prompts.clean != model.tokenizer.bos_id
edits = {
    "the model": {},
    "SAE at a2.h5": saes.spliced(autoencoder.group("z.2.h5"), where=no_bos),
    "SAEs at all 32 heads": saes.spliced(autoencoder, where=no_bos),
    "a2.h5 switched off": mi.scale_heads({"a2.h5": 0.0}),
}
for name, edit in edits.items():
    logits, _ = model.run(prompts.clean, patch=edit, logits_at=prompts.end)
    metric = task.metric(logits, prompts)
    print(f"{name:22} logit difference {metric.mean():5.2f}, right on {(metric > 0).float().mean():4.0%}")

# %% [markdown]
# Nearly all that `a2.h5` does for the task passes through four latents at a time, though not much more than half of its
# variance does. So they are worth reading.
#
# ## Read one latent
#
# ### When does it fire?
#
# The latents of `z.2.h5` by their largest activation on fresh prompts. We take the first.

# %%
place = "z.2.h5"
one = autoencoder.group(place)
examples = saes.find_examples(model, one, fresh.tokens, keep=fresh.keep, n_top=8, n_sampled=0, progress=False)
latent = max(examples, key=lambda found: found.maximum)
print(f"latent {latent.latent} of {place}: active at {latent.density:.1%} of positions, at most {latent.maximum:.2f}\n")
for prompt, position, value in zip(latent.prompt, latent.pos, latent.activation, strict=True):
    shown = model.tokenizer.decode(fresh.tokens[prompt, 1 : position + 1].tolist())
    print(f"{value:5.2f}  {shown}")

# %% [markdown]
# It fires near the end, at the same word (*to*) nearly each time, so this word is not what it is about. Look at **who
# acts** in the strongest examples, and at the weaker ones for exceptions.
#
# ### What makes it fire?
#
# A head's output is a weighted sum over the positions that it looks at, and a latent's pre-activation is a product with that
# sum. So it splits **exactly** into one number a source position: direct feature attribution (DFA; Kissane et al. 2024,
# arXiv:2406.17759).

# %%
attribution = saes.dfa(model, one, fresh.tokens[latent.prompt], [latent.latent], queries=latent.pos[:, None])
by_source = attribution.by_source[:, 0, 0]  # example, position
for prompt, of_positions, whole in zip(latent.prompt, by_source, attribution.pre_activations[:, 0, 0], strict=True):
    position = int(of_positions.argmax())
    word = model.tokenizer.strings([int(fresh.tokens[prompt, position])])[0]
    print(f"{float(of_positions[position] / whole):4.0%} of {whole:.2f} from {word!r} at position {position}")

# %%
prompt, position = int(latent.prompt[0]), int(latent.pos[0])
strings = model.tokenizer.strings(fresh.tokens[prompt, 1 : position + 1].tolist())
figure, axes = plt.subplots(figsize=(8, 1.8), dpi=110, layout="constrained")
axes.bar(range(position), by_source[0, 1 : position + 1], color="#0072B2")
axes.set_xticks(range(position), strings, rotation=45, ha="right", fontsize=8, parse_math=False)
axes.spines[["top", "right"]].set_visible(False)
axes.set(ylabel="contribution", title=f"latent {latent.latent} of {place} at the last token: where its input comes from")
plt.close(figure)
figure

# %% [markdown]
# Practically all of it comes from one position, the name mentioned last, of the one who **acts**. Whether that name was there
# before makes no difference: the strongest example is a corrupted prompt, in which it was not.
#
# ### What does it do?
#
# The latent's direction, projected to the vocabulary: which words does it raise, which does it lower, directly?

# %%
effects = saes.top_tokens(model, autoencoder, [latent.latent], n=6, place=place)
for title, ids, values in (("raises", effects.top, effects.top_effects), ("lowers", effects.bottom, effects.bottom_effects)):
    pairs = zip(model.tokenizer.strings(ids[0].tolist()), values[0].tolist(), strict=True)
    print(title, *(f"{word!r} {value:+.1f}" for word, value in pairs), sep="   ")

# %% [markdown]
# The name of the strongest examples is first among the words that it **lowers**. The others are a mixed lot, and nearly as
# strong: 16 numbers cannot point at one of 943 words alone. Most of them are not in question after *to*. The story so far:
# *the one who acts is this one, so do not say this name*.
#
# ### Is that so? Cut the latent
#
# The story predicts: without this latent, prompts in which *this* name acts lose part of their logit difference, and
# others lose next to nothing. `with_error=True` adds what the SAE misses, so that nothing but the edit shows.


# %%
def without_it(_, latents):
    latents[..., latent.latent] = 0
    return latents


task = ioi(model, n_prompts=1500, seed=3)
prompts = task.prompts
cut = saes.spliced(one, with_error=True, edit=without_it, where=prompts.clean != model.tokenizer.bos_id)
before, after = (task.metric(model.run(prompts.clean, patch=patch, logits_at=prompts.end)[0], prompts) for patch in ({}, cut))
subjects = prompts.clean[range(len(prompts)), prompts.positions["S2"]]
lost = {int(name): float((before - after)[subjects == name].mean()) for name in subjects.unique()}
for name in sorted(lost, key=lost.get, reverse=True)[:6]:
    where = subjects == name
    print(f"{model.tokenizer.strings([name])[0]:12} acts in {int(where.sum()):3} prompts, which lose {lost[name]:5.2f} logits")
rest = sorted(lost.values())[:-6]
print(f"each of the other {len(rest)} names: {min(rest):.2f} to {max(rest):.2f}")

# %% [markdown]
# That is the story, and a correction. The prompts of *Christine* lose more than a logit and those of nearly all names nothing.
# But there is a **second name**, Laura, which was already among the weaker examples and among the words lowered. Names have to
# share where latents are few and some are needed for other words: this one serves two. Whoever had read only the top examples
# would have called it "the Christine latent", and been half right.
#
# ## Is one head the right unit?
#
# We asked one head at a time. Kissane et al. train on all heads of a layer concatenated, and let the SAE find out what
# belongs together. Then each latent has **head shares**, by the norm of its decoder at each head:

# %%
joint = saes.train(
    saes.stream(model, corpus, ["z.2"]), architecture="topk", d_sae=512, k=8, n_rows=100_000, seed=0, progress=False
)
shares = saes.head_shares(joint, model.config.d_head)[0]
print("mean share of each head:", *(f"h{head} {share:.2f}" for head, share in enumerate(shares.mean(0).tolist())))
print(f"the most that one head has of any latent: {float(shares.max()):.2f}; spread evenly it would be {1 / 8:.3f}")

# %% [markdown]
# Nothing in this layer belongs to one head: every latent is spread over several. Who wants to know what *this head* does
# trains on the head alone, who wants to know what *the layer* says trains on the layer, and the two will not show the same
# latents. The unit is a choice, and part of the result.
#
# ## Everything at once, to click through
#
# `write_dashboard` makes one HTML file that opens anywhere: every latent with its top examples coloured token by token,
# DFA, logit effects and histogram.

# %%
folder = Path(tempfile.mkdtemp())
saes.write_dashboard(
    model, autoencoder, fresh.tokens, folder / "a2h5.html", place=place, n_latents=30, keep=fresh.keep, progress=False
)
print(f"a2h5.html, {(folder / 'a2h5.html').stat().st_size / 1e6:.1f} MB: open it in a browser")

# %% [markdown]
# ## What may be concluded
#
# * The head `a2.h5` writes, at the end of the prompt, *who acts*, in a form that lowers that name. Example, source,
#   effect and ablation agree, and each could have said otherwise.
# * It holds for **one** latent of **one** small SAE on **this** text. Another seed gives other latents: some of them share
#   a name, some serve two. An SAE finds a useful dictionary; that it is *the* one is not to be had.
# * What the reconstruction loses is not explained by any latent. Keep the splice beside every story.
#
# On the command line: `mechinterp sae train --architecture topk --k 4`, then `sae evaluate`, `sae dashboard`, `sae frontier`.
