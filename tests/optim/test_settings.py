"""Numbers outside their range and misspelt settings are refused, by every optimizer alike."""

import math

import pytest
import torch
from torch import nn

import poetx
from builders import mlp
from poetx import POETX, PoetConfig, UserError, convert_
from poetx.optim import SMMF, AdamW, HFac, build_optimizer, release_gradients
from poetx.optim.baselines.hyperball import MuonHyperball
from poetx.optim.baselines.normalized import RMNP


def matrix():
    return nn.Parameter(torch.ones(4, 4))


def converted():
    model = mlp()
    convert_(model, PoetConfig(block_size=4))
    return model


#: How each is built, and its numeric arguments.
BUILT = {
    "POETX": (lambda **s: POETX(mlp(), block_size=4, **s), "lr angle norm_growth momentum weight_decay"),
    "POETX, groups": (lambda **s: POETX([{"params": [matrix()], "rotate": True} | s]), "lr momentum"),
    "POETX, the rest": (
        lambda **s: POETX([{"params": [matrix()], "rotate": True}, {"params": [matrix()]} | s]),
        "lr betas eps weight_decay",
    ),
    "param_groups": (
        lambda **s: poetx.param_groups(converted(), **{"lr": 1e-3, "poet_lr": 1e-3} | s),
        "lr poet_lr weight_decay betas eps momentum",
    ),
    "build_optimizer": (lambda **s: build_optimizer([{"params": [matrix()]}], **s), "lr betas eps"),
    "build_optimizer, sgd": (lambda **s: build_optimizer([{"params": [matrix()]}], "sgd", **s), "lr momentum"),
    "build_optimizer, groups": (lambda **s: build_optimizer([{"params": [matrix()]} | s]), "lr betas eps weight_decay"),
    "AdamW": (lambda **s: AdamW([matrix()], **s), "lr betas eps weight_decay"),
    "AdamW, groups": (lambda **s: AdamW([{"params": [matrix()]} | s]), "lr betas eps weight_decay"),
    "SMMF": (lambda **s: SMMF([matrix()], **s), "lr beta eps weight_decay growth decay"),
    "HFac": (lambda **s: HFac([matrix()], **s), "lr betas eps weight_decay clip"),
    "release_gradients": (
        lambda **s: release_gradients(torch.optim.SGD([p := matrix()], lr=0.1), [p], **s),
        "max_norm",
    ),
}
CASES = [(name, key) for name, (_, keys) in BUILT.items() for key in keys.split()]


@pytest.mark.parametrize(("name", "key"), CASES)
def test_a_number_that_is_not_finite_or_out_of_range_is_refused(name, key):
    build = BUILT[name][0]
    good = {"betas": (0.5, 0.6), "angle": 0.02, "decay": -0.5, "max_norm": 2.0, "clip": 2.0}.get(key, 0.25)
    build(**{key: good})
    for value in (-1.5, math.nan, math.inf, -math.inf, "1e-3", True, 1j, [0.1]):
        wrong = (0.9, value) if key == "betas" else value
        if (key, value) == ("eps", [0.1]):
            continue  # Adafactor's is a pair
        with pytest.raises(UserError, match=rf"^{key}=|^angle=") as error:
            build(**{key: wrong})
        assert "\n" not in str(error.value)


def test_numbers_in_tensors_and_the_edges_of_ranges_are_taken():
    AdamW([matrix()], lr=torch.tensor(0.0), weight_decay=0, eps=1e-30)
    build_optimizer([{"params": [matrix()], "lr": torch.tensor(1e-3)}])
    assert build_optimizer([{"params": [matrix()], "eps": (None, 1e-3)}], "adafactor").param_groups[0]["eps"][1] == 1e-3
    for betas in ((0.9,), (0.9, 0.99, 0.999), 0.9):
        with pytest.raises(UserError, match="betas="):
            AdamW([matrix()], betas=betas)
    with pytest.raises(UserError, match=r"seed=0\.5: must be a whole number"):
        HFac([matrix()], seed=0.5)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: poetx.param_groups(converted(), lr=1, poet_lr=1, beta=(0.5, 0.6)), "beta=.*did you mean 'betas'"),
        (lambda: poetx.param_groups(converted(), lr=1, poet_lr=1, d_coef=2), "d_coef=2: .*groups\\[0\\] yourself"),
        (lambda: POETX([{"params": [matrix()], "rotat": True}]), r"no group has 'rotate': True \('rotat' is not\)"),
        (lambda: POETX([{"params": [matrix()], "rotate": True, "momentun": 0.5}]), "did you mean 'momentum'"),
        (
            lambda: POETX([{"params": [matrix()], "rotate": True}, {"params": [matrix()], "weight_deca": 0.5}]),
            "did you mean 'weight_decay'",
        ),
        (lambda: AdamW([{"params": [matrix()], "bettas": (0.5, 0.6)}]), "AdamW: bettas=.*did you mean 'betas'"),
        (lambda: build_optimizer([{"params": [matrix()], "epss": 1e-3}]), "did you mean 'eps'"),
    ],
)
def test_a_misspelt_setting_is_refused(attempt, words):
    with pytest.raises(UserError, match=words):
        attempt()


def test_a_misspelt_argument_names_the_nearest():
    with pytest.raises(TypeError, match="'angel'; did you mean 'angle'"):
        POETX(mlp(), angel=0.1)


def test_keys_of_other_optimizers_schedulers_and_the_users_own_are_taken():
    class WithOwnKey(torch.optim.SGD):
        """Reads ``"momenta"`` of a group."""

    groups = [{"params": [matrix()], "rotate": True, "label": "body"}, {"params": [matrix()], "momenta": 3}]
    assert POETX(groups, dense_optimizer=lambda rest: WithOwnKey(rest, lr=0.1)).param_groups[1]["momenta"] == 3
    model = converted()
    optimizer = AdamW(poetx.param_groups(model, lr=1e-3, poet_lr=1e-3, eps_mode="uncorrected", amsgrad=False))
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    AdamW([dict(group) for group in optimizer.param_groups])


@pytest.mark.parametrize(
    ("build", "setting"),
    [
        (AdamW, {"amsgrad": True}),
        (SMMF, {"maximize": True}),
        (HFac, {"momentum": 0.5}),
        (RMNP, {"betas": (0.8, 0.9)}),
        (MuonHyperball, {"dampening": 0.1}),
        (lambda groups: build_optimizer(groups, state_dtype="bfloat16"), {"maximize": True}),
        (lambda groups: POETX([groups[0] | {"rotate": True}]), {"weight_decay": 0.1}),
    ],
)
def test_a_setting_of_another_optimizer_that_would_change_numbers_is_refused(build, setting):
    key, value = next(iter(setting.items()))
    with pytest.raises(UserError, match=f"{key}=.* would have no effect"):
        build([{"params": [matrix()], **setting}])
    usual = {True: False, (0.8, 0.9): (0.9, 0.999)}.get(value, 0)
    build([{"params": [matrix()], "foreach": False, "capturable": True, key: usual}])


@pytest.mark.parametrize("given", [lambda: mlp().parameters(), mlp, lambda: [matrix()], matrix])
def test_an_optimizer_is_built_of_groups_whose_parameters_may_have_names(given):
    with pytest.raises(UserError, match=r"not parameter groups; give poetx.param_groups"):
        build_optimizer(given())
    named = build_optimizer([{"params": mlp().named_parameters()}]).param_groups[0]["params"]
    assert [type(p) for p in named] == 6 * [nn.Parameter]
