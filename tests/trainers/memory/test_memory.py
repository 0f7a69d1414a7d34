"""What makes a run fit on a small card: packed bases, 8-bit moments, where things wait."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.pcpo.rewards import Scores
from comfyui_pcpo.pcpo.rewards.base import on_device
from comfyui_pcpo.tests.fixtures import flux_fixture, sd3_fixture
from comfyui_pcpo.trainers.config import train_config as c
from comfyui_pcpo.trainers.config.sections import OptimizerConfig
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.families.embeds import Embeds, SharedEmbeds
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.job.preflight import preflight
from comfyui_pcpo.trainers.lora import adapters
from comfyui_pcpo.trainers.memory import offload, trajectory_store
from comfyui_pcpo.trainers.memory.low_bit import PackedLinear, pack_base
from comfyui_pcpo.trainers.run import checkpoint
from comfyui_pcpo.trainers.run.start import resume, train
from comfyui_pcpo.trainers.run.update.learner import load_moments, make_optimizer, moments_of
from safetensors.torch import load_file
from torch import nn

KINDS = ("fp8", "int8", "nf4")
CPU = torch.device("cpu")
FAMILIES = {"sd3": sd3_fixture, "flux": flux_fixture}


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    return {name: fixture.write_folder(made / name) for name, fixture in FAMILIES.items()}


def config_of(source, prompts, **sections) -> c.TrainConfig:
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    values = {
        "model": {"source": str(source), "width": 64, "height": 64, "t5_length": 16},
        "rewards": {"jpeg_incompressibility": 1.0},
        "sampler": {"transition": "flow_sde", "noise_level": 0.7, "steps": 4, "drop_last": 1},
        "advantage": {"kind": "group"},
        "prompts": {"source": str(prompts), "per_iteration": 2, "images_per_prompt": 2},
        "run": {"iterations": 2, "micro_batch": 4, "save_every": 2, "eval_prompts": 0},
    }
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    return c.TrainConfig.model_validate(values)


# --- packed weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "error"), [("fp8", 0.03), ("int8", 0.01), ("nf4", 0.1)])
def test_a_packed_layer_computes_with_its_numbers_forward_and_backward(kind, error, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(192, 128).to(dtype)
    packed = PackedLinear(layer, kind, CPU)
    weight = packed.unpack(dtype)
    assert 0 < (weight - layer.weight).norm() / layer.weight.norm() < error
    x = torch.randn(2, 3, 192, dtype=dtype, requires_grad=True)
    out = packed(x)
    assert torch.equal(out, nn.functional.linear(x, weight, layer.bias))
    grad = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], grad @ weight)
    with torch.no_grad():
        assert torch.equal(packed(x), out)
    made, whole = [], packed.unpack
    packed.unpack = lambda wanted: made.append(wanted) or whole(wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x.float()).dtype == torch.bfloat16
    assert made == [torch.bfloat16]  # never whole in float32


def test_plain_fp8_is_packed_without_loss_and_no_row_is_lost_for_another():
    torch.manual_seed(0)
    layer = nn.Linear(64, 8, bias=False)
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn).float()
    assert torch.equal(PackedLinear(layer, "fp8", CPU).unpack(torch.bfloat16).float(), layer.weight)
    layer.weight.data[0] *= 1e-6  # far below what fp8 holds by itself
    for kind in ("fp8", "int8"):
        whole = PackedLinear(layer, kind, CPU).unpack(torch.float32)
        assert torch.allclose(whole[0], layer.weight[0], rtol=0.07, atol=1e-9)
    layer.weight.data.zero_()
    for kind in KINDS:
        assert not PackedLinear(layer, kind, CPU).unpack(torch.float32).any()


def test_packing_a_float32_base_is_the_memory_that_is_said():
    layer = nn.Linear(256, 512, bias=False)
    for kind, per_weight in (("fp8", 1), ("int8", 1), ("nf4", 0.5 + 4 / 64)):
        packed = PackedLinear(layer, kind, CPU)
        size = packed.weight.nbytes + packed.scale.nbytes
        assert size == pytest.approx(256 * 512 * per_weight, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_packed_and_the_adapters_stay_float32(folders, family, kind):
    model = load_family(folders[family], dtype=torch.bfloat16)
    parameters = adapters.add_lora(model.network, 2, 2.0, model.lora_targets, seed=0)
    before = [p.detach().clone() for p in parameters]
    count = pack_base(model.network, kind, CPU)
    packed = [n for n, m in model.network.named_modules() if isinstance(m, PackedLinear)]
    assert len(packed) == count and all("transformer_blocks." in name for name in packed)
    left = [
        name
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Linear) and "blocks." in name and ".lora_" not in name
    ]
    assert not left
    assert [p.dtype for p in parameters] == [torch.float32] * len(parameters)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    trained = [p for p in model.network.parameters() if p.requires_grad]
    assert [id(p) for p in trained] == [id(p) for p in parameters]
    with adapters.reference(model.network):
        pass
    assert [p for p in model.network.parameters() if p.requires_grad] == trained


def test_sd1_has_nothing_to_pack(tmp_path):
    network = load_family(c.DEMO_FOLDER).network
    with pytest.raises(c.ConfigError, match=r"model.base is 'fp8', which is for SD3"):
        pack_base(network, "fp8", CPU)
    config = config_of(
        "demo",
        tmp_path / "p.txt",
        model={"base": "fp8", "t5_length": None},
        sampler={"transition": "ddim", "noise_level": 1.0},
    )
    with pytest.raises(c.ConfigError, match=r"for SD3.5, .* and Z-Image; set it to 'same'"):
        preflight(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_and_update_predict_the_same_to_the_bit(folders, family, kind, dtype):
    model = load_family(folders[family], dtype=dtype)
    parameters = adapters.add_lora(model.network, 2, 2.0, model.lora_targets, seed=0)
    for parameter in parameters:
        parameter.data += 0.01
    pack_base(model.network, kind, CPU)
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds = model.encode(["a cat", "a dog"])
    found = []
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        with torch.no_grad():
            rolled_out = model.predict(x, torch.tensor(0.5), embeds)
        for is_on in (False, True):
            model.set_gradient_checkpointing(is_on)
            found.append(model.predict(x, torch.tensor(0.5), embeds))
    assert torch.equal(rolled_out, found[0]) and torch.equal(rolled_out, found[1])
    found[1].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)


@pytest.mark.parametrize(
    ("family", "kind", "checkpointing"), [("flux", "fp8", True), ("sd3", "nf4", False)]
)
def test_a_packed_base_trains_and_its_export_is_a_plain_lora(
    folders, tmp_path, family, kind, checkpointing
):
    model = {"base": kind, "precision": "bfloat16", "gradient_checkpointing": checkpointing}
    config = config_of(folders[family], tmp_path / "p.txt", model=model)
    result = train(config, tmp_path / "run")
    for line in JobFolder(tmp_path / "run").metrics():
        assert line["log_ratio_max_on_policy"] == 0 and line["grad_norm"] > 0
    tensors = load_file(result.export)
    plain = load_family(folders[family])
    loaded = adapters.load_lora(plain.network, result.export)
    assert len(loaded.targets) * 3 == len(tensors)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert any(t.any() for key, t in tensors.items() if "lora_B" in key)


def test_checkpointing_changes_no_gradient_of_a_packed_base(folders):
    grads = []
    for is_on in (False, True):
        model = load_family(folders["flux"])
        parameters = adapters.add_lora(model.network, 2, 2.0, model.lora_targets, seed=0)
        for parameter in parameters:
            parameter.data += 0.01
        pack_base(model.network, "int8", CPU)
        model.set_gradient_checkpointing(is_on)
        x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        model.predict(x, torch.tensor(0.5), model.encode(["a cat", "a dog"])).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in parameters]))
    assert torch.equal(*grads) and grads[0].any()


# --- refusals ------------------------------------------------------------------------------------


def test_a_full_fine_tune_of_a_packed_base_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.base is 'int8', which freezes the weights"):
        config_of("x", tmp_path / "p.txt", model={"base": "int8"}, trainable={"kind": "full"})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"optimizer": {"kind": "adamw8bit"}},
            r"optimizer.kind is 'adamw8bit'.* install .*bitsandbytes`",
        ),
        ({"model": {"base": "nf4"}}, r"model.base is 'nf4', but bitsandbytes .* set it to 'fp8'"),
    ],
)
def test_an_absent_library_is_named_with_its_extra(folders, tmp_path, monkeypatch, sections, said):
    from comfyui_pcpo.trainers.job import preflight as module

    config = config_of(folders["sd3"], tmp_path / "p.txt", **sections)
    preflight(config)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(c.ConfigError, match=said) as error:
        preflight(config)
    assert "\n" not in str(error.value)


# --- 8-bit moments -------------------------------------------------------------------------------


def stepped(optimizer, parameters, steps, first=0):
    for step in range(first, first + steps):
        for i, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + i)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_moments_are_put_back_to_the_bit(kind):
    config = OptimizerConfig(kind=kind, lr=1e-2)
    shapes = [(64, 128), (3, 5)]  # one above 4096, one below
    straight = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = make_optimizer(config, straight)
    stepped(optimizer, straight, 3)
    kept = {name: t.clone() for name, t in moments_of(optimizer).items()}
    again = [nn.Parameter(p.detach().clone()) for p in straight]
    other = make_optimizer(config, again)
    load_moments(other, kept)
    stepped(optimizer, straight, 2, first=3)
    stepped(other, again, 2, first=3)
    for one, two in zip(straight, again, strict=True):
        assert torch.equal(one, two)
    after = moments_of(other)
    for name, tensor in moments_of(optimizer).items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype
    is_small = [t.dtype == torch.uint8 for name, t in kept.items() if name.endswith("state1")]
    assert is_small == ([True, False] if kind == "adamw8bit" else [])


def test_eight_bits_train_as_float32_nearly():
    found = {}
    for kind in ("adamw", "adamw8bit"):
        parameter = nn.Parameter(torch.zeros(64, 128))
        optimizer = make_optimizer(OptimizerConfig(kind=kind, lr=1e-2), [parameter])
        stepped(optimizer, [parameter], 10)
        found[kind] = parameter.detach()
    distance = (found["adamw"] - found["adamw8bit"]).norm() / found["adamw"].norm()
    assert 0 < distance < 0.05


def test_a_resumed_run_with_eight_bits_and_a_packed_base_has_the_same_bytes(folders, tmp_path):
    low = {"model": {"base": "fp8"}, "optimizer": {"kind": "adamw8bit", "lr": 1e-2}}
    low |= {"trainable": {"rank": 128, "alpha": 128.0}}  # tensors of 4096

    def run(name, iterations):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = {"iterations": iterations, "save_every": 2}
        return train(config_of(folders["sd3"], tmp_path / "p.txt", run=run, **low), tmp_path / name)

    straight = run("straight", 2)
    run("broken", 1)
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = resume(tmp_path / "broken", iterations=2)
    last = [tmp_path / run / "checkpoints" / "00002" for run in ("straight", "broken")]
    one, two = (folder / checkpoint.TENSORS for folder in last)
    assert one.read_bytes() == two.read_bytes()
    assert straight.export.read_bytes() == resumed.export.read_bytes()
    assert any(tensor.dtype == torch.uint8 for tensor in load_file(one).values())


# --- where things wait ---------------------------------------------------------------------------


def test_main_memory_is_chosen_for_small_cards_alone(monkeypatch):
    card = torch.device("cuda")
    for small in (True, False):
        for module in (trajectory_store, offload):
            monkeypatch.setattr(module, "is_small", lambda device, small=small: small)
        assert trajectory_store.waiting_place("auto", card) == (CPU if small else card)
        assert trajectory_store.waiting_place("cpu", card) == CPU
        assert trajectory_store.waiting_place("device", card) == card
        assert offload.is_offloaded("auto", card) == small
        assert offload.is_offloaded("always", card) and not offload.is_offloaded("never", card)
    monkeypatch.undo()
    assert not offload.is_offloaded("always", CPU) and not trajectory_store.is_small(CPU)


def test_float16_on_the_cpu_trains_to_the_same_bytes_as_on_the_device(folders, tmp_path):
    exports = []
    for place in ("device", "cpu"):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = {"store_on": place, "storage": "float16"}
        method = {"kl_weight": 0.01, "kl": "without_interval"}
        config = config_of(folders["sd3"], tmp_path / "p.txt", run=run, method=method)
        result = train(config, tmp_path / place)
        assert all(m["log_ratio_max_on_policy"] == 0 for m in JobFolder(result.folder).metrics())
        exports.append(result.export.read_bytes())
    assert exports[0] == exports[1]


def test_pairs_are_pulled_from_where_they_wait():
    from comfyui_pcpo.trainers.run.update.two_pass import Pairs

    column = torch.arange(24.0).reshape(3, 4, 2)
    pairs = Pairs.of([(2, 1), (0, 3), (1, 0)], 2, CPU)
    first, second = pairs.split(2)
    assert first.of_steps(column).tolist() == [column[2, 1].tolist(), column[0, 3].tolist()]
    assert second.of_steps(column).tolist() == [column[1, 0].tolist()] * 2
    assert second.real.tolist() == [True, False]
    # a device other than that of the rows: torch's "meta" stands for it
    away = Pairs.of([(2, 1), (0, 3)], 2, torch.device("meta"))
    assert away.of_steps(column).device.type == "meta"
    assert away.of_steps(column).shape == (2, 2)
    embeds = SharedEmbeds(Embeds(torch.eye(2)[:, None]), torch.tensor([1, 0, 1]))
    assert first.of_images(embeds).tokens[:, 0].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert away.of_images(embeds).device.type == "meta"


def test_images_of_a_prompt_share_its_embeddings():
    table = Embeds(torch.arange(4.0)[:, None, None], torch.arange(4.0)[:, None])
    found = trajectory_store.share_embeds(table, [3, 3, 1, 3], CPU)
    assert len(found) == 4 and len(found.distinct) == 2
    assert found[[0, 1, 2, 3]].tokens.flatten().tolist() == [3, 3, 1, 3]


class Judge:
    name, needs_prompt, bounds = "judge", False, (0.0, 1.0)
    complaints = fingerprint = None

    def modules(self):
        return [self.network]

    def __init__(self):
        self.network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
        self.seen = []

    def score(self, images, prompts):
        self.seen = places(self.network)
        return Scores(torch.zeros(len(prompts)))


def places(module):
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


@pytest.fixture
def a_device(monkeypatch):
    """The CPU as another device: what is moved to it is copied."""
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *given, **options: tensor.clone())
    return CPU


def test_what_is_lent_comes_back_as_it_was(a_device):
    judge = Judge()
    before = places(judge.network)
    lent = offload.LentReward(judge, a_device)
    assert (lent.name, lent.needs_prompt, lent.bounds) == ("judge", False, (0.0, 1.0))
    assert len(lent.score(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), ["a"]).values) == 1
    assert not {*judge.seen} & {*before} and len(judge.seen) == len(before) == 7
    assert places(judge.network) == before
    with pytest.raises(ValueError), on_device([judge.network], a_device):
        raise ValueError
    assert places(judge.network) == before
    assert lent.modules() == []


def test_the_autoencoder_waits_in_main_memory_where_it_is_lent(folders, a_device):
    family = load_family(folders["sd3"])
    before = places(family.vae)
    for is_lent in (True, False):
        with offload.decoding(family, a_device, is_lent=is_lent)():
            assert (places(family.vae) == before) == (not is_lent)
        assert places(family.vae) == before
