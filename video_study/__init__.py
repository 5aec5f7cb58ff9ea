__version__ = "0.1.0"

from importlib import import_module

# The names an engineer needs, imported when they are asked for: `import video_study` itself stays light.
_names = dict(
    create_model="models.registry",
    list_models="models.registry",
    count="models.cost",
    Manifest="data.manifest",
    Experiment="training.experiment",
    fit="training.loop",
    dispatch="launch.dispatch",
)
__all__ = list(_names)


def __getattr__(name):
    if name not in _names:
        raise AttributeError(f"module 'video_study' has no attribute {name!r}; it offers {', '.join(_names)}")
    return getattr(import_module(f"video_study.{_names[name]}"), name)


def __dir__():
    return [*globals(), *_names]
