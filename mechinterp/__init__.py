"""Read and write what a transformer computes, and find the parts that do the work.

    import mechinterp as mi
    from mechinterp.tasks import ioi

    model = mi.load("builtin")
    task = ioi(model, n_prompts=64, seed=0)

The public names stand in ``__init__.pyi``. They are imported when first used: ``import mechinterp`` loads no torch.
"""

from mechinterp.lazy import lazy_face

__getattr__, __dir__, __all__ = lazy_face(__name__, __file__)
