import shutil
from typing import ClassVar

import keras
import numpy as np
import pytest
from keras import ops

import tvkeras
from tests.conftest import BACKEND, ORDER, batch, linear, net
from tvkeras import attacks, backends
from tvkeras.attacks import apgd, square
from tvkeras.attacks.base import Batch
from tvkeras.attacks.parts import Standing
from tvkeras.inference import CompiledClassifier

NORMS = ("l2", "linf")
MEMBERS = {
    "apgd": attacks.AutoPGD,
    "fab": attacks.FastAdaptiveBoundary,
    "square": attacks.Square,
}


def tensor(values, dtype="float32"):
    return ops.convert_to_tensor(np.asarray(values), dtype=dtype)


def array(values):
    return np.asarray(ops.convert_to_numpy(values))


def recording(function, calls):
    """`function` of images, eager or compiled, that notes down its arguments."""

    def recorded(images):
        if BACKEND == "jax":
            import jax

            jax.debug.callback(lambda x: calls.append(np.asarray(x)), images, ordered=True)
        else:
            calls.append(images.numpy())
        return function(images)

    return recorded


def perturb(attack, classifier, images, labels, epsilon, calls, seed=0):
    """What `attack` makes of one batch; `calls` gets each model call's images."""
    randomness = CompiledClassifier(classifier).randomness(tensor(seed, "int32"))
    logits = recording(lambda x: classifier(x, training=False), calls)
    result = attack.perturb(
        logits, tensor(images), tensor(labels, "int32"), tensor(epsilon), randomness
    )
    x_adv, queries = map(array, result)
    if BACKEND == "jax":
        import jax

        jax.effects_barrier()
    return x_adv, queries


def correct_batch(count=6):
    """A random classifier, images, and what it says of them as labels."""
    classifier, (images, _) = net(dtype="float32"), batch(count, dtype="float32")
    rng = np.random.default_rng(0)
    classifier.set_weights([rng.normal(size=w.shape, scale=0.5) for w in classifier.get_weights()])
    return classifier, images, classifier.predict(images, verbose=0).argmax(axis=1)


# ---- Auto-PGD --------------------------------------------------------------------------


def test_dlr_by_hand():
    logits, labels = tensor([[3, 1, 0, -1], [3, 1, 0, -1]]), tensor([0, 2], "int32")
    np.testing.assert_allclose(array(attacks.dlr_losses(logits, labels)), [-2 / 3, 3 / 3])
    targeted = attacks.targeted_dlr_losses(logits, labels, tensor([2, 1], "int32"))
    np.testing.assert_allclose(array(targeted), [-3 / 3.5, 1 / 3.5], rtol=1e-6)
    moved = attacks.dlr_losses(5 * logits + 7, labels)
    np.testing.assert_allclose(array(moved), [-2 / 3, 3 / 3], rtol=1e-6)


def test_checkpoints_are_the_published_ones():
    assert np.flatnonzero(apgd._windows(100)).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert np.flatnonzero(apgd._windows(1)).tolist() == [1]


def algorithm_1(gradient, loss, start, image, norm, epsilon, steps):
    """Algorithm 1 for one image, as the paper states it, in float64."""

    def clip(x):
        d = x - image
        in_ball = np.clip(d, -epsilon, epsilon)
        if norm == "l2":
            in_ball = d * min(1, epsilon / max(np.linalg.norm(d), 1e-30))
        return np.clip(image + in_ball, 0, 1)

    def direction(g):
        return np.sign(g) if norm == "linf" else g / np.linalg.norm(g)

    checkpoints = [0, *np.flatnonzero(apgd._windows(steps))]
    x, x_before, best, eta = start, start, start, 2 * epsilon
    values, etas, best_values = [loss(start)], [], []
    for k in range(steps):
        share = 0.75 if k else 1.0
        ahead = clip(x + eta * direction(gradient(x)))
        x, x_before = clip(x + share * (ahead - x) + (1 - share) * (x - x_before)), x
        values.append(loss(x))
        best = x if values[-1] > loss(best) else best
        if k + 1 in checkpoints:
            since = values[checkpoints[checkpoints.index(k + 1) - 1] :]
            few = np.sum(np.diff(since) > 0) <= 0.75 * (len(since) - 1)
            stalled = len(etas) > 0 and etas[-1] == eta and best_values[-1] == loss(best)
            etas.append(eta)
            best_values.append(loss(best))
            if few or stalled:
                eta, x = eta / 2, best
    return best, eta


