"""Another distribution may own a package of our name: ``circuits`` and ``mechinterp`` are taken elsewhere."""

import importlib.metadata

OURS = "mechinterp-toolkit"


def clashes() -> list[str]:
    """A warning for each of our packages that another installed distribution owns too, with the commands that mend it."""
    owners = importlib.metadata.packages_distributions()
    return [
        f"the package {package!r} is also installed by {' and '.join(others)}, and the two overwrite each other. Mend it: "
        f"pip uninstall {' '.join(others)} && pip install --force-reinstall --no-deps {OURS}"
        for package in ("mechinterp", "circuits", "saes")
        if (others := sorted(set(owners.get(package, ())) - {OURS}))
    ]
