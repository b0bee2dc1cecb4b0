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
# # 7. Your own prompts and your own model
#
# So far the task and the model were ours. Here both are yours: a file of prompts, one JSON object a line, and a directory
# with a checkpoint. The question that decides everything comes first: **does the model do the task at all?** A circuit
# for something that a model does not do is an hour lost and sometimes a finding that is none.

# %%
# %matplotlib inline
import json
import os
import random
import tempfile
from pathlib import Path

import pandas as pd
import torch
import transformers

import mechinterp as mi
from circuits import discover, evaluate, fitness

transformers.utils.logging.disable_progress_bar()
folder = tempfile.TemporaryDirectory()  # the last cell removes it
os.chdir(folder.name)

model = mi.load("builtin")

# %% [markdown]
# ## A first file of prompts
#
# Each line has a *clean* prompt, a *corrupted* one that differs in what matters and nowhere else, the right answers and
# the wrong ones (*foils*). Both prompts must have equally many tokens; answers and foils are one token each, leading
# space included.
#
# First of all, read your words as the model does:

# %%
tokenizer = model.tokenizer
print(tokenizer.decode(tokenizer.encode("Then, Mary took a coat and John took a watch. Now the coat belongs to")))

# %% [markdown]
# `<unk>` stands where this model's vocabulary of some 900 words has none. (A large model's tokenizer has pieces for
# everything; there the trap is a word of several pieces.) So, in words that it knows: who is shown something here?

# %%
rng = random.Random(0)
NAMES = ["Mary", "John", "David", "Jennifer", "Michael", "Jessica", "Daniel", "Robert"]
GIFTS = ["ring", "book", "letter", "ticket", "key", "map", "coat", "watch"]


