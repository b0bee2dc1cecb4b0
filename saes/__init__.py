"""Sparse autoencoders on what attention heads write: train them, read what their latents mean, measure what they keep.

    from saes import load, spliced, train

The public names stand in ``__init__.pyi``. They are imported when first used.
"""

from mechinterp.lazy import lazy_face

__getattr__, __dir__, __all__ = lazy_face(__name__, __file__)
