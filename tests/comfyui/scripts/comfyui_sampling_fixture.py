"""Runs inside a ComfyUI checkout's own Python: never imported by the tests themselves.

usage: python comfyui_sampling_fixture.py COMFYUI_ROOT PACK stock MODELS
       python comfyui_sampling_fixture.py COMFYUI_ROOT PACK demo FOLDER
       python comfyui_sampling_fixture.py COMFYUI_ROOT PACK overhead CHECKPOINT

Every task prints a line `REPORT {json}`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path

ROOT, PACK, TASK, *PATHS = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, ROOT)
os.chdir(ROOT)

import comfy.options  # noqa: E402 (the path has to be set first)

comfy.options.enable_args_parsing()

import comfy.model_management as management  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_custom_sampler import (  # noqa: E402
    Noise_RandomNoise,
    SamplerCustomAdvanced,
)
from safetensors.torch import load_file, save_file  # noqa: E402

comfy.utils.set_progress_bar_enabled(False)


class Warnings(logging.Handler):
    """What is logged as a warning or worse."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []
        logging.getLogger().addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())


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


def given(node, *arguments):
    """What a node gives, a single output by itself."""
    outputs = node.execute(*arguments).args
    return outputs[0] if len(outputs) == 1 else outputs


def guider_of(model, positive, negative, cfg):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def irg(base, tuned, positive, negative, cfg, gamma=1.0):
    """PCPO Implicit Reward Guider of one tuned MODEL."""
    module = pack("nodes.guidance.nodes")
    one = given(module.PCPOTunedModel, tuned, gamma, 0.0, 1.0)
    return given(module.PCPOImplicitRewardGuider, base, positive, cfg, {"tuned_0": one}, negative)


def sampled(noise, guider, sampler, sigmas, latent):
    return SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"]


def sampler(transition="auto", noise_level=-1.0, credit="native", ends="as trained"):
    node = pack("nodes.sampling.nodes").PCPOSdeSampler
    return given(node, transition, noise_level, credit, ends)


def refused(action):
    """What an action is refused with."""
    try:
        action()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


# --- against the stock samplers --------------------------------------------------------------


def load(models, kind):
    """(MODEL, positive, negative, empty latents) of a tiny checkpoint; random text embeddings."""
    generator = torch.Generator().manual_seed(0)
    folder, file = {
        "sd15": ("checkpoints", "tiny_sd15"),
        "sd35": ("checkpoints", "tiny_sd35"),
        "flux": ("diffusion_models", "tiny_flux"),
    }[kind]
    path = str(Path(models) / folder / f"{file}.safetensors")
    if kind == "flux":
        model = comfy.sd.load_diffusion_model(path)
    else:
        model = comfy.sd.load_checkpoint_guess_config(path, output_clip=False, output_vae=False)[0]
    width, pooled = {"sd15": (768, 768), "sd35": (4096, 2048), "flux": (768, 768)}[kind]
    conds = [
        [[torch.randn(1, 77, width, generator=generator), {"pooled_output": zeros}]]
        for zeros in (torch.zeros(1, pooled), torch.zeros(1, pooled))
    ]
    channels = 4 if kind == "sd15" else 16
    return model, *conds, {"samples": torch.zeros(2, channels, 8, 8)}