@pytest.mark.parametrize("norm", NORMS)
def test_apgd_is_algorithm_1_on_a_handmade_function(norm):
    rng = np.random.default_rng(0)
    count, epsilon, steps = 12, 0.5, 20
    curvature = 10 ** rng.uniform(-2, 1, (count, 2, 2, 1))
    images = rng.uniform(0.3, 0.7, (count, 2, 2, 1))
    start = np.clip(rng.random(images.shape), images - 0.2, images + 0.2)
    summit = images + rng.uniform(-0.6, 0.6, images.shape)  # in some balls, not in others

    def double(values):
        return tensor(values, "float64")

    def logits(x):
        """A classifier whose second logit is the function to maximise, and never wins."""
        loss = -ops.sum(double(curvature) * ops.square(x - double(summit)), axis=(1, 2, 3))
        return ops.stack([ops.ones_like(loss), loss], axis=1)

    def ascend(images, start):
        queries = tensor(np.zeros(count), "int32")
        standing = Standing(tensor(np.ones(count), "bool"), start, queries)
        state = apgd._start(start, standing, 2 * epsilon)
        attack = attacks.AutoPGD(norm=norm, steps=steps)
        labels = tensor(np.zeros(count), "int32")
        given = apgd._Given(logits, images, labels, epsilon, None, count)
        return attack._ascend(given, lambda z: z[:, 1], state, lambda left: True)

    state = backends.compiled(ascend)(double(images), double(start))
    etas = []
    for i in range(count):
        best, eta = algorithm_1(
            lambda x, i=i: -2 * curvature[i] * (x - summit[i]),
            lambda x, i=i: -np.sum(curvature[i] * (x - summit[i]) ** 2),
            *(start[i], images[i], norm, epsilon, steps),
        )
        np.testing.assert_allclose(array(state.x_best)[i], best, atol=1e-9)
        etas.append(eta)
    np.testing.assert_allclose(array(state.step_size), etas, rtol=1e-9)
    assert len(set(etas)) > 1
    assert np.all(array(state.outcome.queries) == steps + 1)


def test_dlr_is_not_blinded_by_large_logits():
    classifier, images, labels = correct_batch()
    attack = attacks.AutoPGD(norm="l2", loss="dlr", steps=10)
    model = CompiledClassifier(classifier)
    before = attack(model, images, labels, epsilon=0.2)
    *weights, kernel, bias = classifier.get_weights()
    classifier.set_weights([*weights, 1e6 * kernel, 1e6 * bias])
    after = attack(model, images, labels, epsilon=0.2)
    assert 0 < before.success.sum() < len(images)
    np.testing.assert_array_equal(before.success, after.success)


# ---- Members ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [attacks.AutoPGD, attacks.FastAdaptiveBoundary])
def test_gradient_members_reach_the_boundary_of_a_linear_classifier(attack, norm):
    model, images, labels, w = linear()
    model = CompiledClassifier(model)
    margin = 0.2 / np.linalg.norm(w, {"l2": 2, "linf": 1}[norm])
    attack = attack(norm=norm, steps=20)
    result = attack(model, images, labels, epsilon=0.99 * margin)
    assert result.success.tolist() == [False, False, True]
    result = attack(model, images, labels, epsilon=1.06 * margin)
    assert result.success.all()
    assert np.all(result.distance[:2] > margin)


