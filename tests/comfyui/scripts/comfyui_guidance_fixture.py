"""Runs inside a ComfyUI checkout's own Python: never imported by the tests themselves.

usage: python comfyui_guidance_fixture.py COMFYUI_ROOT PACK check MODELS FAMILY
       python comfyui_guidance_fixture.py COMFYUI_ROOT PACK notes MODELS
       python comfyui_guidance_fixture.py COMFYUI_ROOT PACK time MODELS

Every task prints a line `REPORT {json}`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT, PACK, TASK, MODELS, *REST = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, ROOT)
os.chdir(ROOT)

import comfy.options  # noqa: E402 (the path has to be set first)

comfy.options.enable_args_parsing()

import comfy.controlnet  # noqa: E402
import comfy.hooks  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

comfy.utils.set_progress_bar_enabled(False)
PREFIX = {"sd15": "lora_unet_", "sd35": "transformer.", "flux": "transformer."}
CHANNELS = {"sd15": 4, "sd35": 16, "flux": 16}


def pack(module):
    """A module of the pack, which is loaded by its path as ComfyUI does."""
    if "some_pack" not in sys.modules:
        file = Path(PACK) / "__init__.py"
        spec = importlib.util.spec_from_file_location(
            "some_pack", file, submodule_search_locations=[PACK]
        )
        sys.modules["some_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["some_pack"])
    return importlib.import_module(f"some_pack.{module}")


def load(family):
    if family == "flux":
        return comfy.sd.load_diffusion_model(f"{MODELS}/diffusion_models/tiny_flux.safetensors")
    path = f"{MODELS}/checkpoints/tiny_{family}.safetensors"
    return comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]


def conditioning(family, seed, weight=1.0):
    g = torch.Generator().manual_seed(seed)
    if family == "sd15":
        return [[weight * torch.randn(1, 77, 768, generator=g), {}]]
    width, pooled = (4096, 2048) if family == "sd35" else (768, 768)
    extra = {"pooled_output": torch.randn(1, pooled, generator=g)}
    if family == "flux":
        extra["guidance"] = 3.5
    return [[weight * torch.randn(1, 77, width, generator=g), extra]]


def make_lora(model, family, seed, rank, alpha, share=1.0, dora=False):
    """A random LoRA on the layers that diffusers names, fused ones by their parts."""
    g = torch.Generator().manual_seed(seed)
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    shapes = {key: value.shape for key, value in model.model.state_dict().items()}
    tensors, seen = {}, set()
    for name, target in names.items():
        key, offset = target[:2] if isinstance(target, tuple) else (target, None)
        if not name.startswith(PREFIX[family]) or (key, offset) in seen or key not in shapes:
            continue
        shape = list(shapes[key])
        if len(shape) not in (2, 4) or not key.endswith(".weight"):
            continue
        if torch.rand((), generator=g) > share:
            continue
        seen.add((key, offset))
        rows = offset[2] if offset is not None else shape[0]
        inner = shape[1:]
        size = torch.Size(inner).numel()
        down = torch.randn(rank, *inner, generator=g) / size**0.5
        up = torch.randn(rows, rank, *[1] * (len(shape) - 2), generator=g) * 0.05
        old = family == "sd15"
        tensors[f"{name}.{'lora_down' if old else 'lora_A'}.weight"] = down
        tensors[f"{name}.{'lora_up' if old else 'lora_B'}.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
        if dora:
            tensors[f"{name}.dora_scale"] = 1 + torch.rand(1, *inner, generator=g)
    return tensors


def with_lora(model, lora, strength=1.0):
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


class Sampler:
    """One prediction at one sigma; the estimate is kept as the guider gave it."""

    def __init__(self, calls=1, fault=None, scale=None):
        self.calls, self.fault, self.times = calls, fault, []
        self.told = {} if scale is None else {pack("nodes.guidance.guider").SCALE: scale}

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        extra_args = extra_args | {"model_options": extra_args["model_options"] | self.told}
        for _ in range(self.calls):
            began = time.process_time()
            self.estimate = model(x, sigmas[0] * x.new_ones(len(x)), **extra_args).clone()
            self.times.append(time.process_time() - began)
            if self.fault is not None:
                raise self.fault
        return self.estimate


def estimate(guider, family, batch, mask=None, calls=1, fault=None, side=8, scale=None):
    sampler = Sampler(calls, fault, scale)
    shape = (batch, CHANNELS[family], side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    sigmas = torch.tensor([7.0, 3.0] if family == "sd15" else [0.8, 0.5])
    options = {"denoise_mask": mask, "seed": 0}
    guider.sample(noise, torch.zeros(shape), comfy.samplers.KSAMPLER(sampler), sigmas, **options)
    return sampler


def plain(model, positive, negative, cfg):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def irg(base, tuned, positive, negative, cfg, **options):
    node = pack("nodes.guidance.nodes").PCPOImplicitRewardGuider
    given = {f"tuned_{i}": one for i, one in enumerate(tuned)}
    return node.execute(base, positive, cfg, given, negative, **options).args[0]


def check(family):
    base, Tuned = load(family), pack("nodes.guidance.guider").Tuned
    cond, uncond, own = (conditioning(family, seed) for seed in (1, 2, 3))
    loras = {
        "plain": with_lora(base, make_lora(base, family, 1, 4, 4)),
        "alpha": with_lora(base, make_lora(base, family, 2, 4, 8), 0.8),
        "part": with_lora(base, make_lora(base, family, 3, 2, 2, share=0.5)),
    }
    loras["stacked"] = with_lora(loras["plain"], make_lora(base, family, 4, 3, 3))
    loras["dora"] = with_lora(base, make_lora(base, family, 5, 4, 4, share=0.3, dora=True))
    report, worst = {"layers": len(loras["plain"].patches)}, {}

    def run(guider, batch, scale=None):
        return estimate(guider, family, batch, scale=scale).estimate

    def compare(name, guider, expected, batch, reference, scale=None):
        error = (run(guider, batch, scale) - expected).abs().max() / reference.abs().max()
        worst[name] = max(worst.get(name, 0.0), error.item())

    for cfg in (1.0, 4.0):
        for batch in (1, 3):
            d0 = run(plain(base, cond, uncond, cfg), batch)
            d = {n: run(plain(m, cond, uncond, cfg), batch) for n, m in loras.items()}
            report["effect"] = ((d["plain"] - d0).abs().max() / d0.abs().max()).item()

            def one(names, gammas, conds=(cond, uncond), scale=cfg):
                tuned = [Tuned(loras[n], g) for n, g in zip(names, gammas, strict=True)]
                return irg(base, tuned, *conds, scale)

            compare("gamma 0 is the base", one(["plain"], [0.0]), d0, batch, d0)
            for name in loras:
                compare(f"gamma 1 is {name}", one([name], [1.0]), d[name], batch, d0)
            gammas = {"plain": 0.7, "alpha": 0.5, "part": -0.3}
            total = d0 + sum(g * (d[n] - d0) for n, g in gammas.items())
            three = one(list(gammas), list(gammas.values()))
            compare("three are the sum", three, total, batch, d0)
            compare("the same guider again", three, total, batch, d0)
            mixed = d0 + 0.6 * (d["dora"] - d0) + 0.4 * (d["stacked"] - d0)
            compare("merged beside batched", one(["dora", "stacked"], [0.6, 0.4]), mixed, batch, d0)
            theirs = run(plain(loras["plain"], own, uncond, cfg), batch)
            tuned = [Tuned(loras["plain"], 0.5, positive=own)]
            halfway = d0 + 0.5 * (theirs - d0)
            compare("own prompt", irg(base, tuned, cond, uncond, cfg), halfway, batch, d0)
            late = [Tuned(loras["plain"], 1.0, end=0.01)]
            compare("out of its range", irg(base, late, cond, uncond, cfg), d0, batch, d0)
            compare("base afterwards", plain(base, cond, uncond, cfg), d0, batch, d0)
    other = with_lora(load(family), make_lora(base, family, 6, 4, 4))
    expected = run(plain(other, cond, uncond, 4.0), 2)
    d0 = run(plain(base, cond, uncond, 4.0), 2)
    two = [Tuned(other, 0.5), Tuned(loras["part"], 1.0)]
    part = run(plain(loras["part"], cond, uncond, 4.0), 2)
    total = d0 + 0.5 * (expected - d0) + (part - d0)
    compare("another file beside", irg(base, two, cond, uncond, 4.0), total, 2, d0)
    compare_others(compare, run, base, loras, family, (cond, uncond), Tuned)
    compare_shared(compare, run, base, loras, other, (cond, uncond, own), Tuned)
    compare_dtypes(compare, run, base, family, (cond, uncond), Tuned)
    compare_scaled(compare, run, base, loras, other, (cond, uncond, own), Tuned)
    report["rows"] = rows_seen(base, loras, family, cond, uncond, Tuned)
    report["regional"] = regional(base, loras["plain"], family, cond, uncond, own, Tuned)
    report["restored"] = restored(base, loras["plain"], family, cond, uncond, Tuned)
    print("REPORT", json.dumps(report | {"worst": worst}))


def compare_others(compare, run, base, loras, family, prompts, Tuned):
    """What is not a LoRA on the base: relative errors against plain runs."""
    cond, uncond = prompts
    own, guided, bypassed = loras["alpha"], loras["plain"].clone(), base.clone()
    whole = base.clone()
    whole.add_patches({key: ("diff", (change,)) for key, change in changes(base).items()}, 0.7)
    guided.set_model_sampler_post_cfg_function(lambda told: 0.9 * told["denoised"])
    lora = make_lora(base, family, 7, 4, 4)
    bypassed = comfy.sd.load_bypass_lora_for_models(base, None, lora, 1.0, 0.0)[0]
    shared = with_lora(own, make_lora(base, family, 8, 3, 3, share=0.6))
    d = {
        name: run(plain(model, *prompts, 4.0), 2)
        for name, model in {**loras, "whole": whole, "bypassed": bypassed, "shared": shared}.items()
    }
    d0 = run(plain(base, *prompts, 4.0), 2)
    halves = {"whole": whole, "bypassed": bypassed, "plain": loras["plain"]}
    expected = d0 + sum(0.5 * (d[name] - d0) for name in halves)
    three = irg(base, [Tuned(model, 0.5) for model in halves.values()], *prompts, 4.0)
    compare("whole weights, bypass and LoRA", three, expected, 2, d0)
    away = d["alpha"] + 0.5 * (d["shared"] - d["alpha"]) - 0.5 * (d["plain"] - d["alpha"])
    tuned = [Tuned(shared, 0.5), Tuned(loras["plain"], -0.5)]
    compare("a base with a LoRA of its own", irg(own, tuned, *prompts, 4.0), away, 2, d0)
    twice = d["bypassed"] + 0.5 * (d0 - d["bypassed"])
    compare("a base with bypass", irg(bypassed, [Tuned(base, 0.5)], *prompts, 4.0), twice, 2, d0)
    led = run(plain(guided, *prompts, 4.0), 2)
    bare = base.clone()
    bare.set_model_sampler_post_cfg_function(lambda told: 0.9 * told["denoised"])
    nine = run(plain(bare, *prompts, 4.0), 2)
    compare("a patch after guidance", irg(bare, [Tuned(guided, 1.0)], *prompts, 4.0), led, 2, d0)
    half = nine + 0.5 * (led - nine)
    compare("the half of that", irg(bare, [Tuned(guided, 0.5)], *prompts, 4.0), half, 2, d0)
    if family == "sd15":
        hinted = [
            [t, e | {"control": Control(base), "control_apply_to_uncond": True}] for t, e in cond
        ]
        c0, c1 = (run(plain(m, hinted, uncond, 4.0), 2) for m in (base, loras["plain"]))
        assert not torch.equal(c0, d0)
        half = irg(base, [Tuned(loras["plain"], 0.5)], hinted, uncond, 4.0)
        compare("with a control", half, c0 + 0.5 * (c1 - c0), 2, d0)


def compare_dtypes(compare, run, base, family, prompts, Tuned):
    """Files of other dtypes, alpha too, which ComfyUI multiplies in float32: relative errors."""
    stored = make_lora(base, family, 9, 4, 3)
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64):
        model = with_lora(base, {key: tensor.to(dtype) for key, tensor in stored.items()})
        expected = run(plain(model, *prompts, 1.0), 1)
        compare(
            f"a file of {dtype}",
            irg(base, [Tuned(model, 1.0)], *prompts, 1.0),
            expected,
            1,
            expected,
        )


def compare_shared(compare, run, base, loras, other, prompts, Tuned):
    """The negative prompt by the base alone: relative errors against plain runs."""
    cond, uncond, own = prompts
    models = {name: loras[name] for name in ("plain", "alpha", "dora")} | {"other": other}
    c = {name: run(plain(model, cond, uncond, 1.0), 2) for name, model in models.items()}
    c0, d0 = (run(plain(base, cond, uncond, cfg), 2) for cfg in (1.0, 4.0))
    tuned = [Tuned(model, 0.5) for model in models.values()]
    guider = irg(base, tuned, cond, uncond, 4.0, share_negative=True)
    expected = d0 + sum(0.5 * (one - c0) for one in c.values())
    compare("negative shared", guider, expected, 2, d0)
    alone = irg(base, tuned, cond, uncond, 1.0, share_negative=True)
    compare("negative shared, no cfg", alone, expected - d0 + c0, 2, d0)
    theirs = run(plain(loras["plain"], cond, own, 4.0), 2)
    tuned = [Tuned(loras["plain"], 0.5, negative=own)]
    guider = irg(base, tuned, cond, uncond, 4.0, share_negative=True)
    compare("a negative of its own", guider, d0 + 0.5 * (theirs - d0), 2, d0)


def compare_scaled(compare, run, base, loras, other, prompts, Tuned):
    """Gammas times a number that the sampler gives: relative errors against plain runs."""
    cond, uncond, own = prompts
    c = {n: run(plain(loras[n], cond, uncond, 1.0), 2) for n in ("plain", "part")}
    c0, d0 = (run(plain(base, cond, uncond, cfg), 2) for cfg in (1.0, 4.0))
    beside = run(plain(other, cond, uncond, 4.0), 2)
    theirs = run(plain(loras["plain"], own, uncond, 4.0), 2)
    late = Tuned(loras["part"], 1.0, end=0.01)
    tuned = [Tuned(loras["plain"], 0.5, positive=own), Tuned(other, 1.0), late]
    guider = irg(base, tuned, cond, uncond, 4.0)
    expected = d0 + 0.3 * (0.5 * (theirs - d0) + beside - d0)
    compare("scaled", guider, expected, 2, d0, 0.3)
    compare("no longer scaled", guider, d0 + 0.5 * (theirs - d0) + beside - d0, 2, d0)
    tuned = [Tuned(loras["plain"], 1.0), Tuned(loras["part"], 0.5)]
    shared = irg(base, tuned, cond, uncond, 4.0, share_negative=True)
    expected = d0 + 1.4 * (c["plain"] - c0 + 0.5 * (c["part"] - c0))
    compare("scaled, negative shared", shared, expected, 2, d0, 1.4)


def rows_seen(base, loras, family, cond, uncond, Tuned):
    """Rows in the network in a step of one image: three versions, one in its range, both shared."""
    seen, counted = [], base.clone()

    def count(apply, told):
        seen.append(len(told["input"]))
        return apply(told["input"], told["timestep"], **told["c"])

    counted.set_model_unet_function_wrapper(count)
    models = [loras[name] for name in ("plain", "alpha", "part")]
    three = [Tuned(model, 0.5) for model in models]
    late = three[:1] + [Tuned(model, 0.5, start=0.99) for model in models[1:]]
    for tuned, share in ((three, False), (late, False), (three, True), (late, True)):
        seen.append("|")
        estimate(irg(counted, tuned, cond, uncond, 4.0, share_negative=share), family, 1)
    return " ".join(map(str, seen))


def changes(base):
    """Other values for a third of the linear weights, of the norms and of the biases."""
    g, found = torch.Generator().manual_seed(11), {}
    for key, value in base.model.state_dict().items():
        is_chosen = torch.rand((), generator=g) < 1 / 3 and layer_of(base.model, key) is not None
        if is_chosen and key.startswith("diffusion_model."):
            size = 0.05 * value.float().std().nan_to_num(0.1).clamp_min(1e-2)
            found[key] = size * torch.randn(value.shape, generator=g)
    return found


def layer_of(network, key):
    """The layer a parameter belongs to, where that computes with it by itself."""
    layer = network.get_submodule(key.rpartition(".")[0])
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm)
    return layer if isinstance(layer, kinds) else None


class Control(comfy.controlnet.ControlBase):
    """Adds to the middle block what depends on the latents of each row, and on its prompt."""

    def __init__(self, model):
        super().__init__()
        self.width = model.model.diffusion_model.middle_block[0].out_channels

    def get_control(self, x, t, cond, batched_number, transformer_options):
        mean = x.flatten(1).mean(1) + cond["c_crossattn"].flatten(1).mean(1)
        return {"middle": [mean[:, None, None, None].expand(-1, self.width, 1, 1)]}


def regional(base, tuned, family, cond, uncond, own, Tuned):
    """Two prompts with areas, and a mask on the latents: relative error against plain runs."""
    area = [[own[0][0], own[0][1] | {"area": (4, 8, 0, 0), "strength": 1.0}]]
    both = cond + area
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :, 4:] = 1
    alone = [estimate(plain(m, both, uncond, 4.0), family, 2, mask).estimate for m in (base, tuned)]
    guided = estimate(irg(base, [Tuned(tuned, 0.5)], both, uncond, 4.0), family, 2, mask).estimate
    expected = alone[0] + 0.5 * (alone[1] - alone[0])
    return ((guided - expected).abs().max() / expected.abs().max()).item()


def restored(base, tuned, family, cond, uncond, Tuned):
    """After an interrupt and an exception: the base's weights and predictions are the same."""
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    first = estimate(plain(base, cond, uncond, 4.0), family, 1).estimate
    for fault in (comfy.model_management.InterruptProcessingException(), ValueError("broken")):
        guider = irg(base, [Tuned(tuned, 1.0)], cond, uncond, 4.0)
        try:
            estimate(guider, family, 1, fault=fault)
            return "the fault was swallowed"
        except type(fault):
            pass
        again = estimate(plain(base, cond, uncond, 4.0), family, 1).estimate
        if not torch.equal(first, again):
            return "the base predicts otherwise"
    after = base.model.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[k], after[k]) for k in before):
        return "the base has other weights"
    return "yes"


