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
BLOCK = 512  # hashes that are compared with all others at once
PAIRS = 2048  # pairs whose thumbnails are compared at once


def make_thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 [64, 64], grey, of uint8 [H, W, 3] RGB."""
    return cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def hash_signs(thumbnail: np.ndarray) -> np.ndarray:
    """float32 [255]: 1 or -1 for each coefficient, above the median or not."""
    coefficients = cv2.dct(thumbnail.astype(np.float32))[:GRID, :GRID].ravel()[1:]
    return np.where(coefficients > np.median(coefficients), 1, -1).astype(np.float32)


def find_similar(thumbnails: np.ndarray) -> np.ndarray:
    """The pairs of thumbnails uint8 [N, 64, 64] that agree to NEAR or more: records i, j, agreement, with i < j.

    N^2 products of 255 numbers in blocks: seconds for 10 000. Images of one colour are all alike; leave them out.
    """
    kind = np.dtype([("i", np.int64), ("j", np.int64), ("agreement", np.float64)])
    found = [np.zeros(0, kind)]
    for i, j in _candidates(np.array([hash_signs(thumbnail) for thumbnail in thumbnails])):
        pairs = np.zeros(len(i), kind)
        pairs["i"], pairs["j"] = i, j
        pairs["agreement"] = _agreement(thumbnails, i, j)
        found.append(pairs[pairs["agreement"] >= NEAR])
    return np.concatenate(found)


def _candidates(signs: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(i, j), i < j, of the pairs that differ in at most HASH_BITS bits, at most PAIRS at once."""
    for start in range(0, len(signs), BLOCK):
        products = signs[start : start + BLOCK] @ signs[start:].T  # 255 less twice the number of different bits
        close = np.triu(products >= signs.shape[1] - 2 * HASH_BITS, 1)
        i, j = np.nonzero(close)
        for first in range(0, len(i), PAIRS):
            part = slice(first, first + PAIRS)
            yield i[part] + start, j[part] + start


def _agreement(thumbnails: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """float64 [pairs], from -1 to 1: the second lowest of the correlations of the tiles."""
    used, place = np.unique([i, j], return_inverse=True)
    side = SIDE // TILES
    rows = thumbnails[used].astype(np.float32).reshape(-1, TILES, side, TILES, side)
    tiles = rows.swapaxes(2, 3).reshape(-1, TILES**2, side**2)
    tiles -= tiles.mean(2, keepdims=True)
    place = place.reshape(2, -1)
    a, b = tiles[place[0]], tiles[place[1]]
    energy = np.einsum("nts,nts->nt", tiles, tiles)
    least = side**2 * NOISE**2
    products = np.einsum("nts,nts->nt", a, b)
    correlation = (products + least) / (np.sqrt(energy[place[0]] * energy[place[1]]) + least)
    return np.sort(correlation, 1)[:, 1].astype(np.float64)
