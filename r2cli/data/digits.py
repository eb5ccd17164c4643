"""scikit-learn's digits: 1,797 real 8x8 scans (UCI ML hand-written digits, test part), embedded, so always there."""

import torch

from r2cli.data.request import Data, Request
from r2cli.data.splits import MemorySplit
from r2cli.errors import InputError

TEST = 597  # scans that are held out, stratified
SIZE = 16  # pixels; at the scans' own 8x8 a MobileNet has nothing left after its strides
MEAN, STD = (0.3053,), (0.3763,)  # of the 8x8 training scans


def load(request: Request) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)  # (1797, 64) of 0 .. 16
    spec = request.input(1, SIZE, mean=MEAN, std=STD)
    if spec.channels not in (1, 3):
        raise InputError(f"digits have 1 channel, the checkpoint wants {spec.channels}: give its own --data")
    scans = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    if spec.size != 8:
        scans = torch.nn.functional.interpolate(scans, (spec.size, spec.size), mode="bilinear")
    images = scans.round().to(torch.uint8).expand(-1, spec.channels, -1, -1).contiguous()
    target = torch.from_numpy(labels).long()
    train, test = train_test_split(torch.arange(len(target)).numpy(), test_size=TEST, stratify=labels, random_state=0)
    halves = [
        MemorySplit(name, images[index], target[index], spec, augments=False)
        for name, index in (("train", torch.from_numpy(train)), ("test", torch.from_numpy(test)))
    ]
    return Data("digits", spec, tuple(str(digit) for digit in range(10)), halves[0], halves[1])
