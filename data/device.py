"""The last steps of augmentation on a batch of bytes, on whatever device it is: colours, blur, normalisation.

The arithmetic is that of data/transforms.py: the table of each image is computed as there in float64; saturation
and blur round to whole grey levels as OpenCV does, from which they differ by one level at most.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.transforms import Geometry, inside, place

GREY = (4899, 9617, 1868)  # OpenCV's weights of red, green and blue, over 2^14


def finish_images(
    images: Tensor, geometry: Tensor, appearance: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """float32 [B, 3, H, W] in channels-last memory: jittered, blurred and normalised, 0 where there is padding.

    Args:
        images: uint8 [B, H, W, 3] RGB.
        geometry: int64 [B, 7], of which the padding follows; see data/transforms.py.
        appearance: float64 [B, 6]: contrast, gains of red, green and blue, saturation, sigma.
        mean, std: of red, green and blue in 0..1.
    """
    device, crop = images.device, (images.shape[1], images.shape[2])
    each = [Geometry(*row) for row in geometry.tolist()]
    places = [place(inside(one, crop), crop, one.flip) for one in each]
    tables = colour_tables(appearance, mean, std).to(device, non_blocking=True)
    changed = images.permute(0, 3, 1, 2)
    if bool((appearance[:, 4] != 1).any()):
        changed = saturate(changed, appearance[:, 4].to(device, non_blocking=True))
    blurred = appearance[:, 5].nonzero().flatten().tolist()
    if blurred:
        changed = changed.clone() if changed.data_ptr() == images.data_ptr() else changed
        for i in blurred:  # the image alone: what is mirrored at its border is not the padding
            rows, columns = places[i]
            changed[i, :, rows, columns] = blur(changed[i, :, rows, columns], float(appearance[i, 5]))
    changed = changed.contiguous(memory_format=torch.channels_last)
    offsets = 256 * torch.arange(3 * len(images), device=device, dtype=torch.int32).view(-1, 3, 1, 1)
    finished = tables.flatten()[(changed + offsets).long()]
    for i, (rows, columns) in enumerate(places):
        finished[i, :, rows.stop :] = 0
        finished[i, :, :, : columns.start] = 0
        finished[i, :, :, columns.stop :] = 0
    return finished


def colour_tables(appearance: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 [B, 3, 256]: `colour_table` of data/transforms.py for each image of a batch."""
    values = torch.arange(256, dtype=torch.float64)
    jittered = (values - 128) * appearance[:, :1] + 128  # [B, 256]
    jittered = (jittered[:, None] * appearance[:, 1:4, None]).clamp(0, 255)
    shift, spread = (torch.tensor(list(one), dtype=torch.float64)[:, None] for one in (mean, std))
    return ((jittered / 255 - shift) / spread).float()


def saturate(images: Tensor, saturation: Tensor) -> Tensor:
    """uint8 [B, 3, H, W]: each pixel between its grey (0) and itself (1), or beyond."""
    wide = images.int()
    weighted = GREY[0] * wide[:, :1] + GREY[1] * wide[:, 1:2] + GREY[2] * wide[:, 2:]
    grey = ((weighted + (1 << 13)) >> 14).float()
    share = saturation.float().view(-1, 1, 1, 1)
    return (images.float() * share + grey * (1 - share)).round().clamp(0, 255).to(torch.uint8)


def blur(image: Tensor, sigma: float) -> Tensor:
    """uint8 [3, H, W] under a Gaussian of 5x5 pixels, mirrored at the borders."""
    places = torch.arange(-2, 3, device=image.device, dtype=torch.float32)
    line = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = (line / line.sum()).expand(3, 1, 5)
    mode = "reflect" if min(image.shape[1:]) > 2 else "replicate"
    wide = F.pad(image[None].float(), (2, 2, 2, 2), mode=mode)
    wide = F.conv2d(F.conv2d(wide, kernel[:, :, None], groups=3), kernel[:, :, :, None], groups=3)
    return wide[0].round().clamp(0, 255).to(torch.uint8)
