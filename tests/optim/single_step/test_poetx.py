"""POETX: it learns, holds what it promises, and is an optimizer as torch users know them."""

import io

import pytest
import torch
from torch import nn

from builders import descend, gpt2, llama, mlp
from poetx import POETX, PoetConfig, UserError, convert_, to_dense_


def problem(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16)).to(dtype)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in (model[0], model[2]):  # the same spectrum as the teacher's, turned at random
            other = teacher[0] if layer is model[0] else teacher[2]
            U, _ = torch.linalg.qr(torch.randn(layer.out_features, layer.out_features, generator=generator))
            V, _ = torch.linalg.qr(torch.randn(layer.in_features, layer.in_features, generator=generator))
            layer.weight.copy_((U @ other.weight.float() @ V).to(dtype))
    x = torch.randn(64, 24, generator=generator).to(dtype)
    return model, x, teacher(x).detach()


def train(model, x, y, optimizer, steps):
    losses = []
    for _ in range(steps):
        loss = (model(x) - y).float().square().mean()
        descend(loss, optimizer)
        losses.append(loss.item())
    return losses


VARIANTS = [{}, {"nesterov": False}, {"block_size": 40}]


@pytest.mark.parametrize("update", ["rotation", "free"])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_it_learns_and_the_singular_values_stay_or_move(settings, update):
    model, x, y = problem()
    start = [torch.linalg.svdvals(model[i].weight.detach().double()) for i in (0, 2)]
    optimizer = POETX(model, lr=3e-3, update=update, **({"block_size": 8, "angle": 0.02} | settings))
    losses = train(model, x, y, optimizer, 150)
    assert losses[-1] < (0.5 if update == "rotation" else 0.3) * losses[0]
    for i, values in zip((0, 2), start, strict=True):
        now = torch.linalg.svdvals(model[i].weight.detach().double())
        change = ((now - values).abs() / values).median()
        assert change < 1e-5 if update == "rotation" else change > 0.01
        assert abs(now.norm() / values.norm() - 1) < 0.06  # what one step adds


