"""FengShen: pretrain and finetune language models, Chinese ones first. `import fengshen` loads nothing heavy."""

__version__ = "0.1.0"

LAZY = dict(Run="training.run", export="training.export", generate="pipelines.generate", read_recipe="cli.recipes", doctor="cli.doctor", plan="cli.plan")
__all__ = ["fit", *LAZY]


def __getattr__(name):
    """`fengshen.Run` and the like are imported when they are first used."""
    if name not in LAZY:
        raise AttributeError(f"module 'fengshen' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(f"fengshen.{LAZY[name]}"), name)


def in_notebook():
    """True in a Jupyter kernel, where a live view can be shown."""
    import sys

    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and getattr(shell, "kernel", None) is not None


def fit(recipe, settings=None, *, live=None, wait=True, engine="local", **overrides):
    """Train a recipe: `fengshen.fit("demo", {"trainer.max_steps": 100})`; the run's folder as a `Run`.

    settings: the flags of `fengshen fit`, without dashes; those that are Python names may be given as keywords (`run_dir="runs/x"`).
    live: show widgets and train beside the cell (None: in a notebook). wait: with live, wait for the end.
    engine: "local", or "ray": the workers of a Ray cluster train.
    """
    from fengshen.cli.fit import fit, words
    from fengshen.utils.core import explain

    if not isinstance(settings, dict | None):
        raise ValueError(explain("settings are a dict", settings, '{"trainer.max_steps": 100, ...}', "name other arguments: live=..., wait=..."))
    overrides = (settings or {}) | overrides
    if not (in_notebook() and engine == "local" if live is None else live):
        return fit(recipe, overrides, engine=engine)
    from fengshen.training.control import RunControl
    from fengshen.widgets.live import LiveView

    control = RunControl()
    view = LiveView(control, command=" ".join(["fengshen fit", *words(recipe, overrides)]))
    if in_notebook():
        from IPython.display import display

        display(view)
    return fit(recipe, overrides, view, control, wait, engine)
