"""Features of DINOv2's own code, with the small network of `metrics_fixture`.

    python tests/golden/make_dinov2.py CHECKOUT

CHECKOUT is one of facebookresearch/dinov2; torch is all that its network needs. It writes
`dinov2.json` beside itself: the features of prepared numbers, and some of the stretched positions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "fixtures"))

import metrics_fixture  # noqa: E402
import rewards_fixture  # noqa: E402


def main(checkout: str) -> None:
    """Run the network of a checkout."""
    sys.path.insert(0, checkout)
    from dinov2.models.vision_transformer import DinoVisionTransformer

    sizes = metrics_fixture.DINO
    network = DinoVisionTransformer(
        img_size=sizes["grid"] * sizes["patch"],
        patch_size=sizes["patch"],
        embed_dim=sizes["width"],
        depth=sizes["layers"],
        num_heads=sizes["heads"],
        mlp_ratio=sizes["inner"] / sizes["width"],
        init_values=1.0,
        ffn_layer="mlp",
        block_chunks=0,
        interpolate_offset=0.1,
        interpolate_antialias=False,
    )
    network.load_state_dict(metrics_fixture.dino_state(), strict=True)
    network.eval()
    pixels = rewards_fixture.numbers("pixels", (2, 3, 224, 224))
    with torch.no_grad():
        tokens = torch.zeros(1, 257, sizes["width"])
        positions = network.interpolate_pos_encoding(tokens, 224, 224)
        found = {
            "features": network(pixels).tolist(),
            "positions": positions[0, ::16, ::12].tolist(),
        }
    (HERE / "dinov2.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