def write(path, rows):
    """One JSON object a line."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def late(n):
    """Two people met, one was late; later that one, or the other, shows something."""
    for _ in range(n):
        (one, other), gift = rng.sample(NAMES, 2), rng.choice(GIFTS)
        text = f"Then, {one} and {other} met at the school. {other} was late. Later, {{}} showed the {gift} to"
        yield {"clean": text.format(other), "corrupted": text.format(one), "answers": [f" {one}"], "foils": [f" {other}"]}


write("late.jsonl", late(48))
print(Path("late.jsonl").read_text().splitlines()[0])
task = mi.from_file(model, "late.jsonl")
task

# %% [markdown]
# Then ask for `fitness`, as every search does before it begins:

# %%
try:
    fitness(model, task)
except mi.MechinterpError as problem:
    print(f"{type(problem).__name__}: {problem}")

# %% [markdown]
# Refused, and rightly. The model knows this task in one form, with two mentions of the giver, and a third throws it off:
# it does worse than a guess. To find out *why* a model fails, `allow_unsolved=True` searches all the same; notebook 6
# repairs a failure.
#
# ## A second try
#
# What can such a model do? Continue a list that it has seen before. Five things, then the first of them again; the
# corrupted prompt has another thing in the first list where the answer stood.

# %%
THINGS = ["pencil", "pen", "cup", "plate", "jug", "mug", "puzzle", "leash", "bottle", "ball", "bowl", "hat", "book", "box"]


def repeated(n, length=5):
    """Lists of things, and the first few of them again."""
    for _ in range(n):
        *things, another = rng.sample(THINGS, length + 1)
        asked = rng.randrange(2, length)
        changed = [another if place == asked else thing for place, thing in enumerate(things)]
        again = things[:asked]
        yield {
            "clean": " " + " ".join(things + again),
            "corrupted": " " + " ".join(changed + again),
            "answers": [f" {things[asked]}"],
            "foils": [f" {another}"],
        }


write("repeated.jsonl", repeated(48))
write("repeated-fresh.jsonl", repeated(48))
task, fresh = mi.from_file(model, "repeated.jsonl"), mi.from_file(model, "repeated-fresh.jsonl")
print(task.text(0))
print(f"right on {fitness(model, task).accuracy:.0%}; dropped: {task.notes['dropped'] or 'none'}")

# %% [markdown]
# That will do. From here on everything works as with the built-in tasks:

# %%
scores = discover(model, task, "eap-ig")
circuit = scores.top(60)
circuit

# %%
evaluate(model, fresh, circuit)

# %% [markdown]
# ## Your own model
#
# `mi.load` reads a directory that Hugging Face's `save_pretrained` wrote. To have one without a download we make a tiny
# Llama here: two layers of four heads that share two keys and values, rotary positions, RMSNorm, a gated MLP, weights
# drawn at random. It borrows the built-in model's tokenizer.

# %%
llama_tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=model.tokenizer.backend, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
)
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=len(llama_tokenizer),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=llama_tokenizer.bos_token_id,
    pad_token_id=llama_tokenizer.pad_token_id,
    eos_token_id=None,
)
llama = transformers.LlamaForCausalLM(config)
llama.save_pretrained("untrained-llama")
llama_tokenizer.save_pretrained("untrained-llama")

untrained = mi.load("untrained-llama")
tokens = task.prompts.clean
with torch.no_grad():
    torch.testing.assert_close(untrained.run(tokens)[0], llama(tokens).logits, atol=1e-5, rtol=0)
facts = ("n_layers", "n_heads", "n_key_value_heads", "normalization", "gated", "activation")
print({fact: getattr(untrained.config, fact) for fact in facts})

# %% [markdown]
# No error: our logits are Hugging Face's, within 0.00001. `docs/families.md` holds every family to that. Does this model
# do the task? `bos=True` because a checkpoint does not always say that it wants a first token; say it yourself if you
# know.

# %%
right = fitness(untrained, mi.from_file(untrained, "repeated.jsonl", bos=True), allow_unsolved=True).accuracy
print(f"right on {right:.0%}, where a guess between answer and foil is right on 50%")

# %% [markdown]
# A guess: its weights are random. (`fitness` refuses what is right on half of the prompts or fewer, so a guess with some
# luck passes. Look at the number, not only for an error.) So we train it, for some seconds, on lists of five things said
# twice.

# %%
ids = torch.tensor([tokenizer.encode(f" {thing}", bos=False)[0] for thing in THINGS])
optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
for _ in range(200):
    things = ids[torch.rand(64, len(ids)).argsort(1)[:, :5]]
    batch = torch.cat([torch.full((64, 1), tokenizer.bos_id), things, things], 1)
    logits = llama(batch).logits[:, 6:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 7:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
llama.save_pretrained("my-llama")
llama_tokenizer.save_pretrained("my-llama")

mine = mi.load("my-llama")
my_task = mi.from_file(mine, "repeated.jsonl", bos=True)
my_fresh = mi.from_file(mine, "repeated-fresh.jsonl", bos=True)
print(f"right on {fitness(mine, my_task).accuracy:.0%}")

# %% [markdown]
# Now the same two calls as above, on a model that the toolkit has never seen:

# %%
my_scores = discover(mine, my_task, "eap-ig")
my_circuit = my_scores.top(20)
my_circuit

# %%
evaluate(mine, my_fresh, my_circuit)

# %% [markdown]
# Names such as `a0.g1.v` in the list below are *groups*: heads that share a value read it once, so a circuit has one edge
# for it and not two.
#
# ## The circuit tells us something
#
# The textbook circuit for a repeated list has two layers: one head marks each word with the word before it, and an
# *induction head* of a later layer looks for that mark. Which layers does this circuit use?

# %%
pd.DataFrame(my_scores.strongest(8), columns=["edge", "fall of the logit difference if cut"]).set_index("edge").round(1)

# %%
prompts = my_task.prompts
_, cache = mine.run(prompts.clean, record=["pattern"])
rows = torch.arange(len(prompts))
looks = {}
for layer in range(2):
    pattern = cache[mi.Site("pattern", layer)][rows, :, prompts.end]  # from the last token: prompt, head, position
    for head in range(4):
        mean = [pattern[rows, head, prompts.end - back].mean().item() for back in range(6)]
        looks[f"a{layer}.h{head}"] = mean
pd.DataFrame(looks, index=[f"{back} back" for back in range(6)]).T.round(2)

# %% [markdown]
# Heads of layer 0 send the words straight on, and where they look is a matter of *distance*: four places back. In lists
# of five that is always the word that comes next. The model has learned no induction; it counts places. It does the task
# perfectly, for a reason that we did not mean. Such a reading is a guess until it is put to a test. This one predicts
# what happens with lists of six things: the model says the word four places back all the same, which is then one too far.

# %%
write("six.jsonl", repeated(48, length=6))
shares = {}
for name, one, bos in (("builtin", model, None), ("my-llama", mine, True)):
    for length, file in ((5, "repeated-fresh.jsonl"), (6, "six.jsonl")):
        prompts = mi.from_file(one, file, bos=bos).prompts
        said = one.run(prompts.clean, logits_at=prompts.end)[0].argmax(-1)
        hits = {"the answer": said == prompts.answer, "the word four back": said == prompts.clean[rows, prompts.end - 4]}
        shares[name, f"lists of {length}"] = {what: hit.double().mean().item() for what, hit in hits.items()}
pd.DataFrame(shares).T.round(2)

# %% [markdown]
# So it does. Faithfulness near 1 did not warn us, nor could it: the circuit is faithful to a model that does something
# else than we thought, on prompts that cannot tell the two apart.
#
# The built-in model's rows have a lesson, too. It prefers the answer to the *foil* on most prompts, and that is what
# `fitness` asked. The likeliest of *all* words is the answer far less often. A task asks what its foils ask, and no more.
#
# ## What is refused
#
# A model that the engine would not run *exactly* is refused by name, here a mixture of experts:

# %%
sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
experts = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
transformers.MixtralForCausalLM(experts).save_pretrained("experts")
try:
    mi.load("experts")
except mi.MechinterpError as problem:
    print(f"{type(problem).__name__}: {problem}")

# %%
os.chdir(Path(folder.name).parent)
folder.cleanup()

# %% [markdown]
# ## What to check first, in order
#
# 1. `print(task.text(0))`: are these your words, with no `<unk>`, and with the first token that the model was trained
#    with?
# 2. `task.notes["dropped"]`: how many pairs were left out, and why?
# 3. `fitness(model, task)`: does the model do it? On which kinds of prompts does it not?
# 4. Could it be right for another reason than you think? Change what should not matter and see.
# 5. Only then `discover`, and `evaluate` on prompts that the search has not seen.
#
# A `HookedTransformer` or `TransformerBridge` from your own notebook goes into `mi.load` as it is. Published prompt files
# (EAP-IG's csv, auto-circuit's JSON, MIB's rows) go into `mi.from_file` as they are.
