"""The force field of DrPO (arXiv 2606.02521): where each of a prompt's images should move to, in the features of a
frozen network, so that it comes to look more like the better half and less like the worse half.

A one-step generator is a function x_0 = G(noise, prompt) without a likelihood, so it has no policy gradient. But it can
be differentiated: each image can be moved, and with it all others that the same weights generate. With f_i the
features of image i and y_j those that attract it (j in P) or repel it (j in M),

    a_ij    = sqrt(softmax over j * softmax over i of -|f_i - y_j| / (radius scale))     0 for an image and itself
    force_i = sum_P a_ij (y_j - f_i) * sum_M a_ik  -  sum_M a_ij (y_j - f_i) * sum_P a_ik

in units of `scale`, the mean distance, and divided by its root mean square; summed over the radii. The force is zero
where P and M are the same points. It and the kernel come from drifting models (Deng et al., arXiv 2602.04770), where P
is data and M what the generator draws.
"""

import functools

import torch

from ddpo.features import load_blocks

RADII = (0.02, 0.05, 0.2)  # of the kernel, in mean distances
GRID = 4  # cells along each side of an image, whose means are features
FLOOR = 1e-3  # of the kernel, so that a far image is felt


@functools.lru_cache(maxsize=1)
def load_drift_features(model, device, dtype):
    """The function of latents (B, C, h, w) that returns their features, [(B, D)] by layer, with gradient: after each
    block of a model's frozen UNet down to the middle one, mean and standard deviation over all pixels, and means over a
    grid of cells."""
    blocks = load_blocks(model, str(device), dtype or torch.float32, to_middle=True)[0]
    return lambda latents: [pool(output) for output in blocks(latents)]


def pool(x):
    """(B, C, h, w) -> (B, D): of each channel the mean, the standard deviation, and the means over the grid's cells."""
    mean = x.mean((2, 3))
    std = ((x - mean[:, :, None, None]).square().mean((2, 3)) + 1e-6).sqrt()  # whose gradient at 0 is 0, not infinite
    cells = torch.nn.functional.adaptive_avg_pool2d(x, (min(GRID, x.shape[2]), min(GRID, x.shape[3])))
    return torch.cat([mean, std, cells.flatten(1)], 1)


def drift(x, y, attracts, repels, apart=None, radii=RADII):
    """Force (G, N, D) on N images of each of G prompts, and `unit` (G, 1, 1), in which it is measured: x / unit is to
    become x / unit + force. Has no gradient.

    Args:
        x: (G, N, D) features. y: (G, K, D), those that attract or repel.
        attracts, repels: (G, K) weights of each y, at least 0.
        apart: (N, K) booleans, false where y_j is x_i itself. None: true.
    """
    x, y = x.detach().double(), y.detach().double()
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")  # (G, N, K), exact where they are close
    apart = torch.ones_like(distance, dtype=torch.bool) if apart is None else apart.expand_as(distance)
    scale = (distance.sum((1, 2), keepdim=True) / apart.sum((1, 2), keepdim=True)).clamp(min=1e-12)
    unit = scale / x.shape[-1] ** 0.5
    force = torch.zeros_like(x)
    for radius in radii:
        logits = (-distance / (radius * scale)).masked_fill(~apart, -torch.inf)
        kernel = (logits.softmax(2) * logits.softmax(1)).sqrt().clamp(min=FLOOR) * apart
        attraction, repulsion = kernel * attracts[:, None], kernel * repels[:, None]
        weights = attraction * repulsion.sum(2, keepdim=True) - repulsion * attraction.sum(2, keepdim=True)
        part = (weights @ y - weights.sum(2, keepdim=True) * x) / unit
        force += part / part.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-4)
    return force.float(), unit.float()