@pytest.mark.parametrize("growth", [0.0, 0.01])
@pytest.mark.parametrize(
    ("update", "dtype"), [("free", torch.float32), ("free", torch.bfloat16), ("rotation", torch.float32)]
)
def test_the_norm_is_held_or_grows_as_told(update, dtype, growth):
    """Steps along random gradients multiply ‖W‖ by more than e in 100 steps if it is not held."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(48, 32).to(dtype))
    start = weight.detach().float().norm()
    before = torch.linalg.svdvals(weight.detach().float())
    groups = [{"params": [weight], "lr": 0.05, "rotate": True}]
    optimizer = POETX(groups, block_size=16, update=update, norm_growth=growth)
    for _ in range(300):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert abs(weight.detach().float().norm() / start / (1 + 300 * growth) ** 0.5 - 1) < 0.05
    if update == "rotation":  # every singular value alike
        ratios = torch.linalg.svdvals(weight.detach()) / before
        assert torch.allclose(ratios, ratios.mean().expand_as(ratios), rtol=1e-3)


def test_bfloat16_weights_keep_their_spectrum():
    model, x, y = problem(torch.bfloat16)
    start = torch.linalg.svdvals(model[0].weight.detach().double())
    losses = train(model, x, y, POETX(model, lr=3e-3, block_size=8, angle=0.015, update="rotation"), 300)
    assert losses[-1] < 0.6 * losses[0]
    now = torch.linalg.svdvals(model[0].weight.detach().double())
    assert ((now - start).abs() / start).median() < 6e-3
    assert abs(now.norm() / start.norm() - 1) < 1e-3


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        *(({}, torch.bfloat16), ({"norm_growth": 0.02}, torch.float32), ({"nesterov": False}, torch.float32)),
        ({"update": "rotation"}, torch.float32),
        *(({"update": "rotation"} | variant, torch.bfloat16) for variant in VARIANTS),
    ],
    ids=str,
)
def test_save_load_continue_is_bitwise(settings, dtype, converted):
    def start():
        model, x, y = problem(dtype)
        chosen = {"block_size": 8} | settings
        if converted:
            of_layers = {key: chosen.pop(key) for key in ("block_size", "update") if key in chosen}
            convert_(model, PoetConfig(method="single-step", **of_layers))
        return model, x, y, POETX(model, lr=3e-3, angle=0.02, **chosen)

    model, x, y, optimizer = start()
    want = train(model, x, y, optimizer, 12)
    model, x, y, optimizer = start()
    got = train(model, x, y, optimizer, 5)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    model, x, y, optimizer = start()
    train(model, x, y, optimizer, 3)
    file.seek(0)
    saved = torch.load(file)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert got + train(model, x, y, optimizer, 7) == want


def test_a_stack_of_matrices_is_turned_like_its_matrices():
    matrices = torch.randn(3, 12, 8)
    stack = nn.Parameter(matrices.clone())
    single = [nn.Parameter(m.clone()) for m in matrices]
    target = torch.randn(3, 12, 8)
    together = POETX([{"params": [stack], "lr": 0.01, "rotate": True}], block_size=4)
    apart = POETX([{"params": single, "lr": 0.01, "rotate": True}], block_size=4)
    for _ in range(4):
        (stack - target).square().sum().backward()
        sum((p - t).square().sum() for p, t in zip(single, target, strict=True)).backward()
        for optimizer in (together, apart):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]))


@pytest.mark.parametrize("build", [llama, gpt2, mlp])
def test_a_model_is_taken_as_it_is(build):
    model = build()
    optimizer = POETX(model, block_size=16)
    groups = {group["name"]: group for group in optimizer.param_groups}
    covered = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim == 2 for p in groups["rotated"]["params"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    x = torch.randn(2, 11) if build is mlp else torch.zeros(2, 4, dtype=torch.int64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = model(x)
    (out if build is mlp else out.logits).square().sum().backward()
    optimizer.step()
    scheduler.step()
    assert groups["rotated"]["lr"] == 0.006
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any("weight" in name for name in moved)


def state_bytes(optimizer):
    return sum(v.nbytes for p in optimizer.state for v in optimizer.state[p].values() if torch.is_tensor(v))


@pytest.mark.parametrize(
    ("shapes", "share"),
    [
        ([(4096, 4096)] * 4 + [(14336, 4096)] * 2 + [(4096, 14336)], 0.04),
        ([(2304, 768), (768, 768), (3072, 768), (768, 3072)], 0.12),
    ],
    ids=["llama-8b", "gpt2"],
)
@pytest.mark.parametrize(("update", "block_size"), [("rotation", 256), ("free", 128)])
def test_momentum_is_a_small_part_of_adamws_state(shapes, update, block_size, share):
    """b(m+n)/2 numbers (free: twice) beside AdamW's 2mn, in bytes of one decoder layer's real state."""
    adamw = 2 * 4 * sum(m * n for m, n in shapes)
    for dtype, nesterov, factor in (("float32", False, 1), ("float32", True, 1.75), ("bfloat16", True, 0.875)):
        model = nn.Sequential(*[nn.Linear(n, m, bias=False, device="meta") for m, n in shapes])
        settings = {"block_size": block_size, "update": update, "rotation_dtype": dtype}
        convert_(model, PoetConfig(method="single-step", **settings))
        # The look-ahead keeps a copy of the side that is written next: of the larger one, three quarters here.
        assert 0.4 * factor < state_bytes(POETX(model, nesterov=nesterov)) / adamw / share < factor


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partitions": 2}, "partitions=2 is gone: one contiguous partition"),
        ({"rule": "adam"}, "rule='adam' is gone"),
        ({"block_size": 1}, "block_size=1"),
        ({"update": "any"}, "update='any': must be one of 'rotation', 'free'"),
        ({"target_modules": ("nothing",)}, "matches no linear layer"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(UserError, match=message):
        POETX(mlp(), **settings)


def test_more_refusals():
    with pytest.raises(UserError, match="nothing would be rotated"):
        POETX([{"params": [nn.Parameter(torch.zeros(3, 3))]}])
    with pytest.raises(UserError, match=r"shape \(3,\)"):
        POETX([{"params": [nn.Parameter(torch.zeros(3))], "rotate": True}])
    with pytest.raises(UserError, match="groups cannot be added later"):
        POETX(mlp(), block_size=4).add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(UserError, match="give a model, its parameters"):
        POETX([1, 2])
    model = mlp()
    convert_(model, PoetConfig(method="single-step", block_size=4))
    model.requires_grad_(False)
    with pytest.raises(UserError, match=r"all \d converted layers are frozen"):
        POETX(model)


def test_names_of_older_versions_are_taken_with_a_warning():
    with pytest.warns(DeprecationWarning, match="spectrum is update now"):
        optimizer = POETX(mlp(), block_size=4, spectrum="free", partitions=1)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_in"].shape[1:] == (4, 4)
    with pytest.warns(DeprecationWarning, match="base is dense_optimizer now"):
        assert isinstance(POETX(mlp(), base=torch.optim.Adagrad).base, torch.optim.Adagrad)
    with pytest.warns(DeprecationWarning, match="betas is dense_optimizer now"):
        assert POETX(mlp(), betas=(0.9, 0.95)).param_groups[1]["betas"] == (0.9, 0.95)


def test_a_closure_is_called_once_and_its_loss_returned():
    models = [mlp(), mlp()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [POETX(model, block_size=4) for model in models]
    for _ in range(3):
        x, calls = torch.randn(5, 11), []

        def closure(x=x, calls=calls):
            calls.append(None)
            optimizers[0].zero_grad()
            loss = models[0](x).square().mean()
            loss.backward()
            return loss

        optimizers[1].zero_grad()
        want = models[1](x).square().mean()
        want.backward()
        assert optimizers[1].step() is None
        assert torch.equal(optimizers[0].step(closure), want)
        assert len(calls) == 1
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "dense", [None, lambda rest: torch.optim.SGD(rest, lr=0.1, momentum=0.5)], ids=["adamw", "sgd"]
)
def test_schedulers_that_cycle_the_momentum(dense):
    optimizer = POETX(mlp(), block_size=4, dense_optimizer=dense)
    assert [group.get("momentum") for group in optimizer.param_groups][1:] == [0.5 if dense else None]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], total_steps=10
    )
    first = optimizer.param_groups[0]["momentum"]
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] < first
    rates = [group["lr"] for group in optimizer.param_groups]
    torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=[rate / 10 for rate in rates], max_lr=rates)


def test_parameters_in_place_of_a_model():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 8), "body": nn.Linear(8, 8), "lm_head": nn.Linear(8, 9)})
    optimizer = POETX(model.named_parameters(), block_size=4)
    groups = {group["name"]: [id(p) for p in group["params"]] for group in optimizer.param_groups}
    assert groups["rotated"] == [id(model["body"].weight)]
    assert groups["decay"] == [id(model["embed"].weight), id(model["lm_head"].weight)]
    model["body"].bias.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"all 3 matrices are rotated; give the model"):
        optimizer = POETX(model.parameters(), block_size=4)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 1]
    convert_(model, PoetConfig(method="single-step", block_size=4))
    with pytest.raises(UserError, match="give the model"):
        POETX(model.parameters())


@pytest.mark.parametrize("form", ["model", "groups"])
def test_a_matrix_of_zeros_learns_all_the_same(form):
    torch.manual_seed(0)
    model = mlp()
    last = model[-1].weight
    nn.init.zeros_(last)
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": [p for p in model.parameters() if p.ndim == 2], "rotate": True}, {"params": rest}]
    with pytest.warns(UserWarning, match="all zeros, which no rotation moves; the dense optimizer trains"):
        optimizer = POETX(model if form == "model" else groups, lr=1e-2, block_size=4)
    for _ in range(20):
        descend((model(torch.randn(16, 11)) - 1).square().mean(), optimizer)
    assert last.abs().max() > 0.05
    assert sorted(id(p) for g in optimizer.param_groups for p in g["params"]) == sorted(map(id, model.parameters()))


def assign(weight, values):
    weight.data = values.clone()


WRITES = {  # only the first is seen in the weight's version
    "in place": lambda weight, values: weight.detach().copy_(values),
    "data": lambda weight, values: weight.data.copy_(values),
    "assigned": assign,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("converted", "dtype", "settings"),
    [
        (True, torch.float32, {"update": "rotation"}),
        (True, torch.bfloat16, {"update": "rotation"}),
        (False, torch.float32, {"update": "free", "angle": 0.001}),
        (False, torch.bfloat16, {"update": "rotation", "norm_growth": 0.001}),
    ],
    ids=str,
)
def test_the_norm_that_is_held_is_that_of_the_weights_trained(converted, dtype, settings, write):
    """Others at construction, weights written before the first step, others after it, and the same ones put back."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False, dtype=dtype))
    settings = {"block_size": 16} | settings
    if converted:
        convert_(model, PoetConfig(method="single-step", **settings))
    optimizer = POETX(model, **({} if converted else settings))
    weight, growth = model[0].weight, settings.get("norm_growth", 0.0)

    def steps(count):
        for _ in range(count):
            descend(model(torch.randn(8, 32, dtype=dtype)).exp().mean(), optimizer)

    taken = 0
    for factor in (1.0, 0.1, 3.0):
        wanted = torch.randn(32, 32).mul(0.1 * factor).to(dtype)
        WRITES[write](weight, wanted)
        steps(3)
        norm = wanted.float().norm() * ((1 + growth * (taken + 3)) / (1 + growth * taken)) ** 0.5
        tolerance = 2e-3 if dtype == torch.bfloat16 or settings["update"] == "free" else 1e-5
        assert abs(weight.detach().float().norm() / norm - 1) < tolerance
        held, trained = optimizer.state[weight]["norm"].clone(), weight.detach().clone()
        WRITES[write](weight, torch.zeros_like(trained))
        WRITES[write](weight, trained)
        steps(1)
        taken += 4
        assert torch.equal(optimizer.state[weight]["norm"], held)


