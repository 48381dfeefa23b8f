"""Which images show the same picture: copies under another name, encoding or size.

Each image becomes a grey thumbnail of 64x64 and a hash of 255 bits: which of the lowest 16x16 coefficients of the
thumbnail's DCT, the mean left out, lie above their median (the DCT variant of Zauner, Implementation and
Benchmarking of Perceptual Image Hash Functions, 2010, on a finer grid). Pairs of at most HASH_BITS different bits
are compared further: the thumbnails are correlated in each of 4x4 tiles, and their agreement is the second lowest
of these, so that neither a bonnet nor a clock that all images share makes copies of night scenes. Measured on
CamVid and on drawn streets, as they are, dark, dark under one bright bonnet, and as lights at night:

    copies: JPEG of quality 50 or more, scaled by 0.25 to 2, brighter      at most 30 bits, agreement 0.90 or more
    copies: half the size at quality 50, or by nearest neighbour           at most 26 bits, agreement 0.84 or more
    copies: JPEG of quality 20                                             at most 48 bits, agreement 0.73 or more
    copies: cropped by a hundredth at each side                            at most 36 bits, agreement 0.73 or more
    the next frame at 15 Hz, from a moving car                             6 bits or more, agreement 0.87 or less
    another picture                                                        58 bits or more
    another picture, dark under the same bonnet, or lights at night        14 bits or more, agreement 0.66 or less
    another picture, nearly black (brightness 0.05) under that bonnet      12 bits or more, agreement 0.81 or less

So COPY finds images that were saved anew or resized, and takes no other picture for one. What it cannot do: tell
a copy from a later frame of a car that stands (which teaches the same); see a crop, a mirror image or a rotation;
see a copy that lost its detail, of less than 64 pixels a side or strongly compressed. A frame a second later in a
video looks like another picture; of that, only names can tell.
"""

from collections.abc import Iterator

import cv2
import numpy as np

HASH_BITS = 40  # of 255; pairs that differ in more are not compared further
COPY = 0.88  # agreement from which two images show the same picture
NEAR = 0.7  # agreement from which they nearly do: neighbouring frames
SIDE = 64
TILES = 4
GRID = 16  # coefficients of the DCT a side
NOISE = 1.5  # grey levels; what differs by less is the same
BLOCK = 512  # images that are compared with as many others at once


def make_thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 [64, 64], grey, of uint8 [H, W, 3] RGB."""
    return cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def hash_signs(thumbnail: np.ndarray) -> np.ndarray:
    """float32 [255]: 1 or -1 for each coefficient, above the median or not."""
    coefficients = cv2.dct(thumbnail.astype(np.float32))[:GRID, :GRID].ravel()[1:]
    return np.where(coefficients > np.median(coefficients), 1, -1).astype(np.float32)


def find_similar(thumbnails: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """For each of N thumbnails uint8 [N, 64, 64], the one before it in each group that it agrees with most.

    `groups` int64 [N] are numbered from 0. Records i, j, agreement, with i < j, of those that agree to NEAR or
    more: at most one for each j and each group of an i, the first i of equal ones.

    N^2 products of 255 numbers in blocks, and of 4096 where images are alike: seconds for 10 000 that differ, or
    for 2000 of one picture. Images of one colour are all alike; leave them out.
    """
    agreement = np.full((int(groups.max()) + 1, len(thumbnails)), -np.inf, np.float32)
    partner = np.zeros(agreement.shape, np.int64)
    for rows, columns, close in _candidates(np.array([hash_signs(thumbnail) for thumbnail in thumbnails])):
        values = np.where(close, _agreement(_tiles(thumbnails[rows]), _tiles(thumbnails[columns])), -np.inf)
        for group in np.unique(groups[rows]).tolist():
            inside = np.flatnonzero(groups[rows] == group)
            best = inside[values[inside].argmax(0)]
            value = values[best, np.arange(len(columns))]
            better = value > agreement[group, columns]
            agreement[group, columns[better]] = value[better]
            partner[group, columns[better]] = rows[best[better]]
    group, j = np.nonzero(agreement >= NEAR)
    found = np.zeros(len(j), [("i", np.int64), ("j", np.int64), ("agreement", np.float64)])
    found["i"], found["j"], found["agreement"] = partner[group, j], j, agreement[group, j]
    return found


def _candidates(signs: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of pairs i < j that differ in at most HASH_BITS bits: all i, all j, and bool [i, j], which do."""
    for start in range(0, len(signs), BLOCK):
        for first in range(start, len(signs), BLOCK):
            products = signs[start : start + BLOCK] @ signs[first : first + BLOCK].T
            close = products >= signs.shape[1] - 2 * HASH_BITS  # 255 less twice the number of different bits
            close = np.triu(close, start - first + 1)
            rows, columns = np.flatnonzero(close.any(1)), np.flatnonzero(close.any(0))
            if len(rows):
                yield rows + start, columns + first, close[np.ix_(rows, columns)]


def _tiles(thumbnails: np.ndarray) -> np.ndarray:
    """float32 [16, N, 256]: the tiles of uint8 [N, 64, 64], less their mean."""
    side = SIDE // TILES
    split = thumbnails.astype(np.float32).reshape(-1, TILES, side, TILES, side)
    tiles = np.ascontiguousarray(split.transpose(1, 3, 0, 2, 4)).reshape(TILES**2, -1, side**2)
    return np.asarray(tiles - tiles.mean(2, keepdims=True))


def _agreement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 [N, M], from -1 to 1: the second lowest of the correlations of the tiles, [16, N, 256] and so on."""
    least = SIDE**2 / TILES**2 * NOISE**2
    lowest = np.full((a.shape[1], b.shape[1]), np.inf, np.float32)
    second = lowest.copy()
    for one, other in zip(a, b, strict=True):
        energies = np.outer(np.einsum("ns,ns->n", one, one), np.einsum("ns,ns->n", other, other))
        correlation = (one @ other.T + least) / (np.sqrt(energies) + least)
        second = np.minimum(second, np.maximum(lowest, correlation))
        lowest = np.minimum(lowest, correlation)
    return second
