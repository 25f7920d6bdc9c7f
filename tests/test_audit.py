import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.conftest import BACKEND, linear, net
from tvkeras import attacks, evaluation
from tvkeras.evaluation import masking, sanity
from tvkeras.evaluation.case import Case
from tvkeras.inference import CompiledClassifier

EPSILONS = {"l2": (0.1, 0.2, 0.4), "linf": (0.01, 0.02, 0.06)}
COUNT = 60

MASKING = {
    *("single_step", "monotone", "chance_at_large_epsilon", "unbounded", "random_noise"),
    *("rescaled_logits", "gradient_free", "margin_loss", "transfer"),
}


class Rounded(layers.Layer):
    """Quantises its input: its gradient is zero."""

    def call(self, images):
        return ops.round(8 * images) / 8


class Rippled(layers.Layer):
    """Adds ripples of period 1/16: multiples of it stay, their gradient is tripled."""

    def call(self, images):
        return images + 2 * ops.sin(32 * np.pi * images) / (32 * np.pi)


@pytest.fixture(scope="module")
def ordinary():
    """A trained classifier, and the images and labels that its audits look at."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, (300, 6, 6, 2)).astype("float32") / 16
    labels = ((images - 0.5).reshape(300, 72) @ rng.normal(size=(72, 4))).argmax(axis=1)
    classifier = net(dtype="float32")
    classifier.compile(
        keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    classifier.fit(images, labels, epochs=60, batch_size=50, verbose=0)
    return classifier, images[:COUNT], labels[:COUNT]


def around(classifier, before=(), after=()):
    """The classifier with layers before and after it."""
    images = keras.Input((6, 6, 2))
    x = images
    for layer in (*before, classifier, *after):
        x = layer(x)
    return keras.Model(images, x)


@pytest.fixture(scope="module")
def audits(ordinary):
    """Audits of the ordinary classifier and of three whose gradient is masked, in linf."""
    classifier, images, labels = ordinary
    toys = {
        "ordinary": classifier,
        "saturated": around(classifier, after=[layers.Rescaling(1e5)]),
        "rounded": around(classifier, before=[Rounded()]),
        "rippled": around(classifier, before=[Rippled()]),
    }
    arguments = {"norm": "linf", "epsilons": EPSILONS["linf"], "surrogate": classifier}
    return {name: evaluation.audit(toy, images, labels, **arguments) for name, toy in toys.items()}


def failures(audit):
    return {check.name for check in audit.checks if check.status == "fail"}


@pytest.mark.slow
def test_an_ordinary_classifier_is_reliable(audits):
    ordinary = audits["ordinary"]
    assert ordinary.verdict == "reliable"
    assert {check.name for check in ordinary.checks} >= MASKING
    named = {check.name: check.figure for check in ordinary.checks}
    assert named["chance_at_large_epsilon"] == named["unbounded"] == named["zero_gradients"] == 0
    assert named["gradient_is_the_slope"] < 1e-3


@pytest.mark.slow
def test_masked_gradients_are_unreliable(audits):
    saturation = {"random_noise", "rescaled_logits", "gradient_free", "margin_loss", "transfer"}
    if BACKEND == "tensorflow":  # JAX's gradient is rounding noise, not zero
        saturation |= {"zero_gradients", "chance_at_large_epsilon"}
    expected = {
        "saturated": saturation,
        "rounded": {"zero_gradients", "gradient_is_the_slope", "unbounded", "transfer"},
        "rippled": {"single_step", "monotone"},
    }
    for name, signs in expected.items():
        assert audits[name].verdict == "unreliable"
        assert failures(audits[name]) >= signs, name


@pytest.mark.slow
def test_each_sign_of_masking_fails_somewhere_and_not_on_the_ordinary_classifier(audits):
    assert not failures(audits["ordinary"])
    assert set().union(*map(failures, audits.values())) >= MASKING


@pytest.mark.slow
def test_the_signs_in_l2(ordinary):
    classifier, images, labels = ordinary
    arguments = {"norm": "l2", "epsilons": EPSILONS["l2"], "seed": 3}
    audit = evaluation.audit(classifier, images, labels, **arguments)
    assert audit.verdict == "reliable"
    assert "transfer" not in {check.name for check in audit.checks}
    masked = around(classifier, after=[layers.Rescaling(1e5)])
    found = failures(evaluation.audit(masked, images, labels, **arguments))
    assert found >= {"rescaled_logits", "gradient_free", "margin_loss"}


def test_an_audit_is_json_and_a_function_of_its_seed(ordinary):
    classifier, images, labels = ordinary
    model = CompiledClassifier(classifier)
    one, other = (
        evaluation.audit(model, images[:20], labels[:20], norm="linf", epsilons=("1/50",), seed=5)
        for _ in range(2)
    )
    assert one == other
    restored = json.loads(json.dumps(dataclasses.asdict(one)))
    assert restored["verdict"] == one.verdict
    assert [evaluation.Check(**check) for check in restored["checks"]] == list(one.checks)


def case(ordinary, classifier=None, **changes):
    trained, images, labels = ordinary
    settings = {
        "model": CompiledClassifier(classifier or trained),
        "images": images,
        "labels": labels,
        "attack": attacks.ProjectedGradient(norm="linf"),
        "epsilons": EPSILONS["linf"],
        "worst_case": np.full(len(labels), np.inf),
        "seed": 0,
        "batch_size": 25,
    }
    return Case(**{**settings, **changes})


def test_what_is_wrong_with_the_input_is_named(ordinary):
    _, images, labels = ordinary
    assert sanity.images_in_bounds(case(ordinary, images=255 * images)).status == "fail"
    assert sanity.epsilon_in_pixel_units(case(ordinary, epsilons=(8.0,))).status == "fail"
    assert sanity.epsilon_in_pixel_units(case(ordinary)).status == "pass"
    assert sanity.enough_classes(case(ordinary, labels=labels + 4)).status == "fail"


def test_what_is_wrong_with_the_classifier_is_named(ordinary):
    class Noisy(layers.Dropout):
        def call(self, inputs, training=False):
            return super().call(inputs, training=True)

    noisy = case(ordinary, around(ordinary[0], before=[Noisy(0.2, seed=0)]))
    assert sanity.repeatable(noisy).status == "fail"
    assert sanity.state_unchanged(noisy).figure == 1
    infinite = case(ordinary, around(ordinary[0], after=[layers.Rescaling(3e38)]))
    assert sanity.finite_logits(infinite).status == "fail"
    assert sanity.repeatable(infinite).status == "fail"
    settings = {"norm": "l2", "epsilons": EPSILONS["l2"]}
    audit = evaluation.audit(infinite.model, infinite.images, infinite.labels, **settings)
    assert audit.verdict == "unreliable"
    assert failures(audit) == {"finite_logits"}
    hidden = around(ordinary[0], after=[layers.Softmax(), layers.Identity()])
    softmax = case(ordinary, hidden)
    assert sanity.not_probabilities(softmax).figure == 1
    audit = evaluation.audit(hidden, softmax.images, softmax.labels, **settings)
    assert failures(audit) == {"not_probabilities"}
    assert sanity.not_probabilities(case(ordinary)).status == "pass"


def test_a_weak_attack_is_named(ordinary):
    short = attacks.ProjectedGradient(norm="linf", steps=2, relative_step=0.2)
    weak = case(ordinary, attack=short)
    assert sanity.reaches_the_edge(weak) == dataclasses.replace(
        sanity.reaches_the_edge(weak), status="fail", figure=0.4
    )
    assert sanity.steps_suffice(weak).status == "fail"
    assert sanity.steps_suffice(case(ordinary)).status == "pass"


class Liar(attacks.ProjectedGradient):
    """Reports a success everywhere, two epsilons away."""

    def __call__(self, classifier, images, labels, *, epsilon, **settings):
        success = np.ones(len(labels), bool)
        away = images + np.float32(2 * epsilon)
        return attacks.AttackResult(x_adv=away, success=success, distance=success, queries=success)


def test_a_false_report_is_found_out(ordinary):
    false, sound = case(ordinary, attack=Liar(norm="linf")), case(ordinary)
    for check in (
        sanity.clean_at_epsilon_zero,
        sanity.within_epsilon,
        sanity.attacked_in_bounds,
        sanity.confirmed,
    ):
        assert check(false).status == "fail"
        assert check(sound).status == "pass"
    assert sanity.within_epsilon(false).figure == pytest.approx(2, rel=1e-4)


def test_rounding_to_8_bits_undoes_a_perturbation_of_a_third_of_a_level():
    model, images, labels, w = linear()
    images = np.full_like(images, 128 / 255)
    epsilon = 0.3 / 255
    kernel, _ = model.get_weights()
    bias = 0.5 * epsilon * np.abs(w).sum() - (w * 128 / 255).sum()
    model.set_weights([kernel, np.array([0, -epsilon * np.abs(w).sum() + bias], "float32")])
    settings = {"images": images[:2], "labels": labels[:2]}
    rounded = sanity.survives_rounding(
        case((model, images, labels), epsilons=(epsilon,), **settings)
    )
    assert (rounded.status, rounded.figure) == ("warn", 1.0)


def test_two_classes_have_no_margin_check():
    model, images, labels, _ = linear()
    audit = evaluation.audit(model, images, labels, norm="l2", epsilons=(0.05, 0.2))
    named = {check.name: check.status for check in audit.checks}
    assert named["enough_classes"] == "warn"
    assert "margin_loss" not in named
    assert "fail" not in {named[name] for name in MASKING & set(named)}


def test_a_margin_counts_what_all_attacks_of_a_card_miss(ordinary):
    epsilon = EPSILONS["linf"][-1]
    saturated = around(ordinary[0], after=[layers.Rescaling(1e5)])
    plain = attacks.ProjectedGradient(norm="linf", temper=False)
    trial = case(ordinary, saturated, attack=plain, epsilons=(epsilon,))
    alone = masking.margin_loss(trial)
    assert alone.status == "fail"
    for distance, figure in ((epsilon, 0), (1.01 * epsilon, alone.figure)):
        found = np.full(COUNT, distance)
        beyond = masking.margin_loss(dataclasses.replace(trial, worst_case=found))
        assert beyond.figure == figure


def test_the_decisive_epsilon_leaves_half_of_the_right_images(ordinary):
    trial = case(ordinary)
    fooled = {epsilon: result.success.mean() for epsilon, result in trial.results.items()}
    half = (1 + trial.wrong_before.mean()) / 2
    distance = {epsilon: abs(share - half) for epsilon, share in fooled.items()}
    assert distance[trial.decisive] == min(distance.values())
    immovable = case(ordinary, around(ordinary[0], before=[Rounded()]))
    assert immovable.decisive == max(EPSILONS["linf"])
    assert masking.random_noise(immovable).figure > 0


def test_illegal_arguments_are_refused(ordinary):
    for arguments, message in (
        ({"norm": "l1", "epsilons": (0.1,)}, r"norm must be one of \['l2', 'linf'\]"),
        ({"norm": "l2", "epsilons": (0.0, 0.1)}, "epsilons must be radii above 0"),
        ({"norm": "l2", "epsilons": 0.1}, "epsilons must be a tuple"),
        ({"norm": "l2", "epsilons": (0.1,), "worst_case": np.zeros(3)}, "of 60 images, got shape"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.audit(*ordinary, **arguments)
