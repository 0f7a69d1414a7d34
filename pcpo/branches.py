"""Images that share their path: a tree that splits at some steps, each child with its own noise.

The expected gradient stays the policy gradient's. A path between two splits is sampled once for all
images (leaves) that it leads to; its log ratio stands with the mean of their advantages, as often
as there are leaves, which is what each of them would have added with a path of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Branches:
    """Where a tree splits; by default nowhere, so that each image is a tree.

    Attributes:
        at: steps, ascending; a path splits before each of them, which its children take apart.
        children: of each split, >= 1.
    """

    at: tuple[int, ...] = ()
    children: int = 1

    @property
    def leaves(self) -> tuple[int, ...]:
        """The images that a path leads to: of the whole tree, and after each split.

        >>> Branches((2, 5), children=3).leaves
        (9, 3, 1)
        """
        return tuple(self.children**depth for depth in reversed(range(len(self.at) + 1)))

    def path(self, image: int) -> tuple[int, ...]:
        """The tree of an image, and the child that its path takes at each split.

        >>> [Branches((2, 5), children=2).path(image) for image in (0, 1, 6)]
        [(0, 0, 0), (0, 0, 1), (1, 1, 0)]
        """
        tree, *rest = self.leaves
        return (image // tree, *(image // leaves % self.children for leaves in rest))

    def siblings(self, depth: int, prompts: Sequence[str]) -> list[str]:
        """Labels of the paths after `depth` splits, equal for those with one parent.

        Trees of one prompt count as siblings.

        Args:
            depth: 0 for whole trees.
            prompts: of each image; a tree's are equal.
        """
        paths = prompts[:: self.leaves[depth]]
        return [str(row // self.children) for row in range(len(paths))] if depth else list(paths)


UNBRANCHED = Branches()


def mean_over_leaves(values: Float[Tensor, "*s n"], leaves: int) -> Float[Tensor, "*s paths"]:
    """The mean of the images that each path leads to, from one value per image."""
    return values if leaves == 1 else values.unflatten(-1, (-1, leaves)).mean(dim=-1)
