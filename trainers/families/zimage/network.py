"""Z-Image's network on a batch of prompts of different lengths.

diffusers' own forward pass takes lists, and pads to the longest prompt of the batch: what an image
becomes would depend, in its last digits, on its neighbours in rollout and update. Here all batches
of a run have one shape, and nothing waits for the device.
"""

from __future__ import annotations

import diffusers
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ..embeds import MULTIPLE

_PATCH = 2
_SIZE = "2-1"  # of a patch, as diffusers names the layers of this size


class ZImageTransformer2DModel(diffusers.ZImageTransformer2DModel):
    """diffusers' network with a forward pass on tensors."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        latents: Float[Tensor, "b c h w"],
        time: Float[Tensor, " b"],
        tokens: Float[Tensor, "b l d"],
        lengths: Int[Tensor, " b"],
        *,
        is_ragged: bool,
    ) -> Float[Tensor, "b c h w"]:
        """The network's output, clean image minus noise.

        Args:
            latents: with sides that are multiples of 2.
            time: 0 is noise and 1 the image.
            tokens: of the prompts, a multiple of 32 for each.
            lengths: tokens of each prompt; those beyond are padding, up to the next multiple of 32.
            is_ragged: whether some prompt has more rows than that, which are not attended to.
        """
        height, width = (side // _PATCH for side in latents.shape[-2:])
        image = self.all_x_embedder[_SIZE](_patchify(latents))
        count, missing = image.shape[1], -image.shape[1] % MULTIPLE
        empty = self.x_pad_token.to(image.dtype).expand(len(image), missing, -1)
        image = torch.cat([image, empty], dim=1)
        column = torch.arange(tokens.shape[1], device=tokens.device)
        caption = torch.where(
            (column < lengths[:, None])[..., None],
            self.cap_embedder(tokens),
            self.cap_pad_token.to(tokens.dtype),
        )
        rows = -(-lengths // MULTIPLE) * MULTIPLE
        seen = column < rows[:, None] if is_ragged else None
        image_turn = self._rotations(_positions(rows, height, width, missing))
        places = pad((column + 1)[None, :, None], (0, 2)).expand(len(rows), -1, 3)
        caption_turn = self._rotations(places)
        vector = self.t_embedder(time * self.t_scale).to(latents.dtype)
        image = self._run_blocks(self.noise_refiner, image, None, image_turn, vector)
        caption = self._run_blocks(self.context_refiner, caption, seen, caption_turn, None)
        both = torch.cat([image, caption], dim=1)
        turn = torch.cat([image_turn, caption_turn], dim=1)
        if seen is not None:
            seen = torch.cat([seen.new_ones(len(image), image.shape[1]), seen], dim=1)
        both = self._run_blocks(self.layers, both, seen, turn, vector)
        out = self.all_final_layer[_SIZE](both, c=vector)[:, :count]
        return _unpatch(out, height, width)

    def _rotations(self, places: Int[Tensor, "b n 3"]) -> Tensor:
        """The rotations of queries and keys at places."""
        return self.rope_embedder(places.flatten(0, 1)).unflatten(0, places.shape[:2])

    def _run_blocks(
        self,
        blocks: torch.nn.ModuleList,
        x: Float[Tensor, "b n d"],
        seen: Bool[Tensor, "b n"] | None,
        turn: Tensor,
        vector: Tensor | None,
    ) -> Float[Tensor, "b n d"]:
        again = self._gradient_checkpointing_func if self.gradient_checkpointing else None
        for block in blocks:
            if again is not None and torch.is_grad_enabled():
                x = again(block, x, seen, turn, vector)
            else:
                x = block(x, seen, turn, vector)
        return x


def _patchify(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
    """Squares of 2 x 2 points as tokens, their channels last."""
    rows, channels, height, width = latents.shape
    squares = latents.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 3, 5, 1).reshape(rows, -1, 4 * channels)


def _unpatch(tokens: Float[Tensor, "b n d"], height: int, width: int) -> Tensor:
    rows, _, size = tokens.shape
    squares = tokens.reshape(rows, height, width, 2, 2, size // 4)
    return squares.permute(0, 5, 1, 3, 2, 4).reshape(rows, size // 4, 2 * height, 2 * width)


def _positions(
    rows: Int[Tensor, " b"], height: int, width: int, missing: int
) -> Int[Tensor, "b n 3"]:
    """Positions of an image's tokens: behind the caption, row, column; of padding, 0."""
    device = rows.device
    down, across = torch.arange(height, device=device), torch.arange(width, device=device)
    grid = torch.cartesian_prod(down, across).reshape(1, -1, 2).expand(len(rows), -1, -1)
    behind = (rows + 1)[:, None, None].expand(-1, grid.shape[1], 1)
    return pad(torch.cat([behind, grid], dim=-1), (0, 0, 0, missing))