def notes():
    """What PCPO Tuned LoRA says of a file with a text encoder's part and a scale in its header."""
    base, said = load("sd15"), []
    lora = make_lora(base, "sd15", 1, 4, 4)
    lora = {key: tensor for key, tensor in lora.items() if not key.endswith(".alpha")}
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{}.weight"
    lora |= {text.format("down"): torch.zeros(4, 768), text.format("up"): torch.zeros(3072, 4)}
    noted = {"unet.r": 4, "unet.lora_alpha": 4, "unet.use_rslora": True}
    with tempfile.TemporaryDirectory() as folder:
        metadata = {"lora_adapter_metadata": json.dumps(noted)}
        safetensors.torch.save_file(lora, f"{folder}/a.safetensors", metadata)
        folder_paths.add_model_folder_path("loras", folder)
        guidance = pack("nodes.guidance.nodes")
        guidance.show_text = lambda text, node: said.append(text)
        guidance.PCPOTunedLora.hidden = types.SimpleNamespace(unique_id="1")
        guidance.PCPOTunedLora.execute(base, "a.safetensors", 1.0, 0.0, 1.0)
    print("REPORT", json.dumps(said))


def times(side=8, batch=1, counts="1,3,5", rank=4, rounds=3, hooks=""):
    """Processor seconds a step on the SD1.x fixture: plain ones, and guided by so many LoRAs.

    "wide" is a plain step of N + 1 times the images, "hooks" the same guidance by ComfyUI's hooks.
    """
    torch.set_num_threads(1)
    base, Tuned = load("sd15"), pack("nodes.guidance.guider").Tuned
    prompts = (conditioning("sd15", 1), conditioning("sd15", 2))
    side, batch, rank, rounds = int(side), int(batch), int(rank), int(rounds)
    counts = [int(count) for count in counts.split(",")]
    files = [make_lora(base, "sd15", seed, rank, rank) for seed in range(max(counts))]
    tuned = [Tuned(with_lora(base, lora), 0.3) for lora in files]
    guiders = {"plain": (plain(base, *prompts, 4.0), batch)}
    for n in counts:
        guiders[f"wide N={n}"] = (guiders["plain"][0], batch * (n + 1))
        for name, share in (("", False), (" shared", True)):
            guider = irg(base, tuned[:n], *prompts, 4.0, share_negative=share)
            guiders[f"N={n}{name}"] = (guider, batch)
        if hooks:
            guiders[f"hooks N={n}"] = (hooked(base, files[:n], *prompts), batch)
    seconds = {name: [] for name in guiders}
    for _ in range(rounds):
        for name, (guider, images) in guiders.items():
            found = estimate(guider, "sd15", images, calls=3, side=side).times
            seconds[name].append(min(found[1:]))
    print("REPORT", json.dumps({name: statistics.median(t) for name, t in seconds.items()}))


def hooked(base, files, cond, uncond):
    """The same guidance by ComfyUI's LoRA hooks: weights are swapped for each version."""

    class Hooked(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            conds = [c for pair in self.pairs for c in (self.conds[pair[0]], self.conds[pair[1]])]
            outs = comfy.samplers.calc_cond_batch(
                self.inner_model, conds, x, timestep, model_options
            )
            d = [n + 4.0 * (p - n) for p, n in zip(outs[::2], outs[1::2], strict=True)]
            return d[0] + sum(0.3 * (one - d[0]) for one in d[1:])

    guider = Hooked(base)
    conds = {"positive": cond, "negative": uncond}
    for i, lora in enumerate(files):
        hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
        for name, given in (("positive", cond), ("negative", uncond)):
            conds[f"{name} {i}"] = comfy.hooks.set_hooks_for_conditioning(given, hooks)
    guider.pairs = [("positive", "negative")] + [
        (f"positive {i}", f"negative {i}") for i in range(len(files))
    ]
    guider.inner_set_conds(conds)
    return guider


if __name__ == "__main__":
    {"check": check, "time": times, "notes": notes}[TASK](*REST)
