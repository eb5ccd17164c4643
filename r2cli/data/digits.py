"""scikit-learn's digits: 1,797 real 8x8 scans (the test part of UCI's hand-written digits).

They come with scikit-learn, so nothing is downloaded. `digits:COUNT` takes COUNT images of each half, to try things.
"""

import torch

from r2cli.data.request import Data, Request, in_memory
from r2cli.errors import InputError

TEST = 597  # scans that are held out, with the same share of each class
SIZE = 16  # pixels; at the scans' own 8x8 nothing would be left after the strides of a MobileNet
MEAN, STD = (0.3053,), (0.3763,)  # of the 8x8 training scans


def load(request: Request) -> Data:
    """Load the digits. Raises InputError for a COUNT that is out of range."""
    from sklearn.datasets import load_digits  # here, because importing scikit-learn takes a second
    from sklearn.model_selection import train_test_split

    if request.where and not (request.where.isdecimal() and 10 <= int(request.where) <= TEST):
        raise InputError(f"digits:{request.where} is not digits:COUNT: give 10 to {TEST}")
    count = int(request.where) if request.where else None
    pixels, labels = load_digits(return_X_y=True)  # (1797, 64), values from 0 to 16
    spec = request.input(1, SIZE, mean=MEAN, std=STD)
    scans = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    if spec.sides != (8, 8):
        scans = torch.nn.functional.interpolate(scans, spec.sides, mode="bilinear")
    images = scans.round().to(torch.uint8)
    target = torch.from_numpy(labels).long()
    halves = train_test_split(torch.arange(len(target)), test_size=TEST, stratify=labels, random_state=0)
    train, test = ((images[index[:count]], target[index[:count]]) for index in halves)
    name = f"digits:{count}" if count else "digits"
    return in_memory(name, [str(digit) for digit in range(10)], spec, train=train, test=test, augments=False)
