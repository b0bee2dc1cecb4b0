"""``python -m mechinterp.cli``, for where the ``mechinterp`` script is not on the path."""

from mechinterp.cli import main

main()
