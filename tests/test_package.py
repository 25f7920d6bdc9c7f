"""What importing does, and that the backends agree."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import tvkeras
from tests.conftest import BACKEND


def python(code, backend="tensorflow"):
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_ENABLE_X64": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    ).stdout


def test_importing_tvkeras_loads_nothing_heavy():
    loaded = python("import sys, tvkeras; print(*sys.modules)").split()
    assert not {"keras", "tensorflow", "jax", "gin", "sklearn", "matplotlib"} & set(loaded)


def test_loading_from_the_zoo_imports_no_more_than_the_network_needs():
    code = """
import sys, keras
known = set(sys.modules)
import tvkeras
tvkeras.zoo.load("digits_tv_lip")
print(*(set(sys.modules) - known))
"""
    loaded = set(python(code, BACKEND).split())
    assert not {"sklearn", "matplotlib", "scipy", "jinja2", "tensorflow_datasets"} & loaded
    assert not {"tvkeras.attacks", "tvkeras.detection", "tvkeras.evaluation", "gin"} & loaded


@pytest.mark.slow
def test_importing_a_module_sets_no_variable_and_defines_no_flag():
    code = """
import importlib, os, pkgutil, keras, tensorflow
from absl import flags
import tvkeras
before = dict(os.environ), set(flags.FLAGS)
for module in pkgutil.walk_packages(tvkeras.__path__, "tvkeras."):
    if not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
print((dict(os.environ), set(flags.FLAGS)) == before, "TF_ENABLE_ONEDNN_OPTS" in os.environ)
"""
    unset = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**unset, "KERAS_BACKEND": "tensorflow"},
        check=True,
    )
    assert done.stdout.split() == ["True", "False"]


def test_public_names_resolve_and_unknown_ones_list_them():
    for name in tvkeras.__all__:
        assert getattr(tvkeras, name) is not None
    assert set(tvkeras.__all__) <= set(dir(tvkeras))
    with pytest.raises(AttributeError, match="TVLipschitz"):
        _ = tvkeras.TVLipshitz


@pytest.mark.slow
def test_jax_trains_and_measures_without_tensorflow(tmp_path):
    code = f"""
import sys
sys.modules["tensorflow"] = None  # any import of it fails
from tvkeras import config, train
config.bind(["gin/digits_tv_lip.gin"], ["Recipe.epochs=1", "Network.arguments={{'width': 4}}"])
print(train.train({str(tmp_path)!r}, **config.settings()).clean_error.value)
"""
    assert 0 <= float(python(code, "jax").splitlines()[-1]) <= 1


GRADIENTS = """
import json, sys
import numpy as np
from tests.conftest import arrays, batch, net, update
from tvkeras.defenses import AdversarialTraining, TVLipschitz

classifier = net()
rng = np.random.default_rng(0)
classifier.set_weights([rng.normal(size=w.shape, scale=0.3) for w in classifier.get_weights()])
defenses = [
    TVLipschitz(norm=norm, scheme=scheme, lipschitz_weight=0.3)
    for norm in ("l1", "l2", "linf")
    for scheme in ("forward", "central")
]
defenses += [TVLipschitz(method="double_backprop"), AdversarialTraining(random_start=False)]
print(json.dumps([[a.tolist() for a in arrays(update(d, classifier, *batch()).gradients)]
                  for d in defenses]))
"""


@pytest.mark.slow
def test_tensorflow_and_jax_compute_equal_gradients():
    results = [json.loads(python(GRADIENTS, backend)) for backend in ("tensorflow", "jax")]
    for one, other in zip(*results, strict=True):
        scale = max(np.abs(gradient).max() for gradient in map(np.array, other))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)
