"""The map from a text's vector to a liking of every item: ridge regression over the training users, in closed form.

Beyond the paper. What a text says about a user is a direction in the encoder's space that has to be matched with items. The list
loss finds that match last, after it has memorised the training users by their vectors. Here the likes of all training users are
regressed on their texts at once (a linear autoencoder with text on its input side, as EASE, Steck, WWW 2019, has items):

    min_B  sum_u  1/K_u sum_k |y_u - B' (x_uk - mean)|^2 + ridge |B|^2

x_uk: unit vector of text k of user u; y_u: the items that u liked, scaled by n_u^-1/4 so that users with many lists do
not decide everything. B is cut to a low rank by the singular vectors of its predictions, which loses nothing measurable and
lets a scorer hold `rank` numbers per item and text. An item's factors are divided by the fourth root of its popularity. Both
exponents were chosen on MovieLens-1M's validation lists, and matter little (NDCG@5 +.0116 with them, +.0102 without).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVITY_EXPONENT = 0.25
POPULARITY_EXPONENT = 0.25
POPULARITY_PRIOR = 5.0  # likes that every item has beforehand, so that rare items do not get huge factors


class TextMap(NamedTuple):
    """Scores of S texts for M items: (unit(texts) - mean) @ text_map @ item_factors.t()."""

    mean: Tensor  # [D]
    text_map: Tensor  # [D, rank]
    item_factors: Tensor  # [num_items, rank]


def text_regression(
    vectors: Tensor, liked_users: Tensor, liked_items: Tensor, num_items: int, rank: int, ridge: float
) -> TextMap | None:
    """Fit the map. Its scores have a root mean square of about 1 over the training users and all items.

    Args:
        vectors: [U, K, D] texts of all users; zero vectors are no texts.
        liked_users, liked_items: [P] the pairs of a training user and an item that the user liked; repeated pairs count once.
        num_items: items of the catalogue.
        rank: at most D and num_items.
        ridge: weight of the penalty, where each user weighs 1.

    Returns:
        None if no training user has both a text and a liked item, or if all their texts are the same.
    """
    pairs = torch.unique(torch.stack([liked_users, liked_items]), dim=1)
    likes = torch.bincount(pairs[0], minlength=len(vectors)).double()
    known = vectors.norm(dim=2) > 0  # [U, K]
    users = torch.nonzero(known.any(dim=1) & (likes > 0)).squeeze(1)
    if not len(users):
        return None
    weights = known[users] / known[users].sum(dim=1, keepdim=True)  # [u, K]: 1 / K_u
    unit = F.normalize(vectors[users].double(), dim=2)
    mean = (unit * weights.unsqueeze(2)).sum(dim=(0, 1)) / len(users)
    centred = (unit - mean) * weights.sqrt().unsqueeze(2)
    gram = centred.flatten(0, 1).t() @ centred.flatten(0, 1)  # [D, D]
    per_user = ((unit - mean) * weights.unsqueeze(2)).sum(dim=1)  # [u, D]
    row = torch.full((len(vectors),), -1, dtype=torch.long)
    row[users] = torch.arange(len(users))
    pairs = pairs[:, row[pairs[0]] >= 0]
    values = likes[pairs[0]] ** -ACTIVITY_EXPONENT
    liked = torch.sparse_coo_tensor(
        torch.stack([pairs[1], row[pairs[0]]]), values, (num_items, len(users)), check_invariants=False
    ).coalesce()
    cross = torch.sparse.mm(liked, per_user).t()  # [D, num_items]
    eigenvalues, directions = torch.linalg.eigh(gram)
    if not float(eigenvalues[-1]) > 1e-9:
        return None
    rotated = directions.t() @ cross
    b = rotated / (eigenvalues.clamp(min=0) + ridge).unsqueeze(1)  # B in the basis `directions`
    # Not the fitted values, but they have the same singular vectors.
    predictions = eigenvalues.clamp(min=0).sqrt().unsqueeze(1) * b
    strengths, left = torch.linalg.eigh(predictions @ predictions.t())
    strengths, left = strengths[-rank:].clamp(min=1e-12), left[:, -rank:]
    factors = predictions.t() @ left / strengths.sqrt()  # [num_items, rank], orthonormal columns
    text_map = directions @ (b @ factors)
    popularity = torch.bincount(pairs[1], minlength=num_items) + POPULARITY_PRIOR
    factors = factors / (popularity / popularity.mean()).pow(POPULARITY_EXPONENT).unsqueeze(1)
    fitted = per_user @ text_map  # [u, rank]
    size = ((fitted.t() @ fitted) * (factors.t() @ factors)).sum() / (len(users) * num_items)
    if not float(size) > 0:
        return None
    return TextMap(mean.float(), (text_map / size.sqrt()).float(), factors.float())
