"""Circuits from discrete codes: which parts write something else on positive examples than on negative ones.

O'Neill & Bui 2024 (arXiv:2405.12522). No gradient and no ablation: one forward pass, an autoencoder trained on ten examples,
and counting. A code is watched and not changed, so that a score says what a part *knows*, not what it does. Four scores:

* ``"information"`` (the default): the mutual information of a part's code with the label, clean or corrupted, in nats, less
  what permuted labels give. It asks whether one prompt alone shows its label. Where clean and corrupted prompts are drawn
  from the same words (IOI with other names), no prompt need, and a part that carries the task may know nothing of it.
* ``"change"``: the share of pairs in which the corruption changes a part's code. It needs prompts that align, as our tasks'
  do, and no statistics: prompts that differ in one thing and codes that differ with it are cause and effect.
* ``"answer"``: the information of the code about the answer (of several the first), on clean prompts alone.
* ``"count"``: the published one: how many codes occur in positives and in no negative, less what permuted labels give. It
  favours parts that vary much; see ``benchmarks/results/codes.md``.

Beside every result stands its control: the same with autoencoders that were never trained (``settings["untrained"]``).
The change of a code is information, too: given the pair, a code tells which of the two prompts it is of exactly where the two
codes differ, so that ``I(label; code | pair)`` is ``log 2`` times the share of pairs in which it changes.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

from circuits.code_statistics import check_test
from circuits.coding import coded, examples_of
from circuits.discovery.code_scores import CODE_UNITS, facts_of, facts_of_control, in_scores, judge, known_score
from circuits.scores import Scores
from mechinterp.models.transformer import Transformer
from mechinterp.store import ActivationStore
from mechinterp.tasks.base import Task
from saes.codes import CodeSettings


def codes(
    model: Transformer,
    task: Task,
    *,
    score: str = "information",
    positions: str | Sequence[str] = "END",
    n_train: int = 10,
    d_sae: int = 16,
    k: int = 1,
    steps: int = 300,
    architecture: str = "topk",
    sparsity: float = 1.0,
    n_permutations: int = 1000,
    level: float = 0.05,
    seed: int = 0,
    store: ActivationStore | None = None,
    progress: bool = False,
) -> Scores:
    """What each head's and MLP's code tells, by ``score`` (a key of ``CODE_SCORES``); larger is more, and 0 what chance gives.
    The input scores 0: it is not coded.

    ``positions``: "END", a position that the task names, "mean" (over the prompt), or several, of which each part's best
    counts. ``n_train`` examples train the autoencoders, the task's other pairs are counted. ``k`` > 1: k-hot codes. The other
    settings are ``CodeSettings``. ``settings["selected"]`` names the parts that stand out, with no answer key: at a false
    discovery rate of ``level``, and above Otsu's cut. ``settings["p"]`` holds p-values, ``settings["untrained"]`` the control.

    Cost: one forward pass of clean and corrupted prompts, or none with a ``store`` that has them, then seconds. Raises
    ``SAEError`` for too few prompts and for parts that all write the same on every prompt, ``CircuitError`` for a score that
    there is not, no permutations, and a ``level`` that is not between 0 and 1.
    """
    check_test(n_permutations, level)
    measure = known_score(score)
    made = CodeSettings(n_train, d_sae, k, steps, architecture=architecture, sparsity=sparsity, seed=seed)
    examples = examples_of(model, task, positions, n_train, seed=seed, store=store)
    trained, control = (coded(examples, replace(made, trained=by), progress=progress) for by in (True, False))
    found, untrained = (judge(measure, one, n_permutations, level, seed) for one in (trained, control))
    facts = {"score": score, "positions": list(examples.places), **asdict(made)}
    facts |= {"n_counted": len(examples.rows), "n_permutations": n_permutations, "level": level, **trained.facts}
    facts |= facts_of(examples, found) | {"untrained": facts_of_control(examples, found, untrained)}
    name = "codes" if score == "information" else f"codes-{score}"
    return in_scores(examples, found.values, name, CODE_UNITS[score], facts)