@pytest.mark.parametrize("norm", NORMS)
def test_square_stays_inside_and_takes_forward_passes_alone(norm):
    classifier, images, labels = correct_batch()
    calls, attack = [], attacks.Square(norm=norm, queries=20)
    expected, _ = perturb(attack, classifier, images, labels, 0.1, calls)
    flat = keras.Model(classifier.inputs, classifier(ops.stop_gradient(classifier.inputs[0])))
    np.testing.assert_array_equal(perturb(attack, flat, images, labels, 0.1, [])[0], expected)
    queried = np.stack([call for call in calls if not np.array_equal(call, images)])
    assert queried.min() >= 0
    assert queried.max() <= 1
    sizes = np.linalg.norm((queried - images).reshape(*queried.shape[:2], -1), ORDER[norm], axis=2)
    assert sizes.max() <= 0.1 * (1 + 1e-5)
    assert np.median(sizes) > 0.05
    if norm == "linf":  # a proposal differs from the point before in one square
        side = square._sides(images, smallest=1)[0]
        changed = np.any(queried[1] != queried[0], axis=3).sum(axis=(1, 2))
        assert np.all(changed <= side**2)


@pytest.mark.parametrize(
    ("attack", "epsilon"),
    [
        (attacks.AutoPGD(norm="l2", steps=12, restarts=2), 0.2),
        (attacks.AutoPGD(norm="linf", loss="targeted_dlr", steps=6), 0.03),
        (attacks.Square(norm="l2", queries=20), 0.6),
        (attacks.Square(norm="linf", queries=20), 0.1),
    ],
    ids=str,
)
def test_queries_are_the_model_calls_until_the_first_success(attack, epsilon):
    classifier, images, labels = correct_batch()
    calls = []
    x_adv, queries = perturb(attack, classifier, images, labels, epsilon, calls)
    predicted = classifier.predict(np.concatenate(calls), verbose=0).argmax(axis=1)
    missed = predicted.reshape(len(calls), -1) != labels
    broken = missed.any(axis=0)
    first = np.where(broken, missed.argmax(axis=0) + 1, len(calls))
    np.testing.assert_array_equal(queries, first)
    assert 0 < broken.sum() < len(broken)
    for i in np.flatnonzero(broken):
        np.testing.assert_array_equal(x_adv[i], calls[first[i] - 1][i])


@keras.saving.register_keras_serializable("tests")
class Sizes(keras.layers.Layer):
    """Notes down the sizes of the batches that a network is traced for."""

    seen: ClassVar[list] = []

    def call(self, images):
        self.seen.append(images.shape[0])
        return images


def test_what_is_left_of_a_batch_goes_on_as_it_would_have(digits):
    classifier = tvkeras.zoo.load("digits_undefended")
    noted = keras.Model(classifier.inputs, classifier(Sizes()(classifier.inputs[0])))
    images, labels = digits[1].images[:160] / np.float32(255), digits[1].labels[:160]
    batch = Batch(CompiledClassifier(noted), images, labels, epsilon=0.6)
    attack = attacks.AutoPGD(norm="l2", loss="targeted_dlr", steps=20, restarts=3, targets=2)
    expected, expected_queries = attacks.Attack.search(attack, batch)
    Sizes.seen.clear()
    x_adv, queries = attack.search(batch)
    assert {160, 80 if BACKEND == "jax" else None} <= set(Sizes.seen)
    np.testing.assert_array_equal(queries, expected_queries)
    np.testing.assert_allclose(x_adv, expected, atol=1e-5)
    assert 0 < np.sum(queries == queries.max()) < 80
    assert np.any((queries > 22) & (queries < queries.max()))  # broken in a later ascent


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("member", ["apgd", "fab", "square"])
def test_a_member_stops_when_every_example_is_broken(member, norm):
    classifier, images, labels = correct_batch()
    calls = []
    _, queries = perturb(MEMBERS[member](norm=norm), classifier, images, labels, 5.0, calls)
    assert len(calls) == queries.max() < 60


