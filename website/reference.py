"""The pages of the reference, one for each package: every public name, by the module that defines it."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "hyperattention"
# package, title, first sentence, and what else stands on the page; a name stands on the first page that has it
REFERENCE = {
    "reference/select.md": (
        "select",
        "Stages and densities",
        "What `Method` is made of: `from hyperattention.select import ...`.",
        (),
    ),
    "reference/rivals.md": (
        "rivals",
        "Published rivals",
        "Methods of other authors: `from hyperattention.rivals import ...`.",
        (),
    ),
    "reference/policies.md": (
        "policies",
        "Policies of a cache",
        "Which keys a cache keeps or reads: `from hyperattention.policies import ...`. See [caches](../caches.md).",
        (),
    ),
    "reference/nn.md": ("nn", "Modules", "Layers to train with: `from hyperattention.nn import ...`.", ()),
    "reference/features.md": ("features", "Feature maps", "`from hyperattention.features import ...`.", ()),
    "reference/sensitivity.md": ("sensitivity", "Sensitivities", "`from hyperattention.sensitivity import ...`.", ()),
    "reference/synthetic.md": ("synthetic", "Synthetic inputs", "`from hyperattention.synthetic import ...`.", ()),
    "reference/transformers.md": (
        "integrations/transformers",
        "transformers",
        "`from hyperattention.integrations.transformers import ...`. `save_cache` and `load_cache` are in "
        " `hyperattention.integrations.transformers.cache_file`.",
        ("integrations.transformers.cache_file.save_cache", "integrations.transformers.cache_file.load_cache"),
    ),
    "reference/calibration.md": (
        "calibration",
        "Calibration",
        "What the command `calibrate` runs. `Plan`, `load_plan` and `save_plan` are names of the package itself.",
        (
            "calibration.calibrate.calibrate",
            "calibration.settings.CalibrationSettings",
            "files.plan.Plan",
            "files.plan.Measured",
            "files.plan_file.load_plan",
            "files.plan_file.save_plan",
            "reference.model.load_reference",
            "reference.model.load_model",
            "reference.samples.samples_of_documents",
            "reference.samples.samples_of_text",
        ),
    ),
    "reference/distributed.md": (
        "distributed",
        "Several devices",
        "Attention over shards of a sequence: `from hyperattention.distributed import ...`. "
        "See [several devices](../distributed.md).",
        (),
    ),
    "reference/index.md": (
        "",
        "Attention, error and methods",
        "Names of the package itself: `import hyperattention as ha`.",
        (),
    ),
}


def reference_pages() -> dict[str, str]:
    """Write the pages of the reference: every public name stands on one of them, functions before classes."""
    missing = sorted(_packages() - {package for package, *_ in REFERENCE.values()})
    if missing:
        raise ValueError(f"packages with public names and without a page: {missing}; add them to website/reference.py")
    shown: set[str] = set()
    pages = {}
    for page, (package, title, first, more) in REFERENCE.items():
        names = [
            name for name in (*_public_names(package), *(f"hyperattention.{each}" for each in more)) if name not in shown
        ]
        shown.update(names)
        names.sort(key=lambda name: name.rpartition(".")[2][0].isupper())
        # a package that is not there, or names nothing, has no page
        if names:
            pages[page] = f"# {title}\n\n{first}\n\n" + "".join(f"::: {name}\n\n" for name in names)
    return pages


def _packages() -> set[str]:
    """List the packages that have an `__all__`."""
    found = {
        path.parent.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("__init__.py") if "__all__" in path.read_text()
    }
    return {"" if package == "." else package for package in found}


def _public_names(package: str) -> list[str]:
    """List the names of a package's `__all__`, each by the module that defines it."""
    path = SOURCE / package / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    homes = {
        alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [homes[name] for name in ast.literal_eval(node.value) if name in homes]
    return []
