"""What a contextual decomposition of all heads costs, and what it spares against carrying both parts from the start.

    python -m benchmarks.decomposition_cost          # ten minutes on one core
    python -m benchmarks.decomposition_cost memory   # peak memory alone

GPT-2-small shape, random weights, 16 x 16 tokens, one thread; four heads of each layer are the sources, as all heads of a
layer cost the same. A *forward* is one plain pass of our engine over the same prompts, logits at END alone. The two-part
pass carries relevant and irrelevant from the embedding on, as the papers write it, for one source at a time, up to the
last residual stream (not counting its unembedding); it costs the same for each. Products are counted by torch's own
counter; memory is that of all pairs of the 144 heads.
"""

import sys
from collections.abc import Callable, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.subjects import GPT2_SMALL, hooked, ours, random_task
from circuits.ablation import replacement_for
from circuits.discovery.cdt_table import relevance_table
from mechinterp.decomposition import RULE_SETS, Split, Totals, both_parts, mean_reference, parse_sources, propagate
from mechinterp.sites import Site

RULES = ("tail", "paper", "frozen")
LOGITS, LAST, HEADS = [Site("logits")], [Site("resid_post", 11)], [Site("z", layer) for layer in range(1, 12)]
SOURCES = [f"a{layer}.h{head}" for layer in range(12) for head in range(4)]  # the heads of a layer cost the same


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    if arguments[:1] == ["peak"]:
        print(measure.peak_above(_ready(arguments[1])))
        return
    facts: dict[str, object] = {"GiB": {rules: float(_peak(rules)) for rules in RULES}}
    rows = [(f"{rules}: peak above weights and prompts, GiB", "", f"{facts['GiB'][rules]:.2f}") for rules in RULES]  # type: ignore[index]
    if arguments[:1] != ["memory"]:
        rows += costs(facts)
    measure.save("decomposition-cost", facts)
    print(measure.table(rows))


def costs(facts: dict) -> list[tuple[str, str, str]]:
    model, task = ours(hooked(GPT2_SMALL)), random_task()
    prompts, n = task.prompts, len(SOURCES)
    reference = mean_reference(model, prompts.corrupted)
    sources = parse_sources(model.config, SOURCES, *prompts.clean.shape)

    def forward() -> None:
        model.run(prompts.clean, logits_at=prompts.end)

    def ours_to(targets: list[Site], rules: str) -> Callable[[], None]:
        def run() -> None:
            totals = Totals.of(model, prompts.clean, ends=prompts.end, logits_of=prompts.candidates, patterns=rules == "frozen")
            for _, _, found in propagate(totals, sources, targets, RULE_SETS[rules], reference=reference):
                read(found, targets)

        return run

    def two_parts(targets: list[Site], rules: str) -> Callable[[], None]:
        one = sources[:1]  # whatever its layer, it costs the same

        def run() -> None:
            read(both_parts(model, prompts.clean, one, targets, RULE_SETS[rules], reference=reference), targets)

        return run

    cases = {"forward": forward}
    for rules in RULES:
        cases |= {f"{rules} to logits": ours_to(LOGITS, rules), f"{rules} to all": ours_to([*LOGITS, *HEADS], rules)}
        cases[f"{rules} two parts, logits"] = two_parts(LAST, rules)
        cases[f"{rules} two parts, all"] = two_parts([*LAST, *HEADS], rules)
    times = measure.interleave(cases, rounds=3, warm_up=False)
    flops = {name: _flops(case) for name, case in cases.items()}
    rows = []
    for rules in RULES:
        for where, what in (
            ("logits", "heads of all layers -> logits"),
            ("all", "heads of all layers -> logits and every later head"),
        ):
            name = f"{rules} to {where}"
            a_source = times[name].per(times["forward"])
            counted, seconds = flops[name] / flops["forward"] / n, a_source["cpu"] / n
            spared = times[f"{rules} two parts, {where}"].per(times[name])
            facts[name] = {"forwards_counted": counted, "forwards_cpu": seconds, "two_parts_per_ours": spared["cpu"] * n}
            spread = f"{spared['cpu_lowest'] * n:.2f} to {spared['cpu_highest'] * n:.2f}"
            rows.append((f"{rules}: {what}, forwards a source", "≤ 0.6", f"{counted:.3f} by products, {seconds:.3f} by CPU"))
            rows.append((f"{rules}: {what}, two-part pass : ours", "≥ 4", f"{spared['cpu'] * n:.2f} CPU ({spread})"))
    facts |= {"times": {name: timing.cpu for name, timing in times.items()}, "flops": flops}
    return rows


def read(found: Mapping[Site, Split], targets: list[Site]) -> None:
    """How relevant a source is to each target, as a search asks."""
    for site in targets:
        found[site].relevant.abs().sum(-1)


def _flops(case: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        case()
    return counter.get_total_flops()


def _peak(rules: str) -> str:
    return measure.in_a_process("benchmarks.decomposition_cost", "peak", rules)


def _ready(rules: str) -> Callable[[], object]:
    """All pairs of heads, by the table that the search makes."""
    model, task = ours(hooked(GPT2_SMALL)), random_task()
    replacement_for(model, task, "mean")
    return lambda: relevance_table(model, task, rules=rules, ablation="mean")


if __name__ == "__main__":
    main(sys.argv[1:])