def difference(ours, theirs):
    """Largest difference, as a part of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def stock(models):
    report = {kind: against_stock(models, kind) for kind in ("sd15", "sd35", "flux")}
    report["errors"] = wrong_family(models)
    print("REPORT", json.dumps(report))


def against_stock(models, kind):
    model, positive, negative, empty = load(models, kind)
    sampling, noise = model.get_model_object("model_sampling"), Noise_RandomNoise(5)
    theirs = comfy.samplers.sampler_object("ddim" if kind == "sd15" else "euler")
    quiet = sampler(noise_level=0.0, ends="as ComfyUI")
    image = torch.randn(empty["samples"].shape, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., :32] = 1
    found = {}
    for scheduler in ("normal", "simple", "karras", "ddim_uniform", "pcpo"):
        if scheduler == "karras" and kind != "sd15":
            continue
        if scheduler == "pcpo":
            sigmas = given(pack("nodes.sampling.nodes").PCPOScheduler, model, 6, "auto", 1.0)
        else:
            sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, 6)
        for cfg in (1.0, 4.0) if scheduler == "normal" else (4.0,):
            guider = guider_of(model, positive, negative, cfg)
            pair = [sampled(noise, guider, s, sigmas, empty) for s in (quiet, theirs)]
            found[f"{scheduler} {cfg}"] = difference(*pair)
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 6)
    euler = comfy.samplers.sampler_object("euler")
    for name, latent in {
        "image to image": {"samples": image},
        "inpaint": {"samples": image, "noise_mask": mask},
    }.items():
        pair = [sampled(noise, guider, s, sigmas[2:], latent) for s in (quiet, euler)]
        found[name] = difference(*pair)
    masked = sampled(noise, guider, sampler(), sigmas, {"samples": image, "noise_mask": mask})
    change = (masked - image).abs()
    return {
        "differences": found,
        "masked": [float(change[..., 4:].max()), float(change[..., :4].mean())],
    }


def wrong_family(models):
    """Refusals before the network has run."""
    nodes, noise, found = pack("nodes.sampling.nodes"), Noise_RandomNoise(0), {}
    for kind, wrong in (("sd15", "flow_sde"), ("flux", "ddim")):
        model, positive, negative, empty = load(models, kind)
        guider = guider_of(model, positive, negative, 1.0)
        sigmas = given(nodes.PCPOScheduler, model, 4, "auto", 1.0)
        found[f"{kind} {wrong}"] = refused(
            lambda g=guider, w=wrong, s=sigmas, e=empty: sampled(noise, g, sampler(w), s, e)
        )
        if kind == "flux":
            relative, led = sampler(credit="relative"), irg(model, model, positive, negative, 1.0)
            found["flux relative"] = refused(
                lambda g=led, r=relative, s=sigmas, e=empty: sampled(noise, g, r, s, e)
            )
        grid = "uniform" if kind == "sd15" else "leading"
        found[f"{kind} {grid}"] = refused(
            lambda m=model, g=grid: nodes.PCPOScheduler.execute(m, 4, g, 1.0)
        )
        found[f"{kind} sigmas"] = refused(
            lambda g=guider, e=empty: sampled(
                noise, g, sampler(), torch.tensor([20.0, 1.0, 0.0]), e
            )
        )
    return found


# --- the demo model --------------------------------------------------------------------------


def demo(folder):
    folder, nodes, spy = Path(folder), pack("nodes.sampling.nodes"), Warnings()
    model, clip, vae = given(pack("nodes.demo.nodes").PCPODemoModel, "tiny-sd")
    prompts = json.loads((folder / "prompts.json").read_text())
    embeds = clip.encode_from_tokens(clip.tokenize(prompts[0]))
    negative = clip.encode_from_tokens(clip.tokenize(""))
    out = {"embeds": embeds, "negative": negative}
    positive, negative = [[embeds, {}]], [[negative, {}]]
    plans = json.loads((folder / "plans.json").read_text())
    theirs = load_file(folder / "lora.safetensors")
    tuned, _ = comfy.sd.load_lora_for_models(model, None, theirs, 1.0, 0.0)

    def latents_of(plan, credit):
        guider = guider_of(model, positive, negative, plan["guidance"])
        if plan["credit"] == "relative":
            guider = irg(model, tuned, positive, negative, plan["guidance"])
        sigmas = given(nodes.PCPOScheduler, model, plan["steps"], plan["spacing"], 1.0)
        made = sampler(noise_level=plan["eta"], credit=credit)
        empty = {"samples": torch.zeros(3, 4, 8, 8)}
        return sampled(nodes.StreamNoise(plan["seed"]), guider, made, sigmas, empty)

    for name, plan in plans.items():
        latents = latents_of(plan, plan["credit"])
        out[name] = model.model.process_latent_in(latents)
        if plan["credit"] == "relative":
            plainly = latents_of(plan, "native")
            out[f"{name} plainly"] = model.model.process_latent_in(plainly)
    out["images"] = vae.decode(latents)
    out["latents"] = model.model.process_latent_in(vae.encode(out["images"]))
    report = {
        "warnings": spy.lines,
        "id": [pack("nodes.demo.nodes").demo_id_of(m) for m in (model, model.clone())],
        "stock": with_stock_nodes(model, clip, vae),
        "lora": with_lora(model, positive, negative, folder / "lora.safetensors", out),
        "trajectory": trajectories(model, vae, positive, negative),
        "interrupt": interrupted(model, positive, negative),
        "errors": demo_errors(model, positive, negative, vae),
    }
    kept = {key: value.detach().float().cpu().contiguous() for key, value in out.items()}
    save_file(kept, folder / "outputs.safetensors")
    print("REPORT", json.dumps(report))


def with_stock_nodes(model, clip, vae):
    """The usual graph, by the stock nodes' own code."""
    import nodes as stock_nodes

    positive = stock_nodes.CLIPTextEncode().encode(clip, "a red circle")[0]
    negative = stock_nodes.CLIPTextEncode().encode(clip, "")[0]
    latent = stock_nodes.EmptyLatentImage().generate(64, 64, 2)[0]
    done = stock_nodes.KSampler().sample(
        model, 1, 6, 3.0, "euler", "normal", positive, negative, latent
    )[0]
    images = stock_nodes.VAEDecode().decode(vae, done)[0]
    back = stock_nodes.VAEDecode().decode(vae, stock_nodes.VAEEncode().encode(vae, images)[0])[0]
    skip = clip.clone()
    skip.clip_layer(-2)
    other = stock_nodes.CLIPTextEncode().encode(skip, "a red circle")[0][0][0]
    return {
        "shape": list(images.shape),
        "spread": float(images.std()),
        "round trip": float((back - images).abs().mean()),
        "clip skip": float((other - positive[0][0]).abs().max()),
    }