def test_the_dlr_needs_enough_classes():
    model, images, labels, _ = linear()
    with pytest.raises(ValueError, match="'dlr' must meet at least 3 classes, got 2"):
        attacks.AutoPGD(loss="dlr")(model, images, labels, epsilon=0.1)
    with pytest.raises(ValueError, match="'targeted_dlr' must meet at least 4 classes, got 2"):
        attacks.AutoPGD(loss="targeted_dlr")(model, images, labels, epsilon=0.1)


# ---- The suite -------------------------------------------------------------------------


def test_the_standard_suite_is_the_published_one():
    version, members = attacks.AutoAttack(norm="linf").members(10)
    assert version == "standard"
    assert members == {
        "apgd-ce": attacks.AutoPGD(norm="linf", loss="ce", steps=100, restarts=1),
        "apgd-t": attacks.AutoPGD(
            norm="linf", loss="targeted_dlr", steps=100, restarts=1, targets=9
        ),
        "fab-t": attacks.FastAdaptiveBoundary(norm="linf", steps=100, targets=9),
        "square": attacks.Square(norm="linf", queries=5000),
    }


CHEAP = {
    "one": attacks.ProjectedGradient(norm="l2", steps=1, relative_step=0.4),
    "two": attacks.FastAdaptiveBoundary(norm="l2", steps=4, targets=1),
    "three": attacks.ProjectedGradient(norm="l2", steps=20),
}


class CheapSuite(attacks.AutoAttack):
    """The suite with members that draw no random numbers and take a few steps."""

    def members(self, num_classes):
        return "custom: test", CHEAP


def suite_case():
    classifier, images, labels = correct_batch(14)
    labels[0] = (labels[0] + 1) % 4
    return CompiledClassifier(classifier), images, labels


def test_the_suite_is_the_union_of_its_members():
    model, images, labels = suite_case()
    arguments = {"epsilon": 0.18, "batch_size": 5}
    alone = {name: member(model, images, labels, **arguments) for name, member in CHEAP.items()}
    result = CheapSuite()(model, images, labels, **arguments)
    broken_by, queries = np.full(14, "", "<U16"), np.zeros(14, int)
    broken_by[0] = "clean"
    for name in CHEAP:  # each meets the examples that still stand
        standing = broken_by == ""
        queries[standing] += alone[name].queries[standing]
        broken_by[standing & alone[name].success] = name
    assert result.broken_by.tolist() == broken_by.tolist()
    assert len(set(broken_by)) >= 4
    np.testing.assert_array_equal(result.success, broken_by != "")
    np.testing.assert_array_equal(result.queries, queries)
    for i, name in enumerate(broken_by):
        source = alone[name].x_adv if name in alone else images
        np.testing.assert_allclose(result.x_adv[i], source[i], atol=1e-5)
        assert np.isfinite(result.distance[i]) == result.success[i]


def test_an_interrupted_suite_goes_on(tmp_path):
    model, images, labels = suite_case()
    suite, arguments = CheapSuite(), {"epsilon": 0.18, "resume_dir": tmp_path}
    first = suite(model, images, labels, **arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"clean", *CHEAP}
    shutil.rmtree(tmp_path / "three")
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    second = suite(model, images, labels, **arguments)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    np.testing.assert_array_equal(first.x_adv, second.x_adv)
    assert first.broken_by.tolist() == second.broken_by.tolist()


def test_with_few_classes_the_suite_is_not_called_standard():
    model, images, labels, _ = linear()
    result = attacks.AutoAttack(norm="linf")(model, images, labels, epsilon=0.4)
    assert result.version == "custom: without apgd-t (2 classes)"
    assert result.broken_by.tolist() == ["apgd-ce", "apgd-ce", "clean"]
    version, members = attacks.AutoAttack().members(3)
    assert version == "custom: apgd-dlr for apgd-t (3 classes)"
    assert list(members) == ["apgd-ce", "apgd-dlr", "fab-t", "square"]
    with pytest.raises(ValueError, match="AutoAttack needs an epsilon"):
        attacks.AutoAttack()(model, images, labels)