def test_of_a_stack_each_matrix_holds_the_norm_it_was_written_with():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 24, 16))
    optimizer = POETX([{"params": [stack], "lr": 0.01, "rotate": True}], block_size=8, update="rotation")

    def steps(count):
        for _ in range(count):
            stack.grad = torch.randn_like(stack)
            optimizer.step()
        return torch.linalg.matrix_norm(stack.detach())

    before = steps(4)
    stack.data[1].uniform_(-1, 1)
    written = torch.linalg.matrix_norm(stack.detach())
    assert abs(written[1] / before[1] - 1) > 0.3
    torch.testing.assert_close(steps(4), torch.where(torch.tensor([False, True, False]), written, before))


def test_what_a_group_leaves_open_is_the_arguments_or_the_bases():
    def rates(model, **settings):
        optimizer = POETX(model, block_size=4, **settings)
        return [(g.get("name"), g["lr"], g.get("weight_decay")) for g in optimizer.param_groups]

    def sgd(rest):
        return torch.optim.SGD(rest, lr=0.1, weight_decay=0.5)

    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8))
    assert rates(model, angle=0.1)[0][1] == 0.1
    assert rates(model)[1:] == [("decay", 1e-3, 0.0), ("no_decay", 1e-3, 0.0)]
    assert rates(model, dense_optimizer=sgd)[1:] == [("decay", 0.1, 0.5), ("no_decay", 0.1, 0.0)]
    assert rates(model, lr=0.2, weight_decay=0.0, dense_optimizer=sgd)[1:] == [
        ("decay", 0.2, 0.0),
        ("no_decay", 0.2, 0.0),
    ]
    groups = [{"params": [model[1].weight], "rotate": True}, {"params": [model[1].bias]}]
    assert [rate for _, rate, _ in rates(groups, angle=0.1)] == [0.1, 1e-3]
    assert [rate for _, rate, _ in rates(groups, lr=0.3, angle=0.1)] == [0.1, 0.3]
    groups[0] |= {"lr": 0.02}
    groups[1] |= {"lr": 0.03}
    assert [rate for _, rate, _ in rates(groups, angle=0.1, dense_optimizer=sgd)] == [0.02, 0.03]
    assert set(groups[1]) == {"params", "lr"}  # as they were given