def with_lora(model, positive, negative, file, out):
    """A LoRA by the pack's node and by stock Load LoRA; its network's output goes into `out`."""
    module = pack("nodes.demo.nodes")
    before = refused(lambda: module.PCPODemoLora.execute(model, "none", 1.0))
    spy = Warnings()
    shipped = {
        name: len(given(module.PCPODemoLora, model, name, 0.5).patches)
        for name in module.lora_files()
    }
    module.LORAS = file.parent
    tuned = given(module.PCPODemoLora, model, file.stem, 1.0)
    theirs, _ = comfy.sd.load_lora_for_models(model, None, load_file(file), 1.0, 0.0)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    t, context = torch.tensor([37.0, 801.0]), positive[0][0].expand(2, -1, -1)
    for name, patcher in (("base", model), ("tuned", tuned), ("theirs", theirs)):
        management.load_models_gpu([patcher], force_full_load=True)
        with torch.no_grad():
            out[f"network {name}"] = patcher.model.diffusion_model(x, t, context)
    out["network x"] = x
    other = model.clone()
    other.remove_attachments(module.DEMO_TAG)
    return {
        "none": before,
        "other model": refused(lambda: module.PCPODemoLora.execute(other, file.stem, 1.0)),
        "patches": len(tuned.patches),
        "shipped": shipped,
        "id": module.demo_id_of(tuned),
        "warnings": spy.lines,
    }


def trajectories(model, vae, positive, negative):
    nodes, pictures = pack("nodes.sampling.nodes"), pack("nodes.sampling.credit_plot")
    guider, noise = guider_of(model, positive, negative, 2.0), nodes.StreamNoise(11)
    sigmas = given(nodes.PCPOScheduler, model, 6, "leading", 1.0)
    empty = {"samples": torch.zeros(3, 4, 8, 8), "downscale_ratio_spacial": 8}
    node = nodes.PCPOSampleTrajectory
    latent, denoised, way = given(node, noise, guider, sampler(), sigmas, empty)
    _, _, again = given(node, nodes.StreamNoise(12), guider, sampler(), sigmas, empty)
    one = {"samples": torch.zeros(1, 4, 8, 8), "batch_index": [2]}
    alone, _, _ = given(node, noise, guider, sampler(), sigmas, one)
    euler, _, plain = given(
        node, noise, guider, comfy.samplers.sampler_object("euler"), sigmas, empty
    )
    theirs = sampled(noise, guider, sampler(), sigmas, empty)
    known = sampled(noise, guider, comfy.samplers.sampler_object("euler"), sigmas, empty)
    policy = way.policy
    walk = pack("nodes.sampling.sde").walk_of(
        pack("nodes.sampling.sde").SdeSettings(), model.model.model_sampling, sigmas
    )
    mean_x, mean_p = walk.steps.in_terms_of(pack("pcpo.predictions").epsilon(*walk.grid.levels))
    rebuilt = (
        mean_x[2] * policy.x[:, 2].double()
        + mean_p[2] * policy.prediction[:, 2].double()
        + walk.steps.std[2] * policy.noise[:, 2].double()
    )
    sheets = given(pictures.PCPOTrajectoryStrip, way, vae, 4)
    shown = (pictures.PCPOCreditWeights, model, sigmas, "auto", -1.0, -1)
    figure, table = given(*shown)
    return {
        "same as SamplerCustomAdvanced": float((latent["samples"] - theirs).abs().max()),
        "stock sampler too": float((euler["samples"] - known).abs().max()),
        "third alone": difference(alone["samples"][0], latent["samples"][2]),
        "leftover keys": sorted(set(latent) - {"samples"}),
        "clean": [list(way.clean.shape), list(plain.clean.shape), str(way.clean.dtype)],
        "last estimate": difference(way.clean[:, -1].float(), denoised["samples"]),
        "policy": [list(policy.x.shape), policy.step.tolist(), plain.policy is None],
        "step rebuilt": float((rebuilt - policy.x[:, 3].double()).abs().max()),
        "fresh": float((way.clean - again.clean).abs().max()),
        "sheets": list(sheets.shape),
        "figure": [list(figure.shape), float(figure.std())],
        "table": table,
        "relative table": given(*shown, "relative", 0.0)[1],
    }


