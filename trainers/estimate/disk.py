"""Estimate what a run writes to its folder. No torch."""

from __future__ import annotations

from .memory import MOMENTS, Values
from .network_costs import Network

PIXEL = 1.6  # bytes of a PNG per pixel, of a picture with detail
REPORT = 1e6  # its page, plots and the comparison before and after
LINE = 1e3  # of metrics.jsonl


def disk_bytes(values: Values, network: Network) -> float:
    """Bytes of a run's folder and of the LoRA that it publishes, at the end of the run.

    A copy of the model, where one is written, and embeddings that runs share are not among them.

    Args:
        values: sections and fields of a `TrainConfig`.
        network: of the model.
    """
    run, model, trainable = values["run"], values["model"], values["trainable"]
    is_full = trainable["kind"] == "full"
    weights = network.weights if is_full else network.adapters * trainable["rank"]
    saves = -(-run["iterations"] // run["save_every"])
    kept = min(-(-run["iterations"] // run["checkpoint_every"]), run["keep_checkpoints"] + 1)
    state = 4.0 + MOMENTS[values["optimizer"]["kind"]] + (4.0 if trainable["ema_decay"] else 0.0)
    pixels = (model["width"] or network.side) * (model["height"] or network.side)
    samples = PIXEL * pixels * run["eval_prompts"] * (saves + 1)
    lines = LINE * run["iterations"]
    return 4.0 * weights * (saves + 1) + state * weights * kept + samples + REPORT + lines