def test_hooks_do_not_keep_a_layer_of_an_ordinary_model_from_its_rotation():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].register_forward_hook(lambda *_: None)
    model[1].forward = lambda x: nn.functional.linear(x, model[1].weight)
    rotated, _ = POETX(model, block_size=4).param_groups
    assert [id(p) for p in rotated["params"]] == [id(layer.weight) for layer in model]


def test_released_gradients_come_back_when_the_optimizer_goes():
    model = mlp()
    weight = model[0].weight

    def gradient():
        weight.grad = None
        model(torch.randn(2, 11)).exp().sum().backward()
        return weight.grad

    optimizer = POETX(model, block_size=4, release_gradients=True)
    assert gradient() is None
    with pytest.raises(UserError, match=r"call its close\(\) first"):
        POETX(model, block_size=4, release_gradients=True)
    assert gradient() is None
    optimizer.close()
    assert gradient() is not None
    optimizer = POETX(model, block_size=4, release_gradients=True)
    assert gradient() is None
    del optimizer
    assert gradient() is not None
    optimizer = POETX(model, block_size=4, release_gradients=True)
    before = weight.detach().clone()
    gradient()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_one_optimizer_at_a_time_trains_a_converted_model():
    model = mlp()
    convert_(model, PoetConfig(method="single-step", block_size=4))
    first = POETX(model)
    with pytest.raises(UserError, match=r"another one trains 0 already; call its close\(\) first"):
        POETX(model)
    assert model[0].momentum is not None
    first.close()
    assert model[0].momentum is None
    second = POETX(model)
    first.close()  # lets go of what is its own only
    assert model[0].momentum is not None
    del second  # nobody else could close it
    POETX(model)