def interrupting(model):
    """A copy of the MODEL, which the user interrupts while it runs for the third time; its runs."""
    calls, watched = [], model.clone()

    def counted(apply, call):
        calls.append(call)
        prediction = apply(call["input"], call["timestep"], **call["c"])
        if len(calls) == 3:
            management.interrupt_current_processing()
        return prediction

    watched.set_model_unet_function_wrapper(counted)
    return watched, calls


def interrupted(model, positive, negative):
    """How often the network is begun when the user interrupts while it runs for the third time."""
    nodes, found = pack("nodes.sampling.nodes"), {}

    def hook(value, total, preview, **_):
        management.throw_exception_if_processing_interrupted()

    comfy.utils.set_progress_bar_global_hook(hook)
    watched, calls = interrupting(model)
    guider = guider_of(watched, positive, negative, 1.0)
    sigmas = given(nodes.PCPOScheduler, model, 10, "leading", 1.0)
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    for node in (SamplerCustomAdvanced, nodes.PCPOSampleTrajectory):
        calls.clear()
        try:
            node.execute(nodes.StreamNoise(0), guider, sampler(), sigmas, empty)
        except management.InterruptProcessingException:
            found[node.__name__] = len(calls)
    comfy.utils.set_progress_bar_global_hook(None)
    return found


def demo_errors(model, positive, negative, vae):
    nodes, pictures = pack("nodes.sampling.nodes"), pack("nodes.sampling.credit_plot")
    noise, guider = nodes.StreamNoise(0), guider_of(model, positive, negative, 1.0)
    sigmas = given(nodes.PCPOScheduler, model, 4, "leading", 1.0)
    empty = {"samples": torch.zeros(1, 4, 8, 8)}

    def run(sampler_, sigmas_=sigmas, latent=empty, node=nodes.PCPOSampleTrajectory, guider=guider):
        return refused(lambda: node.execute(noise, guider, sampler_, sigmas_, latent))

    def weights(*chosen):
        return refused(lambda: pictures.PCPOCreditWeights.execute(model, sigmas, *chosen))

    no_images = {"samples": torch.zeros(0, 4, 8, 8)}
    relative, idle = sampler(credit="relative"), irg(model, model, positive, negative, 1.0, 0.0)
    return {
        "empty batch": run(sampler(), latent=no_images),
        "empty noise": refused(lambda: noise.generate_noise(no_images)),
        "no step": run(sampler(), sigmas[:1]),
        "rising": run(sampler(), sigmas.flip(0), node=SamplerCustomAdvanced),
        "above": run(sampler(), sigmas * 10),
        "transition": run(sampler("cps")),
        "eta": run(sampler("ddim", 1.5)),
        "proportionate": run(sampler("ddim", 0.0, "proportionate")),
        "relative, no guider": run(relative),
        "relative, gamma 0": run(relative, guider=idle),
        "weights transition": weights("flow_sde", -1.0, -1),
        "weights last": weights("ddim", -1.0, 4),
        "weights quiet": weights("ddim", 0.0, -1),
        "weights exact": weights("ddim", -1.0, -1, "exact", 4.5),
        "too many": refused(lambda: nodes.PCPOScheduler.execute(model, 1000, "auto", 0.5)),
        "too few": refused(lambda: nodes.PCPOScheduler.execute(model, 1, "linspace", 1.0)),
    }


# --- time ------------------------------------------------------------------------------------


def overhead(checkpoint, repeats=15, steps=6):
    """CPU time of a step of PCPO's sampler as a part of stock euler's, runs of both in turns."""
    model = comfy.sd.load_checkpoint_guess_config(checkpoint, output_clip=False, output_vae=False)
    cond = [[torch.randn(1, 77, 768), {}]]
    guider, noise = guider_of(model[0], cond, cond, 5.0), Noise_RandomNoise(0)
    sampling = model[0].get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    kinds = {"euler": comfy.samplers.sampler_object("euler"), "pcpo": sampler()}
    times = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, made in kinds.items():
            start = time.process_time()
            sampled(noise, guider, made, sigmas, empty)
            times[name].append((time.process_time() - start) / steps)
    euler, own = (statistics.median(times[name][1:]) for name in kinds)
    ratios = [b / a for a, b in zip(times["euler"][1:], times["pcpo"][1:], strict=True)]
    report = {"euler": euler, "pcpo": own, "ratio": statistics.median(ratios)}
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    torch.manual_seed(0)
    {"stock": stock, "demo": demo, "overhead": overhead}[TASK](*PATHS)
