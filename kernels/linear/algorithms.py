"""Which of cuBLASLt's kernels computes a product: a table of what was measured; elsewhere its heuristic's first serves.

Hopper's own kernels all give the same bits unless they split K, so an entry is only ever a matter of speed; `proof.py` checks
it. The table is for compute capability 9.0 alone. Measured on an H100 80GB HBM3 with cuBLAS 13.1, in bfloat16, among the tiles, clusters and options that cuBLASLt offers. Gate-up and down products of 1,024
tokens and more were measured at the GPU's power limit, too, where the fastest kernel of a moment may not be the fastest one.
Where a cuBLASLt does not offer an entry, the heuristic's first serves as well, and the start-up line counts such entries.

M tokens    K in features    N out features
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One of cuBLASLt's kernels for Hopper."""

    features: int
    """Out features of a tile."""
    tokens: int
    """Its tokens."""
    cluster: tuple[int, int]
    """How many tiles, of other features and of other tokens, are computed by neighbours that share what they load."""
    option: int
    """cuBLASLt's custom option, 0 to 7: the order of tiles, and how two warp groups share one."""

    @property
    def tile_id(self) -> int:
        """`cublasLtMatmulTile_t`."""
        return TILE_IDS[self.features, self.tokens]

    @property
    def cluster_id(self) -> int:
        """`cublasLtClusterShape_t`."""
        return CLUSTER_IDS[self.cluster]


MEASURED_WITH = "13.1."
"""How the version of the cuBLAS begins that offers all of them."""

