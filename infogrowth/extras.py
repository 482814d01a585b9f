"""What a light install leaves out: which extra brings a package that is missing."""

import re
from importlib import metadata

# Where the module has another name than what is installed.
_DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


def missing_package(error: ModuleNotFoundError) -> str | None:
    """One sentence on a package that is not installed, and how to install it; None when it is a
    module of this project that is missing, which is no matter of installing."""
    module = (error.name or "").partition(".")[0]
    if not module or module == "infogrowth":
        return None
    package = _DISTRIBUTIONS.get(module, module)
    if extra := _extra_of(package):
        return f"this needs the package {package}: pip install 'infogrowth[{extra}]'"
    return f"this needs the package {package}: pip install {package}"


def _extra_of(package: str) -> str | None:
    """The extra of this project that brings a package, as its own metadata says."""
    try:
        requirements = metadata.requires("infogrowth") or []
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        return None
    wanted = _normal(package)
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", requirement)
        if name and extra and _normal(name[0]) == wanted:
            return extra[1]
    return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