def test_older_arguments_beside_their_new_names_are_refused():
    def sgd(groups):
        return torch.optim.SGD(groups, lr=0.1)

    for older in ({"base": sgd, "dense_optimizer": sgd}, {"betas": (0.5, 0.6), "dense_optimizer": sgd}):
        with pytest.raises(UserError, match="are both given"):
            POETX(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), **older)
    with pytest.raises(UserError, match="are both given"):
        POETX(nn.Linear(8, 8), spectrum="fixed", update="free")
    with pytest.raises(UserError, match="dense_optimizer='adamw': must be a function"):
        POETX(nn.Linear(8, 8), dense_optimizer="adamw")


def test_a_layer_that_went_dense_is_not_trained_in_silence():
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    convert_(model, PoetConfig(method="single-step", block_size=8))
    optimizer = POETX(model, lr=1e-2)
    to_dense_(model)
    model(torch.randn(4, 16)).square().sum().backward()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match=r"0\.weight was made dense by to_dense_; build"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_every_layer_is_trained_by_the_settings_it_was_converted_with():
    """Two models in one optimizer go the way that each of them goes in its own."""
    settings = [
        {
            "block_size": 4,
            "update": "rotation",
            "rotation_dtype": "bfloat16",
            "seed": 5,
        },  # the first: noise is by place
        {"block_size": 16, "update": "free"},
        {"block_size": 16, "update": "rotation"},
    ]

    def build(chosen):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40, bias=False), nn.GELU(), nn.Linear(40, 16, bias=False))
        convert_(model, PoetConfig(method="single-step", **chosen))
        return model

    together, apart = (nn.ModuleList(map(build, settings)) for _ in range(2))
    optimizers = [[POETX(together)], [POETX(model) for model in apart]]
    for seed in range(5):
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(seed))
        for models, steps in zip((together, apart), optimizers, strict=True):
            sum(model(x).square().sum() for model in models).backward()
            for optimizer in steps:
                optimizer.step()
    for p, q in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    with pytest.raises(UserError, match=r"block_size=4, but 1\.0 was converted with 16"):
        POETX(nn.ModuleList(map(build, settings)), block_size=4)


def test_a_layer_of_the_other_method_is_refused_unless_frozen():
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 16)), nn.GELU(), nn.Sequential(nn.Linear(16, 8)))
    convert_(model[2], PoetConfig(block_size=8))
    with pytest.raises(UserError, match=r"POETX: 2\.0 was converted with method='poet-x'"):
        POETX(model)
    convert_(model[0], PoetConfig(method="single-step", block_size=8))
    with pytest.raises(UserError, match=r"POETX: 2\.0 was converted with method='poet-x'"):
        POETX(model)
    model[2].requires_grad_(False)
    assert [id(p) for p in POETX(model).param_groups[0]["params"]] == [id(model[0][0].weight)]


class Ends(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.copy = nn.Embedding(12, 10), nn.Embedding(12, 10)
        self.first, self.second, self.head = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 12, bias=False)


TIES = {
    "table.weight is tied to head.weight": lambda m: setattr(m.table, "weight", m.head.weight),
    "copy.weight is tied to head.weight": lambda m: setattr(m.head, "weight", m.copy.weight),
    "first.weight is tied to second.weight": lambda m: setattr(m.second, "weight", m.first.weight),
}


@pytest.mark.parametrize("words", TIES)
def test_weights_that_were_tied_after_the_conversion_are_refused(words):
    model = Ends()
    convert_(model, PoetConfig(method="single-step", block_size=4, target_modules=("first", "second", "head")))
    TIES[words](model)
    with pytest.raises(UserError, match=f"^POETX: {words}, which rotates; tie them before poetx.convert_"):
        POETX(model)
    model.head.weight, model.second.weight = (
        nn.Parameter(p.detach().clone()) for p in (model.copy.weight, model.first.weight)
    )
    model.table = nn.Embedding(12, 10)
    POETX(model)
