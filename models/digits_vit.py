"""Recipe of `digits_vit.onnx`: a small vision transformer that reads handwritten digits."""

import torch
from torch import Tensor, nn

from digits import CLASSES, SIDE
from training import Recipe, main

WIDTH = 128
HEADS = 4
BLOCKS = 4
MLP_RATIO = 4
PATCH = 2
TOKENS = (SIDE // PATCH) ** 2


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key and value layers."""

    def __init__(self) -> None:
        """Make the four layers."""
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix the tokens of each image, float32 [N, 16, 128] to the same shape."""
        query, key, value = (
            layer(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
        mixed = scores.softmax(dim=-1) @ value
        merged: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return merged


class Block(nn.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self) -> None:
        """Make the two branches."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, MLP_RATIO * WIDTH),
            nn.GELU(),
            nn.Linear(MLP_RATIO * WIDTH, WIDTH),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Add both branches, float32 [N, 16, 128] to the same shape."""
        attended: Tensor = tokens + self.attention(self.attention_norm(tokens))
        transformed: Tensor = attended + self.mlp(self.mlp_norm(attended))
        return transformed


class DigitsTransformer(nn.Module):
    """Patches of 2x2 pixels, four blocks, and a head on the mean token."""

    def __init__(self) -> None:
        """Make the layers; the position embedding starts small, as usual for transformers."""
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, kernel_size=PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images, float32 [N, 1, 8, 8], into logits, float32 [N, 10]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


RECIPE = Recipe("digits_vit", DigitsTransformer, epochs=100, learning_rate=1e-3, weight_decay=0.3)

if __name__ == "__main__":
    main(RECIPE)