MEASURED: dict[tuple[int, int], dict[int, Algorithm | None]] = {
    # Qwen2.5-7B: qkv, o, gate_up, down, head.
    (4608, 3584): {
        80: Algorithm(64, 80, (1, 1), 3),
        128: Algorithm(80, 64, (1, 1), 0),
        160: Algorithm(128, 56, (1, 1), 5),
        192: Algorithm(112, 64, (1, 1), 0),
        224: Algorithm(144, 64, (1, 1), 0),
        256: Algorithm(80, 128, (1, 2), 4),
        384: Algorithm(112, 128, (1, 1), 0),
        512: Algorithm(144, 128, (1, 2), 2),
        640: Algorithm(96, 128, (4, 1), 0),
        768: Algorithm(112, 256, (1, 1), 4),
        896: Algorithm(256, 128, (1, 1), 4),
        1024: Algorithm(144, 256, (1, 1), 4),
        1920: None,
        2048: Algorithm(192, 192, (2, 1), 4),
        2944: None,
        3072: Algorithm(144, 128, (1, 2), 2),
        3840: None,
        4096: Algorithm(144, 128, (1, 2), 2),
    },
    (3584, 3584): {
        96: Algorithm(64, 48, (1, 1), 1),
        128: Algorithm(64, 64, (1, 1), 1),
        160: Algorithm(64, 80, (1, 1), 1),
        192: Algorithm(88, 64, (1, 1), 0),
        224: Algorithm(64, 112, (1, 1), 1),
        256: Algorithm(80, 128, (2, 2), 6),
        384: Algorithm(96, 128, (4, 1), 0),
        512: Algorithm(112, 128, (2, 1), 0),
        640: Algorithm(144, 128, (1, 1), 4),
        768: Algorithm(168, 128, (1, 2), 2),
        896: Algorithm(208, 128, (1, 1), 4),
        1024: Algorithm(112, 256, (1, 1), 4),
        1920: None,
        2048: Algorithm(224, 128, (1, 2), 6),
        2944: None,
        3072: Algorithm(336, 128, (1, 2), 6),
        3840: None,
        4096: Algorithm(128, 128, (2, 1), 1),
    },
    (37888, 3584): {
        96: Algorithm(192, 48, (1, 2), 3),
        112: Algorithm(288, 64, (1, 1), 0),
        128: Algorithm(160, 64, (1, 2), 0),
        160: Algorithm(192, 80, (1, 2), 3),
        192: Algorithm(192, 96, (1, 2), 1),
        224: Algorithm(192, 112, (1, 2), 3),
        256: Algorithm(288, 128, (1, 2), 4),
        384: Algorithm(192, 192, (2, 1), 5),
        512: Algorithm(288, 128, (1, 2), 4),
        640: Algorithm(128, 160, (2, 1), 1),
        768: Algorithm(192, 192, (1, 2), 5),
        896: Algorithm(168, 128, (2, 1), 0),
        1024: Algorithm(144, 128, (1, 2), 2),
        1920: None,
        2048: Algorithm(168, 128, (1, 2), 2),
        2944: None,
        3072: Algorithm(256, 128, (1, 2), 7),
        3840: None,
        4096: Algorithm(176, 128, (1, 2), 2),
    },
    (3584, 18944): {
        48: Algorithm(64, 48, (1, 1), 1),
        64: Algorithm(64, 32, (1, 2), 3),
        80: Algorithm(64, 40, (1, 1), 1),
        96: Algorithm(64, 48, (1, 2), 1),
        112: Algorithm(64, 56, (1, 1), 1),
        128: Algorithm(64, 64, (1, 2), 3),
        160: Algorithm(64, 80, (1, 2), 3),
        192: Algorithm(64, 96, (4, 1), 1),
        224: Algorithm(128, 56, (1, 1), 1),
        256: Algorithm(112, 64, (1, 1), 0),
        384: Algorithm(96, 128, (4, 1), 0),
        512: Algorithm(112, 128, (2, 1), 0),
        640: Algorithm(144, 128, (1, 1), 4),
        768: Algorithm(112, 192, (2, 1), 0),
        896: Algorithm(200, 128, (2, 1), 4),
        1024: Algorithm(224, 128, (1, 2), 4),
        1920: None,
        2048: Algorithm(224, 128, (1, 2), 4),
        2944: None,
        3072: Algorithm(328, 128, (1, 2), 4),
        3840: None,
        4096: Algorithm(256, 152, (1, 2), 7),
    },
    (152064, 3584): {
        96: Algorithm(128, 96, (4, 1), 1),
        176: None,
        192: Algorithm(128, 192, (2, 1), 5),
        224: None,
        256: Algorithm(288, 128, (1, 2), 6),
    },
    # Llama-3.1-8B: qkv, o, gate_up, down, head.
    (6144, 4096): {
        160: None,
        192: Algorithm(144, 64, (1, 1), 0),
        224: Algorithm(104, 128, (4, 2), 6),
        256: Algorithm(96, 128, (1, 1), 4),
        384: Algorithm(144, 128, (1, 1), 4),
        512: Algorithm(192, 128, (1, 2), 4),
        640: Algorithm(192, 160, (1, 1), 5),
        768: Algorithm(192, 192, (2, 1), 4),
        896: Algorithm(192, 224, (1, 1), 5),
        1024: Algorithm(192, 128, (1, 2), 4),
        1920: None,
        2048: Algorithm(256, 128, (1, 2), 6),
        2944: None,
        3072: Algorithm(128, 280, (2, 1), 5),
        3840: None,
        4096: Algorithm(168, 128, (1, 2), 2),
    },
    (4096, 4096): {
        96: Algorithm(64, 48, (1, 2), 3),
        128: Algorithm(64, 64, (1, 2), 3),
        160: None,
        192: Algorithm(96, 64, (1, 1), 0),
        224: Algorithm(64, 112, (1, 1), 1),
        256: Algorithm(64, 128, (1, 1), 0),
        384: Algorithm(96, 128, (1, 1), 4),
        512: Algorithm(128, 128, (2, 1), 1),
        640: Algorithm(128, 160, (2, 1), 1),
        768: Algorithm(128, 192, (1, 1), 5),
        896: Algorithm(128, 224, (1, 1), 5),
        1024: Algorithm(128, 256, (2, 1), 5),
        1920: None,
        2048: Algorithm(256, 128, (1, 2), 6),
        2944: None,
        3072: Algorithm(128, 128, (2, 1), 1),
        3840: None,
        4096: Algorithm(256, 128, (1, 2), 6),
    },
    (28672, 4096): {
        80: Algorithm(128, 96, (4, 1), 7),
        112: Algorithm(224, 64, (1, 1), 0),
        128: Algorithm(224, 64, (1, 2), 0),
        160: Algorithm(128, 160, (2, 1), 1),
        192: Algorithm(112, 192, (2, 1), 0),
        224: Algorithm(224, 128, (1, 2), 6),
        256: Algorithm(112, 128, (1, 2), 2),
        384: Algorithm(224, 192, (1, 2), 4),
        512: Algorithm(176, 128, (1, 2), 2),
        640: Algorithm(128, 160, (2, 1), 1),
        768: Algorithm(168, 128, (1, 2), 2),
        896: Algorithm(128, 128, (2, 1), 1),
        1024: Algorithm(176, 128, (1, 2), 2),
        1920: None,
        2048: Algorithm(176, 128, (1, 2), 2),
        2944: None,
        3072: Algorithm(176, 256, (1, 2), 6),
        3840: None,
        4096: Algorithm(176, 128, (1, 2), 2),
    },
    (4096, 14336): {
        48: Algorithm(64, 48, (1, 1), 1),
        64: Algorithm(64, 64, (1, 1), 0),
        96: Algorithm(64, 48, (1, 2), 3),
        112: Algorithm(64, 56, (1, 2), 1),
        128: Algorithm(64, 64, (1, 2), 3),
        160: None,
        192: Algorithm(64, 96, (1, 2), 1),
        224: Algorithm(128, 56, (1, 1), 1),
        256: Algorithm(128, 64, (1, 1), 1),
        384: Algorithm(128, 96, (1, 1), 1),
        512: Algorithm(128, 128, (2, 1), 1),
        640: Algorithm(128, 160, (2, 1), 1),
        768: Algorithm(128, 192, (1, 1), 5),
        896: Algorithm(128, 224, (1, 2), 7),
        1024: Algorithm(256, 128, (1, 2), 6),
        1920: None,
        2048: Algorithm(256, 128, (1, 2), 7),
        2944: None,
        3072: Algorithm(256, 128, (1, 2), 6),
        3840: None,
        4096: Algorithm(128, 256, (1, 1), 7),
    },
    (128256, 4096): {
        176: None,
        192: Algorithm(144, 192, (4, 1), 6),
        224: None,
        256: Algorithm(280, 128, (1, 2), 6),
    },
}
"""(out features, in features) → {most tokens: algorithm, or None where the heuristic's first is the fastest}."""


