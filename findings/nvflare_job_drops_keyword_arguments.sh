#!/usr/bin/env bash
# NVIDIA FLARE 2.9.0, FedJob: a component whose constructor takes **kwargs loses those arguments on the way into a job.
#
# FedJob writes a component into config_fed_server.json by the parameters of its __init__ and the attributes of the same names.
# A good engineer's guess: what the component was built with is what the job builds it with again, or an error says that it
# cannot be. Seen: arguments that a constructor takes by **kwargs are left out of the job without a word, so that the server
# builds the component with its defaults. Taken by **options and kept as self.options they are written, but as one argument
# named "options", which the constructor then finds as options["options"]. The same class with the arguments listed in
# __signature__ keeps them all, because the parameters are read by inspect.signature.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check nvflare==2.9.0
cat > parts.py <<'PY'
import inspect

from nvflare.apis.fl_component import FLComponent


class TakesKwargs(FLComponent):
    def __init__(self, **kwargs):
        super().__init__()
        self.kwargs = kwargs
        for name, value in kwargs.items():
            setattr(self, name, value)


class TakesOptions(FLComponent):
    def __init__(self, **options):
        super().__init__()
        self.options = options


class ListsThem(TakesKwargs):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    __init__.__signature__ = inspect.Signature(
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("strength", inspect.Parameter.KEYWORD_ONLY, default=0.5),
        ]
    )
PY
cat > show.py <<'PY'
import json
from pathlib import Path

from nvflare.job_config.api import FedJob
from parts import ListsThem, TakesKwargs, TakesOptions

job = FedJob("show", min_clients=1)
for name, kind in (("kwargs", TakesKwargs), ("options", TakesOptions), ("listed", ListsThem)):
    job.to_server(kind(strength=0.7), id=name)
job.export_job("job")
config = json.loads(next(Path("job").rglob("config_fed_server.json")).read_text())
args = {c["id"]: c.get("args") or {} for c in config["components"]}
seen = {name: args[name] for name in ("kwargs", "options", "listed")}
print("arguments in the job:", seen)
assert seen == {"kwargs": {}, "options": {"options": {"strength": 0.7}}, "listed": {"strength": 0.7}}, seen
PY
venv/bin/python show.py
echo "as described: **kwargs are lost without a word, **options are written as one argument, a __signature__ keeps them"
