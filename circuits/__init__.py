"""Find, draw, measure and save the circuit in a transformer that carries a task.

    from circuits import discover, evaluate

    scores = discover(model, task, "eap-ig")
    circuit = scores.top(200)
    report = evaluate(model, task, circuit)
    circuit.save("ioi.json")

The public names stand in ``__init__.pyi``. They are imported when first used: looking at a saved circuit loads no torch.
"""

from mechinterp.lazy import lazy_face

__getattr__, __dir__, __all__ = lazy_face(__name__, __file__)