def measured_algorithm(out_features: int, in_features: int, num_tokens: int) -> Algorithm | None:
    """The algorithm of a product; None leaves it to the heuristic, as do more tokens than were measured."""
    by_tokens = MEASURED.get((out_features, in_features), {})
    return next((by_tokens[most] for most in sorted(by_tokens) if num_tokens <= most), None)


def measured_tokens(out_features: int, in_features: int) -> tuple[int, ...]:
    """The most tokens of each entry of a product, also of those that are left to the heuristic."""
    return tuple(MEASURED.get((out_features, in_features), {}))


# Of the enumerations of cublasLt.h what the tables name.
CLUSTER_IDS = {
    (1, 1): 2,
    (1, 2): 5,
    (2, 1): 3,
    (2, 2): 6,
    (4, 1): 4,
    (4, 2): 7,
}
TILE_IDS = {
    (64, 32): 13,
    (64, 40): 314,
    (64, 48): 315,
    (64, 56): 316,
    (64, 64): 15,
    (64, 80): 318,
    (64, 96): 26,
    (64, 112): 321,
    (64, 128): 17,
    (80, 64): 134,
    (80, 128): 135,
    (88, 64): 143,
    (96, 64): 27,
    (96, 128): 28,
    (104, 128): 158,
    (112, 64): 164,
    (112, 128): 165,
    (112, 192): 166,
    (112, 256): 167,
    (128, 56): 398,
    (128, 64): 18,
    (128, 96): 33,
    (128, 128): 20,
    (128, 160): 29,
    (128, 192): 32,
    (128, 224): 414,
    (128, 256): 23,
    (128, 280): 420,
    (144, 64): 183,
    (144, 128): 184,
    (144, 192): 185,
    (144, 256): 186,
    (160, 64): 193,
    (168, 128): 197,
    (176, 128): 201,
    (176, 256): 203,
    (192, 48): 453,
    (192, 80): 456,
    (192, 96): 458,
    (192, 112): 460,
    (192, 128): 31,
    (192, 160): 465,
    (192, 192): 209,
    (192, 224): 472,
    (200, 128): 212,
    (208, 128): 215,
    (224, 64): 220,
    (224, 128): 221,
    (224, 192): 222,
    (256, 128): 24,
    (256, 152): 501,
    (280, 128): 238,
    (288, 64): 239,
    (288, 128): 240,
    (328, 128): 250,
    (336, 128): 252,
}
